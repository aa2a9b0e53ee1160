/*
 * map.c - segments of a sharing area on the local backend, and the mappings that put their slots under a file's pages.
 *
 * A segment is a sealed memfd: its creator's one mapping writes it, everybody else can only read it, and no one can
 * make it shorter, so a mapping of its slots never takes SIGBUS. Slots are numbered inside the segment. Which page gets
 * which slot, who may map it and when a segment goes is decided elsewhere; the bytes of files are pagecache.c's.
 *
 * Limit: a first touch of a slot that was never filled makes the kernel allocate its page, through a read-only mapping
 * too, so a domain that has a segment can make it as large as it is allowed to become, and no larger.
 */
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Linux UAPI, include/uapi/linux/memfd.h: since 6.3, which glibc 2.36 does not know. */
#define SA_MFD_NOEXEC_SEAL 0x0008U
#define SA_MFD_EXEC 0x0010U

/* FUTURE_WRITE and not WRITE: the latter is refused while the creator's own mapping is there. */
#define SEALS (F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)

enum { VERIFY_PAGES = 32 }; /* hashed at a time: 1 KiB of fingerprints on the stack */

/* ---------------------------------------------------------------------------------------------------- segments */

struct sa_segment {
	int fd;
	uint32_t nslots;
	bool writable;
	uint8_t *base; /* the whole file, header included; NULL: not mapped */
};

static uint64_t segment_bytes(uint32_t nslots)
{
	return SA_SEGMENT_HEADER + (uint64_t)nslots * SA_PAGE_SIZE;
}

static uint8_t *segment_slot(const sa_segment *segment, uint32_t slot)
{
	return segment->base + SA_SEGMENT_HEADER + (uint64_t)slot * SA_PAGE_SIZE;
}

static void segment_drop(sa_segment **segment)
{
	sa_segment_destroy(*segment);
}

#define SEGMENT_SCOPE __attribute__((cleanup(segment_drop))) sa_segment *

static sa_segment *segment_keep(sa_segment **segment)
{
	sa_segment *kept = *segment;

	*segment = NULL;
	return kept;
}

static sa_segment *segment_new(uint32_t nslots, bool writable)
{
	sa_segment *segment = malloc(sizeof *segment);

	if (segment)
		*segment = (sa_segment){.fd = -1, .nslots = nslots, .writable = writable};
	return segment;
}

static int segment_map(sa_segment *segment, int protection)
{
	void *base = mmap(NULL, segment_bytes(segment->nslots), protection, MAP_SHARED, segment->fd, 0);

	if (base == MAP_FAILED)
		return -errno;
	segment->base = base;
	return 0;
}

/* Executable mappings of a segment are wanted. MFD_EXEC says so since 6.3; older kernels know no such flag and mean the
 * same; where vm.memfd_noexec = 2 refuses it, MFD_NOEXEC_SEAL only takes the x bits from the file's mode, which mmap
 * does not look at (memfd_create(2)). */
static int segment_memfd(const char *name)
{
	const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
	int fd = memfd_create(name, flags | SA_MFD_EXEC);

	if (fd < 0 && errno == EINVAL)
		fd = memfd_create(name, flags);
	else if (fd < 0 && errno == EACCES)
		fd = memfd_create(name, flags | SA_MFD_NOEXEC_SEAL);
	return fd < 0 ? -errno : fd;
}

int sa_segment_create(const char *name, uint32_t nslots, sa_segment **ret)
{
	SEGMENT_SCOPE segment = NULL;
	int error;

	*ret = NULL;
	if (name == NULL || nslots == 0)
		return -EINVAL;
	segment = segment_new(nslots, true);
	if (segment == NULL)
		return -ENOMEM;
	segment->fd = segment_memfd(name);
	if (segment->fd < 0)
		return segment->fd;
	if (ftruncate(segment->fd, (off_t)segment_bytes(nslots)) < 0)
		return -errno;
	error = segment_map(segment, PROT_READ | PROT_WRITE);
	if (error)
		return error;
	if (fcntl(segment->fd, F_ADD_SEALS, SEALS) < 0)
		return -errno;
	*ret = segment_keep(&segment);
	return 0;
}

int sa_segment_adopt(int fd, uint32_t nslots, sa_segment **ret)
{
	SEGMENT_SCOPE segment = NULL;
	struct stat st;
	int seals;
	int error;

	*ret = NULL;
	if (nslots == 0)
		return -EINVAL;
	segment = segment_new(nslots, false);
	if (segment == NULL)
		return -ENOMEM;
	segment->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (segment->fd < 0)
		return -errno;
	/* EINVAL: not a memfd at all, so nothing that could carry the seals. */
	seals = fcntl(segment->fd, F_GET_SEALS);
	if (seals < 0 && errno != EINVAL)
		return -errno;
	if (seals < 0 || (seals & SEALS) != SEALS)
		return -EPERM;
	if (fstat(segment->fd, &st) < 0)
		return -errno;
	if ((uint64_t)st.st_size != segment_bytes(nslots))
		return -EINVAL;
	error = segment_map(segment, PROT_READ);
	if (error)
		return error;
	*ret = segment_keep(&segment);
	return 0;
}

void sa_segment_destroy(sa_segment *segment)
{
	if (segment == NULL)
		return;
	/* Neither can fail in a way that leaves something: a whole mapping of our own; a descriptor without writes
	 * behind it, which Linux closes whatever close(2) returns. */
	if (segment->base)
		(void)munmap(segment->base, segment_bytes(segment->nslots));
	if (segment->fd >= 0)
		(void)close(segment->fd);
	free(segment);
}

int sa_segment_fd(const sa_segment *segment)
{
	return segment->fd;
}

uint32_t sa_segment_nslots(const sa_segment *segment)
{
	return segment->nslots;
}

int sa_segment_writable(const sa_segment *segment)
{
	return segment->writable;
}

int sa_segment_identity(const sa_segment *segment, uint64_t *ret_dev, uint64_t *ret_ino)
{
	struct stat st;

	if (fstat(segment->fd, &st) < 0)
		return -errno;
	*ret_dev = st.st_dev;
	*ret_ino = st.st_ino;
	return 0;
}

int sa_segment_allocated(const sa_segment *segment, uint64_t *ret_bytes)
{
	struct stat st;

	if (fstat(segment->fd, &st) < 0)
		return -errno;
	*ret_bytes = (uint64_t)st.st_blocks * 512;
	return 0;
}

static bool segment_has(const sa_segment *segment, uint32_t first, uint32_t npages)
{
	return first <= segment->nslots && npages <= segment->nslots - first;
}

int sa_segment_fill(sa_segment *segment, const uint8_t *key, uint32_t first, uint32_t npages, const uint8_t *pages,
                    const uint8_t *want, uint8_t *ret_ok)
{
	const size_t bytes = (size_t)npages * SA_PAGE_SIZE;

	if (!segment->writable)
		return -EROFS;
	if (!segment_has(segment, first, npages))
		return -ERANGE;
	if (npages == 0)
		return 0;
	/* Allocates all of them in one call; out of memory is an error here and would be a signal in memcpy. */
	while (madvise(segment_slot(segment, first), bytes, MADV_POPULATE_WRITE) < 0) {
		if (errno != EINTR)
			return -errno;
	}
	memcpy(segment_slot(segment, first), pages, bytes);
	return sa_segment_verify(segment, key, first, npages, want, ret_ok);
}

int sa_segment_verify(const sa_segment *segment, const uint8_t *key, uint32_t first, uint32_t npages,
                      const uint8_t *want, uint8_t *ret_ok)
{
	uint8_t fps[VERIFY_PAGES * SA_FP_SIZE];

	if (!segment_has(segment, first, npages))
		return -ERANGE;
	memset(ret_ok, 0, npages);
	for (uint32_t at = 0; at < npages;) {
		const uint32_t n = npages - at < VERIFY_PAGES ? npages - at : VERIFY_PAGES;
		const int error = sa_fingerprint_pages(key, segment_slot(segment, first + at), n, fps, NULL);

		if (error)
			return error;
		for (size_t i = 0; i < n; i++, at++)
			ret_ok[at] = memcmp(fps + i * SA_FP_SIZE, want + (size_t)at * SA_FP_SIZE, SA_FP_SIZE) == 0;
	}
	return 0;
}

int sa_segment_read(const sa_segment *segment, uint32_t first, uint32_t npages, uint8_t *ret_pages)
{
	const size_t bytes = (size_t)npages * SA_PAGE_SIZE;

	if (!segment_has(segment, first, npages))
		return -ERANGE;
	/* Not through the mapping: a slot that was never filled stays without memory. */
	for (size_t done = 0; done < bytes;) {
		const uint64_t offset = SA_SEGMENT_HEADER + (uint64_t)first * SA_PAGE_SIZE + done;
		const ssize_t n = pread(segment->fd, ret_pages + done, bytes - done, (off_t)offset);

		if (n > 0)
			done += (size_t)n;
		else if (n == 0)
			return -EIO;
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

/* ---------------------------------------------------------------------------------------------------- mappings */

static bool base_is_valid(const void *base, uint64_t npages)
{
	const uintptr_t at = (uintptr_t)base;

	return at != 0 && at % SA_PAGE_SIZE == 0 && npages <= (UINTPTR_MAX - at) / SA_PAGE_SIZE;
}

/* The way back must work in a process that has used up its mappings (vm.max_map_count), where mmap refuses even what
 * would leave fewer of them (seen). So before the first run goes in, a process sets aside a few mappings, which
 * sa_map_file gives back when it is refused. Pages with rights by turns, so that they are mappings of their own: the
 * inner three whatever the neighbours are. mmap asks for room for one, a split on both sides for two. */
enum { RESERVE_PAGES = 5 };

static _Atomic(void *) reserve; /* NULL: none */

int sa_map_reserve(void)
{
	void *none = NULL;
	uint8_t *pages;

	if (atomic_load(&reserve) != NULL)
		return 0;
	pages = mmap(NULL, RESERVE_PAGES * SA_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (pages == MAP_FAILED)
		return -errno;
	if (mprotect(pages + SA_PAGE_SIZE, SA_PAGE_SIZE, PROT_READ) < 0 ||
	    mprotect(pages + (size_t)3 * SA_PAGE_SIZE, SA_PAGE_SIZE, PROT_READ) < 0) {
		const int error = -errno;

		/* Takes mappings away and splits none that is not ours. */
		(void)munmap(pages, RESERVE_PAGES * SA_PAGE_SIZE);
		return error;
	}
	/* Another thread was faster: its reserve is as good. */
	if (!atomic_compare_exchange_strong(&reserve, &none, pages) && munmap(pages, RESERVE_PAGES * SA_PAGE_SIZE) < 0)
		return -errno;
	return 0;
}

/* 1 if there is room now that was not there before. */
static bool reserve_give(void)
{
	void *pages = atomic_exchange(&reserve, NULL);

	return pages != NULL && munmap(pages, RESERVE_PAGES * SA_PAGE_SIZE) == 0;
}

int sa_check_runs(const void *base, uint64_t npages, const struct sa_run *runs, size_t nruns)
{
	if (!base_is_valid(base, npages))
		return -EINVAL;
	for (size_t i = 0; i < nruns; i++) {
		if (runs[i].count == 0)
			return -EINVAL;
		if (runs[i].page >= npages || runs[i].count > npages - runs[i].page)
			return -ERANGE;
	}
	return 0;
}

static int map_fixed(void *at, uint64_t npages, int fd, uint64_t offset)
{
	if (mmap(at, npages * SA_PAGE_SIZE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED)
		return -errno;
	return 0;
}

int sa_map_runs(void *base, uint64_t npages, int fd, const struct sa_run *runs, size_t nruns, size_t *ret_mapped)
{
	struct stat st;
	uint64_t nslots;
	int error;

	*ret_mapped = 0;
	error = sa_check_runs(base, npages, runs, nruns);
	if (error)
		return error;
	if (fstat(fd, &st) < 0)
		return -errno;
	nslots = st.st_size > SA_SEGMENT_HEADER ? (uint64_t)(st.st_size - SA_SEGMENT_HEADER) / SA_PAGE_SIZE : 0;
	for (size_t i = 0; i < nruns; i++) {
		if (runs[i].slot >= nslots || runs[i].count > nslots - runs[i].slot)
			return -ERANGE;
	}
	error = nruns ? sa_map_reserve() : 0;
	if (error)
		return error;
	for (size_t i = 0; i < nruns; i++) {
		uint8_t *at = (uint8_t *)base + (uint64_t)runs[i].page * SA_PAGE_SIZE;
		const uint64_t offset = SA_SEGMENT_HEADER + (uint64_t)runs[i].slot * SA_PAGE_SIZE;

		/* A process at its limit of mappings is refused before anything is unmapped (mm/mmap.c, do_mmap and the
		 * split of the old mapping), so what was there stays. */
		error = map_fixed(at, runs[i].count, fd, offset);
		if (error)
			return error;
		*ret_mapped = i + 1;
	}
	return 0;
}

int sa_map_file(void *base, int fd, uint64_t first, uint64_t npages, int random)
{
	uint8_t *at;
	int error;

	if (npages == 0 || first > UINT64_MAX - npages || !base_is_valid(base, first + npages))
		return -EINVAL;
	if (first + npages > (uint64_t)INT64_MAX / SA_PAGE_SIZE)
		return -EOVERFLOW;
	at = (uint8_t *)base + first * SA_PAGE_SIZE;
	error = map_fixed(at, npages, fd, first * SA_PAGE_SIZE);
	if (error == -ENOMEM && reserve_give()) {
		error = map_fixed(at, npages, fd, first * SA_PAGE_SIZE);
		/* What was freed may have made room for the next time too; if not, sa_map_runs asks again. */
		(void)sa_map_reserve();
	}
	if (error)
		return error;
	/* Advice only. It may have to split the new mapping from a neighbour and find no room for that (ENOMEM): the
	 * pages are in their place all the same, and that is what the caller must know. */
	if (random && madvise(at, npages * SA_PAGE_SIZE, MADV_RANDOM) < 0 && errno != ENOMEM && errno != EAGAIN)
		return -errno;
	return 0;
}

int sa_compare_runs(const void *base, uint64_t npages, int fd, const struct sa_run *runs, size_t nruns,
                    size_t *ret_equal_runs)
{
	int error;

	*ret_equal_runs = 0;
	error = sa_check_runs(base, npages, runs, nruns);
	if (error)
		return error;
	for (size_t i = 0; i < nruns; i++) {
		const uint8_t *at = (const uint8_t *)base + (uint64_t)runs[i].page * SA_PAGE_SIZE;
		uint64_t equal;

		error = sa_compare_pages(fd, runs[i].page, runs[i].count, at, &equal);
		if (error)
			return error;
		if (equal < runs[i].count)
			return 0;
		*ret_equal_runs = i + 1;
	}
	return 0;
}
