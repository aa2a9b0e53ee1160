/*
 * shim_swap.c - what the agent asks for: segments are kept, a file's pages are compared with them and put under its
 * regions, and the file's own come back.
 *
 * All of it is the thread's alone; the lock is taken for the regions. How a region is swapped and put back is
 * shim_regions.c's, leases are kept by shim_files.c.
 */
#include "shim_parts.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_SEGMENTS = 1024, COMPARE_PAGES = 16 };

struct segment {
	uint32_t number; /* 0: none */
	int fd;
	uint64_t pages;
};

static struct segment segments[MAX_SEGMENTS];
static uint64_t max_pieces; /* of all regions: a quarter of what the kernel allows */
static uint8_t file_pages[COMPARE_PAGES * PAGE];
static uint8_t slot_pages[COMPARE_PAGES * PAGE];
static uint64_t page_flags[512];

/* ---------------------------------------------------------------------------------------------------- segments */

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
	const long sealed = sa_call3(__NR_fcntl, fd, F_GET_SEALS, 0); /* or -errno */
	struct stat info;

	if (number == 0 || free == NULL || segment_of(number) || sa_call3(__NR_fstat, fd, sa_at(&info), 0) < 0 ||
	    sealed < 0 || (sealed & seals) != seals || info.st_size <= SA_SEGMENT_HEADER) {
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

void sa_swap_begin(void)
{
	max_pieces = sa_first_number("/proc/sys/vm/max_map_count") / 4;
	for (size_t i = 0; i < MAX_SEGMENTS; i++)
		segments[i] = (struct segment){.number = 0, .fd = -1};
}

void sa_swap_forget(void)
{
	for (size_t i = 0; i < MAX_SEGMENTS; i++)
		segment_drop(&segments[i]);
}

/* --------------------------------------------------------------------------------------------------- comparing */

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

/* ---------------------------------------------------------------------------------------------------- the swap */

/* Whatever was mapped or unmapped past libc: only what the kernel shows as it was learned is swapped. */
static bool verify(const struct line *line)
{
	sa_regions_verify(&line->region);
	return true;
}

/* With the lock: the swap of one region. -errno: nothing has changed; -ENOMEM: or it is to be put back later. */
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
			return sa_region_put_back(region) ? -ENOMEM : error;
		}
	}
	return 0;
}

/* Compare, then swap, under the lease that has just come. */
static uint32_t share_file(const struct file *file, const struct sa_frame *share, uint64_t *ret_pages)
{
	struct region *region = NULL;
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
	while (outcome == SA_MAPPED_DONE && !atomic_load(&sa_stopping) &&
	       (region = sa_region_to_swap(sa_file_index(file), region)) != NULL) {
		struct piece piece;
		bool wanted = false;
		int error;

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

/* ---------------------------------------------------------------------------------------------------- messages */

static bool on_share(const struct sa_frame *share, int lease)
{
	struct file *file = sa_file_by_handle(share->number[0]);
	uint32_t outcome = SA_MAPPED_NO_ROOM;
	uint64_t pages = 0;

	if (file == NULL) {
		sa_close_fd(&lease); /* Close is on its way */
		return true;
	}
	sa_file_put_back(file);
	file->lease = lease;
	outcome = share_file(file, share, &pages);
	if (outcome != SA_MAPPED_DONE || pages == 0) {
		sa_file_put_back(file);
		pages = 0;
	}
	if (outcome == SA_MAPPED_DONE && pages == 0)
		outcome = SA_MAPPED_NO_ROOM; /* nothing of what is shared is mapped here */
	return sa_link_send(SA_MAPPED, (uint64_t[]){file->handle, share->number[1], pages, outcome}, 4, -1);
}

static bool on_unshare(const struct sa_frame *unshare)
{
	struct file *file = sa_file_by_handle(unshare->number[0]);

	if (file)
		sa_file_put_back(file);
	return sa_link_send(SA_LET_GO, (uint64_t[]){unshare->number[0], unshare->number[1]}, 2, -1);
}

bool sa_swap_answer(const struct sa_frame *frame, int fd)
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
