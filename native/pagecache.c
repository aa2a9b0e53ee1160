/*
 * pagecache.c - which pages of a file are in the page cache, what is in them, and how to let go of them.
 *
 * Two rules hold everywhere here. Looking at a file must not make the guest's cache larger: no read-ahead, no page read
 * that was not resident. And a file may change its size at any time: its bytes are copied by system calls only, no
 * mapping of a file is ever dereferenced, so there is no SIGBUS. Fingerprints are hash.c's; which files and when, the
 * agent's.
 *
 * How bytes are read. preadv2(RWF_NOWAIT) alone breaks the first rule. On Linux 6.18 a page that is absent starts a
 * read of the whole request, and a resident page that carries the read-ahead mark (whatever was read in sequence or
 * mapped has them) starts the read-ahead behind it; POSIX_FADV_RANDOM on the descriptor changes neither (all seen).
 * Older kernels set IOCB_NOIO (include/linux/fs.h, kiocb_set_rw_flags; read, not run) and refuse a marked page. So:
 *   - a file that is wholly resident is read with preadv2(RWF_NOWAIT): there is nothing left to read ahead;
 *   - of any other file the resident pages are found first and then copied with process_vm_readv(2) from a mapping of
 *     our own with MADV_RANDOM, which the kernel's fault path takes as "no read-ahead". A page past the end of the file
 *     ends the copy (EFAULT). A page evicted between look and copy costs the read of that one page;
 *   - where neither can be had (residency is hidden from us, or no mapping), preadv2(RWF_NOWAIT) or pread(2), trusting
 *     the caller's own check.
 * The caller's descriptor keeps its state: no advice is set on it and its offset does not move.
 */
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

enum {
	PIECE_PAGES = 32,         /* read, then hashed while still in the second-level cache */
	LOOK_PAGES = 16384,       /* 64 MiB mapped for one mincore; its answer is 16 KiB of stack */
	READ_WINDOW_PAGES = 2048, /* 8 MiB of a file mapped while it is read: what others cannot drop meanwhile */
	LARGEST_FOLIO_PAGES = 512 /* the page cache's largest unit on this machine: 2 MiB */
};

#define MAX_PAGES ((uint64_t)INT64_MAX / SA_PAGE_SIZE)

/* ---------------------------------------------------------------------------------------------------- cachestat */

/* Linux UAPI, include/uapi/linux/mman.h; the number is the same on every architecture. glibc 2.36 has neither. */
#define CACHESTAT_NR 451

/* statfs(2): OVERLAYFS_SUPER_MAGIC. */
#define OVERLAY_MAGIC 0x794c7630

struct cachestat_range {
	uint64_t off;
	uint64_t len;
};

struct cachestat_counts {
	uint64_t nr_cache;
	uint64_t nr_dirty;
	uint64_t nr_writeback;
	uint64_t nr_evicted;
	uint64_t nr_recently_evicted;
};

static bool range_is_valid(uint64_t first, uint64_t npages)
{
	return first <= MAX_PAGES && npages <= MAX_PAGES - first;
}

static uint64_t pages_of(uint64_t bytes)
{
	return bytes / SA_PAGE_SIZE + (bytes % SA_PAGE_SIZE != 0);
}

int sa_cachestat(int fd, uint64_t first, uint64_t npages, uint64_t *ret_cached, uint64_t *ret_dirty)
{
	struct cachestat_range range = {.off = first * SA_PAGE_SIZE, .len = npages * SA_PAGE_SIZE};
	struct cachestat_counts counts = {0};
	struct statfs fs;

	*ret_cached = 0;
	*ret_dirty = 0;
	if (!range_is_valid(first, npages))
		return -EINVAL;
	if (syscall(CACHESTAT_NR, fd, &range, &counts, 0U) < 0)
		return -errno;
	/* overlayfs keeps its pages in the inode below, cachestat looks at the one above: always 0 (seen on 6.18). */
	if (counts.nr_cache == 0) {
		if (fstatfs(fd, &fs) < 0)
			return -errno;
		if (fs.f_type == OVERLAY_MAGIC)
			return -EOPNOTSUPP;
	}
	*ret_cached = counts.nr_cache;
	/* A page dirtied again while it is written out is in both counts. */
	*ret_dirty = counts.nr_dirty + counts.nr_writeback;
	if (*ret_dirty > counts.nr_cache)
		*ret_dirty = counts.nr_cache;
	return 0;
}

/* --------------------------------------------------------------------------------------------------- residency */

/* A mapping of pages [first, first + npages) of a file, for system calls to look at or to copy from. */
struct window {
	void *at; /* NULL: none */
	uint64_t first;
	size_t npages;
};

static void window_close(struct window *window)
{
	if (window->at == NULL)
		return;
	/* Cannot fail: the whole of a mapping of our own, so nothing is split. */
	(void)munmap(window->at, window->npages * SA_PAGE_SIZE);
	window->at = NULL;
}

static int window_open(int fd, uint64_t first, size_t npages, int protection, struct window *ret)
{
	void *at = mmap(NULL, npages * SA_PAGE_SIZE, protection, MAP_SHARED, fd, (off_t)(first * SA_PAGE_SIZE));

	if (at == MAP_FAILED)
		return -errno;
	*ret = (struct window){.at = at, .first = first, .npages = npages};
	return 0;
}

#define WINDOW_SCOPE __attribute__((cleanup(window_close))) struct window

struct residency {
	int fd;
	int how;    /* SA_RESIDENCY_*; AUTO turns into MINCORE when cachestat is found wanting */
	bool truth; /* mincore has been seen to tell it */
};

/* mincore(2) answers 1 for every page to a caller who neither owns the file nor may write it nor has CAP_FOWNER
 * (mm/mincore.c, can_do_mincore). A page that lies past all that the file can have in the cache gives it away. */
static int residency_probe(struct residency *residency)
{
	WINDOW_SCOPE window = {0};
	struct stat st;
	uint64_t beyond;
	uint8_t answer;
	int error;

	if (fstat(residency->fd, &st) < 0)
		return -errno;
	beyond = (pages_of((uint64_t)st.st_size) / LARGEST_FOLIO_PAGES + 2) * LARGEST_FOLIO_PAGES;
	error = window_open(residency->fd, beyond, 1, PROT_NONE, &window);
	if (error)
		return error == -EOVERFLOW ? -EPERM : error;
	if (mincore(window.at, SA_PAGE_SIZE, &answer) < 0)
		return -errno;
	if (answer & 1)
		return -EPERM;
	residency->truth = true;
	return 0;
}

/* mapped: where page first is mapped, or NULL. Nothing is touched, so no protection is needed. */
static int residency_mincore(struct residency *residency, uint64_t first, size_t npages, void *mapped, uint8_t *ret_in)
{
	WINDOW_SCOPE window = {0};
	size_t resident = 0;

	if (mapped == NULL) {
		const int error = window_open(residency->fd, first, npages, PROT_NONE, &window);

		if (error)
			return error;
		mapped = window.at;
	}
	if (mincore(mapped, npages * SA_PAGE_SIZE, ret_in) < 0)
		return -errno;
	for (size_t i = 0; i < npages; i++) {
		ret_in[i] &= 1; /* the other bits are reserved */
		resident += ret_in[i];
	}
	if (resident == npages && !residency->truth)
		return residency_probe(residency);
	return 0;
}

/* By halving: one question for a part that is all there or all absent. Recursion: log2(LOOK_PAGES) deep. */
static int residency_cachestat(int fd, uint64_t first, size_t npages, uint8_t *ret_in)
{
	uint64_t cached;
	uint64_t dirty;
	int error = sa_cachestat(fd, first, npages, &cached, &dirty);

	if (error)
		return error;
	if (cached == 0 || cached >= npages) {
		memset(ret_in, cached != 0, npages);
		return 0;
	}
	error = residency_cachestat(fd, first, npages / 2, ret_in);
	if (error)
		return error;
	return residency_cachestat(fd, first + npages / 2, npages - npages / 2, ret_in + npages / 2);
}

/* ret_in: npages (at most LOOK_PAGES, at least 1) bytes, 1 where resident. -EPERM: the kernel will not tell us. */
static int residency_look(struct residency *residency, uint64_t first, size_t npages, void *mapped, uint8_t *ret_in)
{
	uint64_t cached;
	uint64_t dirty;

	if (residency->how == SA_RESIDENCY_CACHESTAT)
		return residency_cachestat(residency->fd, first, npages, ret_in);
	if (residency->how == SA_RESIDENCY_AUTO) {
		const int error = sa_cachestat(residency->fd, first, npages, &cached, &dirty);

		if (error == 0 && (cached == 0 || cached >= npages)) {
			memset(ret_in, cached != 0, npages);
			return 0;
		}
		/* Old kernel; a seccomp filter, or not ours to ask (mincore will say); overlayfs, hugetlbfs. */
		if (error == -ENOSYS || error == -EPERM || error == -EOPNOTSUPP)
			residency->how = SA_RESIDENCY_MINCORE;
		else if (error)
			return error;
	}
	return residency_mincore(residency, first, npages, mapped, ret_in);
}

/* From at on, the first stretch of equal, non-zero bytes in marks: [*ret_begin, *ret_end), empty at the end. */
static void next_stretch(const uint8_t *marks, size_t n, size_t at, size_t *ret_begin, size_t *ret_end)
{
	while (at < n && marks[at] == 0)
		at++;
	*ret_begin = at;
	while (at < n && marks[at] != 0)
		at++;
	*ret_end = at;
}

/* Runs (first, count) as they are found; one that begins where the last one ends makes that longer. */
struct run_list {
	uint32_t *pairs;
	size_t max;
	size_t n;
};

static bool run_list_add(struct run_list *list, uint32_t first, uint32_t count)
{
	uint32_t *last = list->n ? list->pairs + (list->n - 1) * 2 : NULL;

	if (last && last[0] + last[1] == first) {
		last[1] += count;
		return true;
	}
	if (list->n == list->max)
		return false;
	list->pairs[list->n * 2] = first;
	list->pairs[list->n * 2 + 1] = count;
	list->n++;
	return true;
}

static int look_for_runs(struct residency *residency, uint64_t npages, struct run_list *list, uint64_t *ret_covered)
{
	uint8_t in[LOOK_PAGES];

	*ret_covered = 0;
	if (residency->how == SA_RESIDENCY_AUTO && npages > LOOK_PAGES) {
		uint64_t cached;
		uint64_t dirty;

		if (sa_cachestat(residency->fd, 0, npages, &cached, &dirty) == 0 && (cached == 0 || cached >= npages)) {
			if (cached == 0 || run_list_add(list, 0, (uint32_t)npages))
				*ret_covered = npages;
			return 0;
		}
	}
	for (uint64_t first = 0; first < npages; first += LOOK_PAGES) {
		const size_t n = npages - first < LOOK_PAGES ? (size_t)(npages - first) : LOOK_PAGES;
		const int error = residency_look(residency, first, n, NULL, in);
		size_t begin;
		size_t end = 0;

		if (error)
			return error;
		for (next_stretch(in, n, 0, &begin, &end); begin < end; next_stretch(in, n, end, &begin, &end)) {
			if (!run_list_add(list, (uint32_t)(first + begin), (uint32_t)(end - begin))) {
				*ret_covered = first + begin;
				return 0;
			}
		}
		*ret_covered = first + n;
	}
	return 0;
}

int sa_resident_runs(int fd, uint64_t npages, int how, uint32_t *ret_runs, size_t max_runs, size_t *ret_nruns,
                     uint64_t *ret_covered)
{
	struct residency residency = {.fd = fd, .how = how};
	struct run_list list = {.pairs = ret_runs, .max = max_runs};
	int error;

	*ret_nruns = 0;
	*ret_covered = 0;
	if (how != SA_RESIDENCY_AUTO && how != SA_RESIDENCY_CACHESTAT && how != SA_RESIDENCY_MINCORE)
		return -EINVAL;
	if (npages > UINT32_MAX)
		return -EFBIG;
	error = look_for_runs(&residency, npages, &list, ret_covered);
	*ret_nruns = error ? 0 : list.n;
	return error;
}

/* ----------------------------------------------------------------------------------------------------- reading */

/* One walk over a file, in pieces of at most PIECE_PAGES. */
struct reader {
	struct residency residency;
	struct window window;
	uint64_t size;  /* the file's size as the caller knows it */
	uint64_t now;   /* and as it was last seen */
	uint64_t valid; /* pages before this one are, as far as seen, what they are in a file of that size */
	bool whole;     /* nothing of the file is absent */
	bool mapped;    /* bytes may be had through the window */
	int flags;      /* of preadv2 */
};

/* How many leading pages of a file of size bytes are still pages of that file when it has now bytes: the short last one
 * only while the size is the same. */
static uint64_t valid_pages(uint64_t size, uint64_t now)
{
	if (size == now)
		return pages_of(size);
	return (size < now ? size : now) / SA_PAGE_SIZE;
}

static int reader_check_size(struct reader *reader)
{
	struct stat st;
	uint64_t valid;

	if (fstat(reader->residency.fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return -EINVAL;
	reader->now = (uint64_t)st.st_size;
	valid = valid_pages(reader->size, reader->now);
	if (valid < reader->valid)
		reader->valid = valid;
	return 0;
}

static int reader_init(int fd, uint64_t size, uint64_t first, uint64_t npages, struct reader *ret)
{
	uint64_t existing;
	uint64_t cached;
	uint64_t dirty;
	int error;

	*ret = (struct reader){
		.residency = {.fd = fd, .how = SA_RESIDENCY_AUTO},
		.size = size,
		.valid = UINT64_MAX,
		.mapped = true,
		.flags = RWF_NOWAIT,
	};
	if (!range_is_valid(first, npages) || size > (uint64_t)INT64_MAX)
		return -EINVAL;
	error = reader_check_size(ret);
	if (error)
		return error;
	/* Not asked for a small part of a large file: the question costs as much as the file has pages. */
	existing = pages_of(ret->now);
	if (existing > 0 && npages >= existing / 4)
		ret->whole = sa_cachestat(fd, 0, existing, &cached, &dirty) == 0 && cached >= existing;
	return 0;
}

static void reader_deinit(struct reader *reader)
{
	window_close(&reader->window);
}

#define READER_SCOPE __attribute__((cleanup(reader_deinit))) struct reader

/* Have pages [first, first + npages) in the window; on failure the reader does without. */
static void reader_map(struct reader *reader, uint64_t first, size_t npages)
{
	struct window *window = &reader->window;

	if (!reader->mapped)
		return;
	if (window->at && first >= window->first && first + npages <= window->first + window->npages)
		return;
	window_close(window);
	if (window_open(reader->residency.fd, first, READ_WINDOW_PAGES, PROT_READ, window) ||
	    madvise(window->at, window->npages * SA_PAGE_SIZE, MADV_RANDOM) < 0) {
		window_close(window);
		reader->mapped = false;
	}
}

static void *reader_at(const struct reader *reader, uint64_t page)
{
	if (reader->window.at == NULL)
		return NULL;
	return (uint8_t *)reader->window.at + (page - reader->window.first) * SA_PAGE_SIZE;
}

/* Copy pages until one refuses. The window holds them. */
static int copy_mapped(struct reader *reader, uint64_t first, size_t npages, uint8_t *ret_pages, size_t *ret_n)
{
	const struct iovec to = {.iov_base = ret_pages, .iov_len = npages * SA_PAGE_SIZE};
	const struct iovec from = {.iov_base = reader_at(reader, first), .iov_len = to.iov_len};
	/* The calling thread by its own number: the thread the process began with may be gone. */
	const ssize_t n = process_vm_readv(gettid(), &to, 1, &from, 1, 0);

	*ret_n = 0;
	if (n >= 0)
		*ret_n = (size_t)n / SA_PAGE_SIZE;
	else if (errno == ENOSYS || errno == EPERM)
		reader->mapped = false;
	else if (errno != EFAULT)
		return -errno;
	return 0;
}

/* Read pages until one refuses, or the file ends. */
static int copy_read(struct reader *reader, uint64_t first, size_t npages, uint8_t *ret_pages, size_t *ret_n)
{
	const uint64_t offset = first * SA_PAGE_SIZE;
	const uint64_t left = reader->size - offset;
	const size_t want = left < npages * SA_PAGE_SIZE ? (size_t)left : npages * SA_PAGE_SIZE;
	size_t done = 0;

	*ret_n = 0;
	while (done < want) {
		const struct iovec to = {.iov_base = ret_pages + done, .iov_len = want - done};
		const ssize_t n = preadv2(reader->residency.fd, &to, 1, (off_t)(offset + done), reader->flags);

		if (n > 0)
			done += (size_t)n;
		else if (n == 0 || errno == EAGAIN)
			break;
		else if (errno == EOPNOTSUPP && reader->flags != 0)
			reader->flags = 0;
		else if (errno != EINTR)
			return -errno;
	}
	*ret_n = done == want ? npages : done / SA_PAGE_SIZE;
	return 0;
}

/* Copy a stretch of pages that were resident a moment ago; leave out those that refuse. */
static int copy_stretch(struct reader *reader, uint64_t first, size_t npages, uint8_t *ret_pages, uint8_t *ret_state)
{
	size_t at = 0;

	while (at < npages) {
		uint8_t *to = ret_pages + at * SA_PAGE_SIZE;
		size_t n = 0;
		int error = 0;

		if (reader->mapped)
			error = copy_mapped(reader, first + at, npages - at, to, &n);
		if (!error && !reader->mapped)
			error = copy_read(reader, first + at, npages - at, to, &n);
		if (error)
			return error;
		memset(ret_state + at, SA_PAGE_DATA, n);
		at += n + 1;
	}
	return 0;
}

static int copy_resident(struct reader *reader, uint64_t first, size_t npages, uint8_t *ret_pages, uint8_t *ret_state)
{
	uint8_t in[PIECE_PAGES];
	size_t at = 0;
	size_t begin;
	size_t end;
	int error;

	if (reader->whole) {
		error = copy_read(reader, first, npages, ret_pages, &at);
		if (error)
			return error;
		memset(ret_state, SA_PAGE_DATA, at);
		if (at == npages)
			return 0;
		/* Evicted meanwhile, or a read-ahead mark under IOCB_NOIO. */
	}
	reader_map(reader, first, npages);
	error = residency_look(&reader->residency, first + at, npages - at, reader_at(reader, first + at), in + at);
	if (error == -EPERM || error == -ENODEV || error == -EACCES) {
		reader->mapped = false;
		memset(in + at, 1, npages - at);
	} else if (error) {
		return error;
	}
	for (next_stretch(in, npages, at, &begin, &end); begin < end; next_stretch(in, npages, end, &begin, &end)) {
		error = copy_stretch(reader, first + begin, end - begin, ret_pages + begin * SA_PAGE_SIZE,
		                     ret_state + begin);
		if (error)
			return error;
	}
	return 0;
}

/* One piece: npages at most PIECE_PAGES. Pages that are not SA_PAGE_DATA afterwards have undefined bytes. */
static int reader_read(struct reader *reader, uint64_t first, size_t npages, uint8_t *ret_pages, uint8_t *ret_state)
{
	const uint64_t tail = reader->size % SA_PAGE_SIZE;
	const uint64_t last = reader->size / SA_PAGE_SIZE;
	int error;

	memset(ret_state, SA_PAGE_ABSENT, npages);
	if (first >= reader->valid)
		return 0;
	error = copy_resident(reader, first, npages < reader->valid - first ? npages : (size_t)(reader->valid - first),
	                      ret_pages, ret_state);
	if (error)
		return error;
	/* truncate(2) sets the size before it clears what lies behind it, so a smaller size shows now if the bytes just
	 * copied are of one. (A file that has grown back meanwhile has another mtime: the caller's to look at.) */
	error = reader_check_size(reader);
	if (error)
		return error;
	for (size_t i = reader->valid > first ? (size_t)(reader->valid - first) : 0; i < npages; i++)
		ret_state[i] = SA_PAGE_ABSENT;
	/* Whoever maps the file may have written behind its end, inside the last page. */
	if (tail != 0 && last >= first && last - first < npages)
		memset(ret_pages + (last - first) * SA_PAGE_SIZE + tail, 0, SA_PAGE_SIZE - tail);
	return 0;
}

/* Fingerprint the pages marked SA_PAGE_DATA; tell zero pages from the others. */
static int fingerprint_marked(const uint8_t *key, const uint8_t *pages, size_t npages, uint8_t *ret_fps,
                              uint8_t *ret_state)
{
	size_t begin;
	size_t end;

	memset(ret_fps, 0, npages * SA_FP_SIZE);
	for (next_stretch(ret_state, npages, 0, &begin, &end); begin < end;
	     next_stretch(ret_state, npages, end, &begin, &end)) {
		const int error = sa_fingerprint_pages(key, pages + begin * SA_PAGE_SIZE, end - begin,
		                                       ret_fps + begin * SA_FP_SIZE, ret_state + begin);

		if (error)
			return error;
		for (size_t i = begin; i < end; i++)
			ret_state[i] = ret_state[i] ? SA_PAGE_ZERO : SA_PAGE_DATA;
	}
	return 0;
}

static void free_bytes(uint8_t **bytes)
{
	free(*bytes);
}

#define BYTES_SCOPE __attribute__((cleanup(free_bytes))) uint8_t *

static size_t piece_of(uint64_t npages)
{
	return npages < PIECE_PAGES ? (size_t)npages : PIECE_PAGES;
}

int sa_fingerprint_file(int fd, const uint8_t *key, uint64_t size, uint64_t first, uint64_t npages, uint8_t *ret_fps,
                        uint8_t *ret_state)
{
	READER_SCOPE reader = {0};
	BYTES_SCOPE buffer = NULL;
	int error = reader_init(fd, size, first, npages, &reader);

	if (error || npages == 0)
		return error;
	buffer = aligned_alloc(SA_PAGE_SIZE, piece_of(npages) * SA_PAGE_SIZE);
	if (buffer == NULL)
		return -ENOMEM;
	for (uint64_t at = 0; at < npages; at += PIECE_PAGES) {
		const size_t n = piece_of(npages - at);

		error = reader_read(&reader, first + at, n, buffer, ret_state + at);
		if (!error)
			error = fingerprint_marked(key, buffer, n, ret_fps + at * SA_FP_SIZE, ret_state + at);
		if (error)
			return error;
	}
	return 0;
}

int sa_read_pages(int fd, const uint8_t *key, uint64_t size, uint64_t first, uint64_t npages, uint8_t *ret_pages,
                  uint8_t *ret_fps, uint8_t *ret_state)
{
	READER_SCOPE reader = {0};
	int error = reader_init(fd, size, first, npages, &reader);

	if (error)
		return error;
	for (uint64_t at = 0; at < npages; at += PIECE_PAGES) {
		const size_t n = piece_of(npages - at);
		uint8_t *pages = ret_pages + at * SA_PAGE_SIZE;

		error = reader_read(&reader, first + at, n, pages, ret_state + at);
		if (error)
			return error;
		for (size_t i = 0; i < n; i++) {
			if (ret_state[at + i] == SA_PAGE_ABSENT)
				memset(pages + i * SA_PAGE_SIZE, 0, SA_PAGE_SIZE);
		}
		error = fingerprint_marked(key, pages, n, ret_fps + at * SA_FP_SIZE, ret_state + at);
		if (error)
			return error;
	}
	return 0;
}

/* --------------------------------------------------------------------------------------------------- comparing */

/* Read bytes until the file ends. */
static int read_fully(int fd, uint64_t offset, size_t want, uint8_t *ret_bytes, size_t *ret_n)
{
	*ret_n = 0;
	while (*ret_n < want) {
		const ssize_t n = pread(fd, ret_bytes + *ret_n, want - *ret_n, (off_t)(offset + *ret_n));

		if (n > 0)
			*ret_n += (size_t)n;
		else if (n == 0)
			break;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

int sa_compare_pages(int fd, uint64_t first, uint64_t npages, const uint8_t *mem, uint64_t *ret_equal)
{
	BYTES_SCOPE buffer = NULL;

	*ret_equal = 0;
	if (!range_is_valid(first, npages))
		return -EINVAL;
	if (npages == 0)
		return 0;
	buffer = aligned_alloc(SA_PAGE_SIZE, piece_of(npages) * SA_PAGE_SIZE);
	if (buffer == NULL)
		return -ENOMEM;
	for (uint64_t at = 0; at < npages; at += PIECE_PAGES) {
		const size_t n = piece_of(npages - at);
		const uint8_t *piece = mem + at * SA_PAGE_SIZE;
		size_t got;
		size_t exist;
		size_t equal = 0;
		const int error = read_fully(fd, (first + at) * SA_PAGE_SIZE, n * SA_PAGE_SIZE, buffer, &got);

		if (error)
			return error;
		/* A page past the end of the file equals nothing. */
		exist = (size_t)pages_of(got);
		memset(buffer + got, 0, exist * SA_PAGE_SIZE - got);
		if (memcmp(buffer, piece, exist * SA_PAGE_SIZE) == 0) {
			equal = exist;
		} else {
			while (equal < exist &&
			       memcmp(buffer + equal * SA_PAGE_SIZE, piece + equal * SA_PAGE_SIZE, SA_PAGE_SIZE) == 0)
				equal++;
		}
		*ret_equal += equal;
		if (equal < n)
			return 0;
	}
	return 0;
}

/* ---------------------------------------------------------------------------------------------------- dropping */

/* Resident pages of the range (npages 0: to the end), by cachestat or else by mincore. */
static int count_resident(int fd, uint64_t first, uint64_t npages, uint64_t *ret)
{
	struct residency residency = {.fd = fd, .how = SA_RESIDENCY_MINCORE};
	uint8_t in[LOOK_PAGES];
	uint64_t dirty;
	int error = sa_cachestat(fd, first, npages, ret, &dirty);

	if (error != -ENOSYS && error != -EPERM && error != -EOPNOTSUPP)
		return error;
	*ret = 0;
	if (npages == 0) {
		struct stat st;

		if (fstat(fd, &st) < 0)
			return -errno;
		npages = pages_of((uint64_t)st.st_size) > first ? pages_of((uint64_t)st.st_size) - first : 0;
	}
	for (uint64_t at = 0; at < npages; at += LOOK_PAGES) {
		const size_t n = npages - at < LOOK_PAGES ? (size_t)(npages - at) : LOOK_PAGES;

		error = residency_look(&residency, first + at, n, NULL, in);
		if (error)
			return error;
		for (size_t i = 0; i < n; i++)
			*ret += in[i];
	}
	return 0;
}

int sa_drop_pages(int fd, uint64_t first, uint64_t npages, uint64_t *ret_before, uint64_t *ret_after)
{
	uint64_t before;
	uint64_t after;
	int error_before;
	int error_after;
	int error;

	*ret_before = 0;
	*ret_after = 0;
	if (!range_is_valid(first, npages))
		return -EINVAL;
	error_before = count_resident(fd, first, npages, &before);
	error = posix_fadvise(fd, (off_t)(first * SA_PAGE_SIZE), (off_t)(npages * SA_PAGE_SIZE), POSIX_FADV_DONTNEED);
	if (error)
		return -error;
	error_after = count_resident(fd, first, npages, &after);
	if (error_before || error_after)
		return error_before ? error_before : error_after;
	*ret_before = before;
	*ret_after = after;
	return 0;
}
