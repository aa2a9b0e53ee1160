/*
 * shim.c - shared pages under the file mappings of a program that does not know of them: the table of its mappings, the
 * swap and the way back, and the thread that talks to the agent. docs/preload.md is the design.
 *
 * What is put in front of libc's functions is preload.c's, formats are frame.c's; what no function here may do is
 * shim_parts.h's.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/close_range.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum {
	MAX_FILES = 1024,
	MAX_SEGMENTS = 1024,
	COMPARE_PAGES = 16,
	MS_SETTLE = 50, /* from a new mapping to the look at it */
	MS_START = 300, /* programs that end sooner cost the agent nothing, and themselves next to nothing */
	MS_RETRY_FIRST = 200,
	MS_RETRY_MOST = 5000,
	MS_LOOK_MOST = 8000 /* longest time between two looks at a program that maps nothing */
};

/* A file that the agent has been told of. The thread's alone. */
struct file {
	bool used;
	bool told;
	bool grown; /* mapped once more since it was told */
	int fd;     /* read only */
	int lease;  /* -1: nothing is shared */
	uint32_t handle;
	uint64_t dev, ino;
};

struct segment {
	uint32_t number; /* 0: none */
	int fd;
	uint64_t pages;
};

/* ---------------------------------------------------------------------------------------------------- state */

/* With the lock. */
static unsigned stops; /* sa_shim_resume is to come so often */
static bool retired;   /* for good */

static _Atomic bool watching;
static struct sa_held fork_held;

/* The thread's alone. */
static struct file files[MAX_FILES];
static struct segment segments[MAX_SEGMENTS];
static uint32_t next_handle;
static uint8_t file_pages[COMPARE_PAGES * PAGE];
static uint8_t slot_pages[COMPARE_PAGES * PAGE];
static uint64_t page_flags[512];
static uint64_t max_pieces;

bool sa_shim_watches(void)
{
	return atomic_load_explicit(&watching, memory_order_relaxed);
}

/* ------------------------------------------------------------------------------------------ the thread: its files */

static int16_t index_of(const struct file *file)
{
	return (int16_t)(file - files);
}

static struct file *file_of(uint64_t dev, uint64_t ino)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		if (files[i].used && files[i].dev == dev && files[i].ino == ino)
			return &files[i];
	}
	return NULL;
}

static struct file *open_file(const struct line *line)
{
	struct stat info;
	int fd = sa_open_read(line->path);

	if (fd < 0)
		return NULL;
	for (size_t i = 0; i < MAX_FILES; i++) {
		struct file *file = &files[i];

		if (file->used)
			continue;
		/* The path may name another file by now. */
		if (sa_call3(__NR_fstat, fd, sa_at(&info), 0) < 0 || !S_ISREG(info.st_mode) || info.st_size <= 0 ||
		    info.st_dev != line->region.dev || info.st_ino != line->region.ino)
			break;
		*file = (struct file){.used = true, .fd = fd, .lease = -1, .dev = info.st_dev, .ino = info.st_ino};
		file->handle = ++next_handle;
		return file;
	}
	sa_close_fd(&fd);
	return NULL;
}

/* Without the lock: a file may be slow to open. */
static bool open_for_region(const struct line *line)
{
	struct file *file = file_of(line->region.dev, line->region.ino);
	struct region *region;
	bool wanted;

	sa_lock();
	region = sa_region_find(&line->region);
	wanted = region && region->file == NO_FILE;
	sa_unlock();
	if (!wanted)
		return true;
	if (file == NULL)
		file = open_file(line);
	sa_lock();
	region = sa_region_find(&line->region);
	if (region)
		region->file = file ? index_of(file) : LEFT_ALONE;
	sa_unlock();
	if (file)
		file->grown = true;
	return !atomic_load(&sa_stopping);
}

/* Open the files of regions that have none. */
static void open_files(void)
{
	sa_maps_walk(open_for_region);
}

/* The file's own pages everywhere, also in children; then the lease may go. The kernel always has room for it unless
 * the program is at its limit of mappings and takes what the reserve gives back: then it is tried again. */
static void file_put_back(struct file *file)
{
	for (;;) {
		int error;

		sa_lock();
		error = sa_regions_put_back(index_of(file));
		sa_unlock();
		if (error == 0)
			break;
		(void)sa_call3(__NR_nanosleep, sa_at(&(struct timespec){0, 10000000}), 0, 0);
	}
	if (file->lease >= 0)
		sa_children_wait();
	sa_close_fd(&file->lease);
}

static bool tell_files(void)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		struct file *file = &files[i];
		struct stat info;

		if (!file->used || (file->told && !file->grown))
			continue;
		file->grown = false;
		if (file->told) {
			/* The agent shares a file as a whole: once more from the beginning. */
			file_put_back(file);
			file->told = false;
			if (!sa_link_send(SA_CLOSE, (uint64_t[]){file->handle}, 1, -1))
				return false;
			file->handle = ++next_handle;
		}
		if (sa_call3(__NR_fstat, file->fd, sa_at(&info), 0) < 0 || info.st_size <= 0)
			continue; /* empty for now: the next look tries again */
		file->told = true;
		if (!sa_link_send(SA_OPEN, (uint64_t[]){file->handle, (uint64_t)info.st_size}, 2, file->fd))
			return false;
	}
	return true;
}

static bool drop_unused(void)
{
	if (!atomic_exchange(&sa_emptied, false))
		return true;
	for (size_t i = 0; i < MAX_FILES; i++) {
		struct file *file = &files[i];
		bool used;

		if (!file->used)
			continue;
		sa_lock();
		used = sa_regions_have((int16_t)i);
		sa_unlock();
		if (used)
			continue;
		if (file->lease >= 0)
			sa_children_wait();
		sa_close_fd(&file->lease);
		sa_close_fd(&file->fd);
		file->used = false;
		if (file->told && !sa_link_send(SA_CLOSE, (uint64_t[]){file->handle}, 1, -1))
			return false;
	}
	return true;
}

/* --------------------------------------------------------------------------------------- the thread: the swap */

static struct segment *segment_of(uint32_t number)
{
	for (size_t i = 0; i < MAX_SEGMENTS; i++) {
		if (segments[i].number == number)
			return &segments[i];
	}
	return NULL;
}

static void segment_add(uint32_t number, int fd)
{
	const int seals = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_SEAL;
	struct segment *free = segment_of(0);
	struct stat info;

	if (number == 0 || free == NULL || segment_of(number) || sa_call3(__NR_fstat, fd, sa_at(&info), 0) < 0 ||
	    (sa_call3(__NR_fcntl, fd, F_GET_SEALS, 0) & seals) != seals || info.st_size <= SA_SEGMENT_HEADER) {
		sa_close_fd(&fd); /* what is in it stays the file's */
		return;
	}
	*free = (struct segment){number, fd, (uint64_t)(info.st_size - SA_SEGMENT_HEADER) / PAGE};
}

static void segment_drop(struct segment *segment)
{
	sa_close_fd(&segment->fd);
	*segment = (struct segment){.number = 0, .fd = -1};
}

/* Where in a Share the two kinds of runs are; the column behind each has their segments. */
enum { RUNS_TO_MAP = 0, RUNS_TO_COMPARE = 2 };

/* The part of a run that lies in a region: where, which slot of which segment, how many pages. */
struct piece {
	uint64_t page; /* of the file */
	uint64_t slot;
	uint64_t count;
	const struct segment *segment;
};

/* kind: RUNS_TO_MAP or RUNS_TO_COMPARE. */
static bool piece_of(const struct sa_frame *share, int kind, uint32_t index, const struct region *region,
                     struct piece *ret)
{
	const uint64_t page = sa_frame_u32(share->column[kind], (size_t)index * 3);
	const uint64_t slot = sa_frame_u32(share->column[kind], (size_t)index * 3 + 1);
	const uint64_t count = sa_frame_u32(share->column[kind], (size_t)index * 3 + 2);
	const uint64_t first = region->first;
	const uint64_t end = first + region->length / PAGE;
	const uint64_t from = page > first ? page : first;
	const uint64_t to = page + count < end ? page + count : end;
	const uint32_t number = sa_frame_u32(share->column[kind + 1], index);

	if (from >= to || number == 0)
		return false;
	ret->segment = segment_of(number);
	ret->page = from;
	ret->slot = slot + (from - page);
	ret->count = to - from;
	/* UNTRUSTED: a slot past the end would be SIGBUS. */
	return ret->segment && ret->slot < ret->segment->pages && ret->count <= ret->segment->pages - ret->slot;
}

static bool piece_is_equal(const struct file *file, const struct piece *piece)
{
	for (uint64_t done = 0; done < piece->count;) {
		const uint64_t n = piece->count - done < COMPARE_PAGES ? piece->count - done : COMPARE_PAGES;
		const uint64_t slot = SA_SEGMENT_HEADER + (piece->slot + done) * PAGE;

		if (!sa_read_all(file->fd, file_pages, n * PAGE, (piece->page + done) * PAGE, true) ||
		    !sa_read_all(piece->segment->fd, slot_pages, n * PAGE, slot, false) ||
		    memcmp(file_pages, slot_pages, n * PAGE) != 0)
			return false;
		done += n;
	}
	return true;
}

/* Whether no page of the region is the program's own, as far as the kernel can say; false too when it does not. */
static bool is_all_the_files(int pagemap, const struct region *region)
{
	const uint64_t present = 1ULL << 63, swapped = 1ULL << 62, of_file = 1ULL << 61;
	const size_t pages = region->length / PAGE;

	for (size_t done = 0; done < pages;) {
		const size_t n = pages - done < 512 ? pages - done : 512;
		const uint64_t offset = (region->start / PAGE + done) * sizeof page_flags[0];

		if (!sa_read_all(pagemap, (uint8_t *)page_flags, n * sizeof page_flags[0], offset, false))
			return false;
		for (size_t i = 0; i < n; i++) {
			if (page_flags[i] & swapped || ((page_flags[i] & present) && !(page_flags[i] & of_file)))
				return false;
		}
		done += n;
	}
	return true;
}

/* Whatever was mapped or unmapped past libc: only what the kernel shows as it was learned is swapped. */
static bool verify(const struct line *line)
{
	sa_regions_verify(&line->region);
	return true;
}

/* With the lock: the swap of one region. -errno: nothing has changed. */
static int region_swap(struct region *region, const struct sa_frame *share)
{
	int error = sa_region_set_aside(region);

	if (error)
		return error;
	for (uint32_t i = 0; i < share->entries[1]; i++) {
		struct piece piece;

		if (!piece_of(share, RUNS_TO_MAP, i, region, &piece))
			continue;
		error = sa_region_share(region, piece.page, piece.count, piece.segment->fd,
		                        SA_SEGMENT_HEADER + piece.slot * PAGE);
		if (error) {
			const int back = sa_region_put_back(region);

			return back ? back : error;
		}
	}
	return 0;
}

/* Compare, then swap, under the lease that has just come. */
static uint32_t share_file(const struct file *file, const struct sa_frame *share, uint64_t *ret_pages)
{
	int pagemap;
	uint32_t outcome = SA_MAPPED_DONE;
	/* What nobody has read and the agent has proof of is not read here either (docs/cold-start.md). */
	const int kind = share->number[2] ? RUNS_TO_MAP : RUNS_TO_COMPARE;
	const size_t nwanted = share->entries[RUNS_TO_MAP];

	*ret_pages = 0;
	/* Which regions there are may change while it is compared. So every run is compared with the whole file. */
	for (uint32_t i = 0; i < share->entries[kind]; i++) {
		const struct region whole = {.first = 0, .length = (size_t)1 << 45};
		struct piece piece;

		if (!piece_of(share, kind, i, &whole, &piece))
			return SA_MAPPED_NO_ROOM;
		if (!piece_is_equal(file, &piece))
			return SA_MAPPED_DIFFERENT;
		if (atomic_load(&sa_stopping))
			return SA_MAPPED_NO_ROOM;
	}
	if (sa_call3(__NR_fcntl, file->lease, F_GETLEASE, 0) != F_RDLCK)
		return SA_MAPPED_NO_ROOM; /* a writer waits already: Unshare is on its way */
	pagemap = sa_open_read("/proc/self/pagemap");
	if (pagemap < 0)
		return SA_MAPPED_NO_ROOM;
	sa_lock();
	sa_regions_doubt();
	sa_maps_walk(verify);
	for (struct region *region = NULL; outcome == SA_MAPPED_DONE && !atomic_load(&sa_stopping);) {
		struct piece piece;
		bool wanted = false;
		int error;

		region = sa_region_to_swap(index_of(file), region);
		if (region == NULL)
			break;
		for (uint32_t k = 0; k < share->entries[1] && !wanted; k++)
			wanted = piece_of(share, RUNS_TO_MAP, k, region, &piece);
		if (!wanted)
			continue;
		if (sa_regions_pieces() + nwanted > max_pieces) {
			outcome = SA_MAPPED_NO_ROOM;
			break;
		}
		error = region->verified && is_all_the_files(pagemap, region) ? region_swap(region, share) : -EINVAL;
		if (error == -ENOMEM)
			outcome = SA_MAPPED_NO_ROOM;
		else if (error)
			sa_region_leave_alone(region);
		*ret_pages += region->pages;
	}
	sa_unlock();
	sa_close_fd(&pagemap);
	return outcome;
}

static bool on_share(const struct sa_frame *share, int lease)
{
	struct file *file = NULL;
	uint32_t outcome = SA_MAPPED_NO_ROOM;
	uint64_t pages = 0;

	for (size_t i = 0; i < MAX_FILES && !file; i++) {
		if (files[i].used && files[i].handle == share->number[0])
			file = &files[i];
	}
	if (file == NULL) {
		sa_close_fd(&lease); /* Close is on its way */
		return true;
	}
	file_put_back(file);
	file->lease = lease;
	outcome = share_file(file, share, &pages);
	if (outcome != SA_MAPPED_DONE || pages == 0) {
		file_put_back(file);
		pages = 0;
	}
	if (outcome == SA_MAPPED_DONE && pages == 0)
		outcome = SA_MAPPED_NO_ROOM; /* nothing of what is shared is mapped here */
	return sa_link_send(SA_MAPPED, (uint64_t[]){file->handle, share->number[1], pages, outcome}, 4, -1);
}

static bool on_unshare(const struct sa_frame *unshare)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		if (files[i].used && files[i].handle == unshare->number[0])
			file_put_back(&files[i]);
	}
	return sa_link_send(SA_LET_GO, (uint64_t[]){unshare->number[0], unshare->number[1]}, 2, -1);
}

/* Takes the descriptor. False: the connection is of no use any more. */
static bool on_message(const struct sa_frame *frame, int fd)
{
	switch (frame->type) {
	case SA_SHARE_SEGMENT:
		segment_add(frame->number[0], fd);
		return true;
	case SA_SHARE:
		return on_share(frame, fd);
	case SA_UNSHARE:
		return on_unshare(frame);
	case SA_SEGMENTS_GONE:
		for (uint32_t i = 0; i < frame->entries[0]; i++) {
			struct segment *segment = segment_of(sa_frame_u32(frame->column[0], i));

			if (segment && segment->number)
				segment_drop(segment);
		}
		return true;
	default:
		/* Plain says nothing that the program would hear of; grants are not for this process. */
		sa_close_fd(&fd);
		return true;
	}
}

/* ------------------------------------------------------------------------------------------ the thread: its life */

/* How large the address space is, in pages: a cheap look whether a library has come. */
static uint64_t address_space(void)
{
	return sa_first_number("/proc/self/statm");
}

/* Until the connection ends, or the thread is to. */
static bool serve(void)
{
	int64_t look_at = sa_now_ms();
	int64_t look_pause = 0;
	uint64_t size = 0;
	int looks = 0; /* that follow a change: libraries are taken at the second one */
	bool go = true;

	if (!sa_link_send(SA_UNCHANGED, NULL, 0, -1))
		return true;
	while (go) {
		int64_t now = sa_now_ms();
		bool arrived;

		if (now >= look_at) {
			const bool news = atomic_load(&sa_dirty) || address_space() != size;

			looks = news ? 2 : looks;
			look_pause = looks ? MS_LATE + MS_SETTLE : look_pause * 2;
			look_pause = look_pause < MS_LOOK_MOST ? look_pause : MS_LOOK_MOST;
			if (looks) {
				looks--;
				sa_look();
				open_files();
			}
			size = address_space();
			if (!tell_files())
				return true;
			now = sa_now_ms();
			look_at = now + look_pause;
		}
		if (!drop_unused())
			return true;
		arrived = sa_link_wait(look_at > now ? look_at - now : 0, &go);
		now = sa_now_ms();
		if (atomic_load(&sa_dirty) && look_at > now + MS_SETTLE)
			look_at = now + MS_SETTLE;
		if (go && arrived && !sa_link_take(on_message))
			return true;
	}
	return false;
}

/* Without an agent: every page the file's, and nothing kept of the connection. */
static void hang_up(void)
{
	for (size_t i = 0; i < MAX_FILES; i++) {
		if (files[i].used)
			file_put_back(&files[i]);
		files[i].told = false;
	}
	sa_link_close(); /* not before: an agent that is there takes it for our having let go */
	for (size_t i = 0; i < MAX_SEGMENTS; i++)
		segment_drop(&segments[i]);
}

static void thread_main(void)
{
	int64_t pause = MS_RETRY_FIRST;
	bool go;

	/* Its own table of descriptors from here on, an empty one. */
	if (sa_call3(__NR_close_range, 0, UINT_MAX, CLOSE_RANGE_UNSHARE) < 0)
		return;                               /* Linux 5.9 */
	(void)sa_call3(__NR_chdir, sa_at("/"), 0, 0); /* not to hold a folder; if it cannot, it does */
	(void)sa_call3(__NR_prctl, PR_SET_NAME, sa_at("sharearea"), 0);
	if (!sa_wait_begin())
		return;
	max_pieces = sa_first_number("/proc/sys/vm/max_map_count") / 4;
	for (size_t i = 0; i < MAX_SEGMENTS; i++)
		segments[i] = (struct segment){.number = 0, .fd = -1};
	for (go = sa_pause_ms(MS_START); go; go = go && sa_pause_ms(pause)) {
		const int64_t begun = sa_now_ms();

		if (sa_link_connect()) {
			go = serve();
			hang_up();
		}
		/* A connection that ends at once is not tried again at once. */
		pause = sa_now_ms() - begun > 1000 ? MS_RETRY_FIRST : pause * 2;
		pause = pause < MS_RETRY_MOST ? pause : MS_RETRY_MOST;
	}
}

/* ------------------------------------------------------------------------------------------- start, stop, fork */

/* With the lock or alone. Files are the thread's: a new one begins with none. */
static void start_thread(void)
{
	uint64_t signals;

	sa_regions_forget_files();
	memset(files, 0, sizeof files);
	sa_look_forget();
	sa_link_forget();
	if (!sa_children_begin())
		return;
	atomic_store(&sa_dirty, true);
	sa_signals_block(&signals);
	if (sa_thread_make(thread_main))
		atomic_store(&watching, true);
	sa_signals_restore(&signals);
}

void sa_shim_start(const char *socket, bool whole)
{
	struct rlimit limit;

	if (!sa_link_aim(socket))
		return;
	if (sa_call(__NR_prlimit64, 0, RLIMIT_AS, 0, sa_at(&limit), 0, 0) < 0 || limit.rlim_cur != RLIM_INFINITY)
		return;
	if (!sa_is_unfiltered())
		return;
	sa_look_begin(whole);
	start_thread();
}

void sa_shim_stop(bool forever)
{
	const int64_t end = sa_now_ms() + MS_PATIENCE;
	struct sa_held held;

	if (!sa_shim_watches() || !sa_thread_is_ours())
		return;
	sa_shim_lock(&held);
	(void)sa_regions_put_back_all(); /* what cannot be put back the thread tries until it can */
	atomic_store(&sa_stopping, true);
	stops += !forever;
	if (forever) {
		retired = true;
		atomic_store(&watching, false);
	}
	sa_shim_unlock(&held);
	sa_thread_wake();
	sa_thread_await_end(end);
}

void sa_shim_resume(void)
{
	struct sa_held held;

	if (!sa_shim_watches() || !sa_thread_is_ours())
		return;
	sa_shim_lock(&held);
	stops -= stops > 0;
	/* A thread that has not ended in time (its disk hangs) is the last one of this process. */
	if (!retired && stops == 0 && !sa_thread_runs() && atomic_load(&sa_stopping))
		start_thread();
	sa_shim_unlock(&held);
}

void sa_shim_before_fork(void)
{
	sa_shim_lock(&fork_held);
	sa_children_fork(sa_regions_are_shared());
}

void sa_shim_after_fork_parent(void)
{
	const struct sa_held held = fork_held;

	sa_shim_unlock(&held);
}

void sa_shim_after_fork_child(void)
{
	const struct sa_held held = fork_held;

	sa_regions_after_fork();
	sa_children_done();
	sa_thread_none();
	stops = 0;
	if (sa_shim_watches() && !retired)
		start_thread();
	sa_shim_unlock(&held);
}
