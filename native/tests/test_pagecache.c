/*
 * test_pagecache.c - pagecache.c on a real file system: what is resident, fingerprints without I/O, sizes that change.
 *
 * Files are made in $SA_TEST_DIR or the working folder, which must not be a tmpfs: pages there do not leave the cache.
 * One count stands for "no I/O": a page read or read ahead is in the cache as soon as the read has been started.
 */
#include "check.h"
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	PAGE = SA_PAGE_SIZE,
	NPAGES = 301, /* the last one short */
	TAIL = 1000,
	SIZE = (NPAGES - 1) * PAGE + TAIL,
	NOBODY = 65534
};

static const uint8_t key[SA_FP_SIZE] = "a key of the pool: 32 bytes long";
static uint8_t content[NPAGES * PAGE]; /* zero-padded; page 7 is a zero page */
static uint8_t content_fps[NPAGES * SA_FP_SIZE];
static const char *folder;

static void make_content(void)
{
	uint32_t x = 1;

	for (size_t i = 0; i < SIZE; i++) {
		x = x * 1664525U + 1013904223U;
		content[i] = (uint8_t)(x >> 24);
	}
	memset(content + 7 * PAGE, 0, PAGE);
	CHECK(sa_fingerprint_pages(key, content, NPAGES, content_fps, NULL) == 0);
}

/* A file with the content, read-write, already without a name, clean, nothing of it resident. */
static int make_file(void)
{
	char path[PATH_MAX];
	int fd;

	snprintf(path, sizeof path, "%s/sa_pagecache_XXXXXX", folder);
	fd = mkstemp(path);
	if (!CHECK(fd >= 0))
		exit(check_done("test_pagecache"));
	CHECK(unlink(path) == 0);
	CHECK(pwrite(fd, content, SIZE, 0) == SIZE);
	CHECK(fsync(fd) == 0);
	CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
	return fd;
}

/* The same file, opened anew: its own read-ahead state. */
static int open_again(int fd, int flags)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

/* Make single pages resident, and no others. */
static void touch_pages(int fd, const uint32_t *pages, size_t n)
{
	const int own = open_again(fd, O_RDONLY);
	uint8_t byte;

	CHECK(posix_fadvise(own, 0, 0, POSIX_FADV_RANDOM) == 0);
	for (size_t i = 0; i < n; i++)
		CHECK(pread(own, &byte, 1, (off_t)pages[i] * PAGE) == 1);
	CHECK(close(own) == 0);
}

static void touch_all(int fd)
{
	static uint8_t bytes[SIZE];

	CHECK(pread(fd, bytes, SIZE, 0) == SIZE);
	CHECK(memcmp(bytes, content, SIZE) == 0);
}

static uint64_t cached_pages(int fd)
{
	uint64_t cached = 0;
	uint64_t dirty;

	CHECK(sa_cachestat(fd, 0, 0, &cached, &dirty) == 0);
	return cached;
}

/* Checks in a process of its own, which may give up rights or die. */
static void in_child(void (*checks)(int), int fd)
{
	int status = 0;
	pid_t child;

	fflush(NULL);
	child = fork();
	if (child == 0) {
		check_failures = 0;
		checks(fd);
		fflush(NULL);
		_exit(check_failures ? 1 : 0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* --------------------------------------------------------------------------------------------------------------- */

static void test_cachestat(void)
{
	const int fd = make_file();
	uint64_t cached = 1;
	uint64_t dirty = 1;

	CHECK(sa_cachestat(fd, 0, 0, &cached, &dirty) == 0);
	CHECK(cached == 0 && dirty == 0);
	CHECK(pwrite(fd, content, 20 * PAGE, 0) == 20 * PAGE);
	CHECK(sa_cachestat(fd, 0, 0, &cached, &dirty) == 0);
	CHECK(cached == 20 && dirty == 20);
	CHECK(sa_cachestat(fd, 15, 10, &cached, &dirty) == 0);
	CHECK(cached == 5 && dirty == 5);
	CHECK(fsync(fd) == 0);
	CHECK(sa_cachestat(fd, 0, 0, &cached, &dirty) == 0);
	CHECK(cached == 20 && dirty == 0);
	CHECK(sa_cachestat(-1, 0, 0, &cached, &dirty) == -EBADF);
	CHECK(cached == 0 && dirty == 0);
	CHECK(sa_cachestat(fd, UINT64_MAX / PAGE, 2, &cached, &dirty) == -EINVAL);
	CHECK(sa_cachestat(fd, 1, UINT64_MAX, &cached, &dirty) == -EINVAL);
	CHECK(close(fd) == 0);
}

static void check_runs(int fd, uint64_t npages, const uint32_t *want, size_t nwant)
{
	static const int ways[] = {SA_RESIDENCY_AUTO, SA_RESIDENCY_CACHESTAT, SA_RESIDENCY_MINCORE};
	uint32_t runs[64];
	size_t nruns;
	uint64_t covered;

	for (size_t i = 0; i < 3; i++) {
		memset(runs, 0xff, sizeof runs);
		CHECK(sa_resident_runs(fd, npages, ways[i], runs, 32, &nruns, &covered) == 0);
		CHECK(covered == npages);
		CHECK(nruns == nwant && (nwant == 0 || memcmp(runs, want, nwant * 8) == 0));
		CHECK(runs[nwant * 2] == UINT32_MAX);
	}
}

static void test_resident_runs(void)
{
	static const uint32_t pages[] = {0, 5, 6, 64, 128, 129, 130, 300};
	static const uint32_t runs[] = {0, 1, 5, 2, 64, 1, 128, 3, 300, 1};
	static const uint32_t whole[] = {0, NPAGES};
	static const uint32_t half[] = {0, 150};
	const int fd = make_file();
	uint32_t some[8];
	size_t n;
	uint64_t covered;

	check_runs(fd, NPAGES, NULL, 0);
	check_runs(fd, 0, NULL, 0);
	touch_pages(fd, pages, 8);
	CHECK(cached_pages(fd) == 8);
	check_runs(fd, NPAGES, runs, 5);
	check_runs(fd, 130, (const uint32_t[]){0, 1, 5, 2, 64, 1, 128, 2}, 4);
	CHECK(cached_pages(fd) == 8);

	CHECK(sa_resident_runs(fd, NPAGES, SA_RESIDENCY_AUTO, some, 2, &n, &covered) == 0);
	CHECK(n == 2 && covered == 64 && memcmp(some, runs, 16) == 0);
	CHECK(sa_resident_runs(fd, NPAGES, SA_RESIDENCY_MINCORE, NULL, 0, &n, &covered) == 0);
	CHECK(n == 0 && covered == 0);
	CHECK(sa_resident_runs(fd, NPAGES, SA_RESIDENCY_AUTO, some, 4, &n, &covered) == 0);
	CHECK(n == 4 && covered == 300);

	touch_all(fd);
	check_runs(fd, NPAGES, whole, 1);
	check_runs(fd, 150, half, 1);
	CHECK(sa_resident_runs(fd, NPAGES, 3, some, 4, &n, &covered) == -EINVAL);
	CHECK(sa_resident_runs(fd, 1ULL << 32, SA_RESIDENCY_AUTO, some, 4, &n, &covered) == -EFBIG);
	CHECK(sa_resident_runs(-1, NPAGES, SA_RESIDENCY_AUTO, some, 4, &n, &covered) == -EBADF);
	CHECK(sa_resident_runs(-1, NPAGES, SA_RESIDENCY_MINCORE, some, 4, &n, &covered) == -EBADF);
	CHECK(close(fd) == 0);
}

/* A run across the edge of the bounded window (16,384 pages) is one run; holes read as pages like any other. */
static void test_resident_runs_of_a_large_file(void)
{
	static const uint32_t pages[] = {3, 16382, 16383, 16384, 16385, 32768, 39999};
	static const uint32_t runs[] = {3, 1, 16382, 4, 32768, 1, 39999, 1};
	const int fd = make_file();
	uint32_t some[4];
	size_t n;
	uint64_t covered;

	CHECK(ftruncate(fd, 0) == 0);
	CHECK(ftruncate(fd, (off_t)40000 * PAGE) == 0);
	check_runs(fd, 40000, NULL, 0);
	touch_pages(fd, pages, 7);
	CHECK(cached_pages(fd) == 7);
	check_runs(fd, 40000, runs, 4);
	CHECK(sa_resident_runs(fd, 40000, SA_RESIDENCY_AUTO, some, 2, &n, &covered) == 0);
	CHECK(n == 2 && covered == 32768);
	CHECK(cached_pages(fd) == 7);
	CHECK(close(fd) == 0);
}

/* States and fingerprints of a whole file, by both functions; resident: NPAGES bytes, or NULL for all. */
static void check_contents(int fd, const uint8_t *resident)
{
	static uint8_t fps[NPAGES * SA_FP_SIZE];
	static uint8_t fps2[NPAGES * SA_FP_SIZE];
	static uint8_t pages[NPAGES * PAGE];
	static const uint8_t none[PAGE];
	uint8_t state[NPAGES];
	uint8_t state2[NPAGES];
	size_t wrong = 0;

	memset(fps, 0xaa, sizeof fps);
	memset(pages, 0xaa, sizeof pages);
	memset(state, 0xaa, sizeof state);
	CHECK(sa_fingerprint_file(fd, key, SIZE, 0, NPAGES, fps, state) == 0);
	CHECK(sa_read_pages(fd, key, SIZE, 0, NPAGES, pages, fps2, state2) == 0);
	CHECK(memcmp(state, state2, sizeof state) == 0);
	CHECK(memcmp(fps, fps2, sizeof fps) == 0);
	for (size_t i = 0; i < NPAGES; i++) {
		const bool here = resident == NULL || resident[i];
		const uint8_t *page = here ? content + i * PAGE : none;
		const uint8_t *fp = here ? content_fps + i * SA_FP_SIZE : none;

		wrong += state[i] != (here ? (i == 7 ? SA_PAGE_ZERO : SA_PAGE_DATA) : SA_PAGE_ABSENT);
		wrong += memcmp(pages + i * PAGE, page, PAGE) != 0;
		wrong += memcmp(fps + i * SA_FP_SIZE, fp, SA_FP_SIZE) != 0;
	}
	CHECK(wrong == 0);
}

static void test_fingerprints_cause_no_io(void)
{
	static const uint32_t pages[] = {0, 5, 6, 7, 31, 32, 63, 64, 128, 129, 130, 299, 300};
	const int fd = make_file();
	const int reader = open_again(fd, O_RDONLY);
	uint8_t resident[NPAGES] = {0};

	check_contents(reader, resident);
	CHECK(cached_pages(fd) == 0);
	touch_pages(fd, pages, sizeof pages / sizeof pages[0]);
	for (size_t i = 0; i < sizeof pages / sizeof pages[0]; i++)
		resident[pages[i]] = 1;
	check_contents(reader, resident);
	CHECK(cached_pages(fd) == sizeof pages / sizeof pages[0]);
	touch_all(fd);
	check_contents(reader, NULL);
	CHECK(lseek(reader, 0, SEEK_CUR) == 0);
	CHECK(close(reader) == 0);
	CHECK(close(fd) == 0);
}

/* Pages that were read in sequence carry the mark at which the next reader starts more read-ahead. */
static void test_read_ahead_marks(void)
{
	const int fd = make_file();
	static uint8_t fps[4096 * SA_FP_SIZE];
	static uint8_t state[4096];
	uint8_t bytes[4 * PAGE];
	uint64_t before;
	size_t wrong = 0;
	int reader;

	CHECK(ftruncate(fd, 0) == 0);
	for (int i = 0; i < 14; i++)
		CHECK(pwrite(fd, content, 292 * PAGE, (off_t)i * 292 * PAGE) == 292 * PAGE);
	CHECK(fsync(fd) == 0);
	CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
	reader = open_again(fd, O_RDONLY);
	CHECK(pread(reader, bytes, sizeof bytes, 0) == sizeof bytes);
	CHECK(close(reader) == 0);
	before = cached_pages(fd);
	CHECK(before >= 4 && before < 4088);

	reader = open_again(fd, O_RDONLY);
	for (int i = 0; i < 3; i++) {
		CHECK(sa_fingerprint_file(reader, key, 4088 * PAGE, 0, 4088, fps, state) == 0);
		CHECK(cached_pages(fd) == before);
	}
	/* Its caller's own way: only what is resident. */
	CHECK(sa_fingerprint_file(reader, key, 4088 * PAGE, 0, before, fps, state) == 0);
	CHECK(cached_pages(fd) == before);
	for (size_t i = 0; i < before; i++)
		wrong += state[i] == SA_PAGE_ABSENT ||
		         memcmp(fps + i * SA_FP_SIZE, content_fps + i % 292 * SA_FP_SIZE, SA_FP_SIZE) != 0;
	CHECK(wrong == 0);
	CHECK(close(reader) == 0);
	CHECK(close(fd) == 0);
}

static uint8_t last_state(int fd, uint64_t size, uint64_t page)
{
	uint8_t fp[SA_FP_SIZE];
	uint8_t state = 0xaa;

	CHECK(sa_fingerprint_file(fd, key, size, page, 1, fp, &state) == 0);
	return state;
}

static void test_sizes(void)
{
	const int fd = make_file();
	uint8_t fps[4 * SA_FP_SIZE];
	uint8_t state[4];
	uint8_t *map;

	touch_all(fd);
	for (int partly = 0; partly < 2; partly++) {
		if (partly)
			CHECK(posix_fadvise(fd, 0, 100 * PAGE, POSIX_FADV_DONTNEED) == 0);
		CHECK((cached_pages(fd) < NPAGES) == partly);
		CHECK(last_state(fd, SIZE, 300) == SA_PAGE_DATA);
		CHECK(last_state(fd, SIZE, 299) == SA_PAGE_DATA);
		/* The caller knows another size: the short page is not the same page. */
		CHECK(last_state(fd, SIZE - 1, 300) == SA_PAGE_ABSENT);
		CHECK(last_state(fd, SIZE + 1, 300) == SA_PAGE_ABSENT);
		CHECK(last_state(fd, SIZE - TAIL, 299) == SA_PAGE_DATA);
		CHECK(last_state(fd, SIZE - TAIL - 1, 299) == SA_PAGE_ABSENT);
		CHECK(last_state(fd, 301 * PAGE, 300) == SA_PAGE_ABSENT);
		CHECK(last_state(fd, 301 * PAGE, 299) == SA_PAGE_DATA);
		CHECK(last_state(fd, 400 * PAGE, 350) == SA_PAGE_ABSENT);
		CHECK(last_state(fd, SIZE, 350) == SA_PAGE_ABSENT);
		CHECK(sa_fingerprint_file(fd, key, SIZE, 299, 4, fps, state) == 0);
		CHECK(memcmp(state, (uint8_t[]){1, 1, 0, 0}, 4) == 0);
		CHECK(memcmp(fps, content_fps + (size_t)299 * SA_FP_SIZE, 2 * SA_FP_SIZE) == 0);
	}

	/* Bytes behind the end, which only a mapping can write, are not the file's. */
	map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)300 * PAGE);
	CHECK(map != MAP_FAILED);
	map[TAIL] = 1;
	map[PAGE - 1] = 1;
	CHECK(sa_fingerprint_file(fd, key, SIZE, 299, 4, fps, state) == 0);
	CHECK(memcmp(fps, content_fps + (size_t)299 * SA_FP_SIZE, 2 * SA_FP_SIZE) == 0);
	CHECK(munmap(map, PAGE) == 0);

	CHECK(ftruncate(fd, 300 * PAGE + 10) == 0);
	CHECK(last_state(fd, SIZE, 300) == SA_PAGE_ABSENT);
	CHECK(last_state(fd, SIZE, 299) == SA_PAGE_DATA);
	CHECK(ftruncate(fd, 0) == 0);
	CHECK(last_state(fd, SIZE, 299) == SA_PAGE_ABSENT);
	CHECK(last_state(fd, 0, 0) == SA_PAGE_ABSENT);
	CHECK(sa_fingerprint_file(fd, key, SIZE, 0, 0, NULL, NULL) == 0);
	CHECK(sa_fingerprint_file(fd, key, SIZE, UINT64_MAX / PAGE, 3, fps, state) == -EINVAL);
	CHECK(sa_fingerprint_file(-1, key, SIZE, 0, 1, fps, state) == -EBADF);
	CHECK(close(fd) == 0);
}

static void test_not_a_regular_file(void)
{
	uint8_t fp[SA_FP_SIZE];
	uint8_t state;
	int ends[2];
	const int dir = open(folder, O_RDONLY | O_DIRECTORY);

	CHECK(dir >= 0 && pipe(ends) == 0);
	CHECK(sa_fingerprint_file(dir, key, 4096, 0, 1, fp, &state) == -EINVAL);
	CHECK(sa_fingerprint_file(ends[0], key, 4096, 0, 1, fp, &state) == -EINVAL);
	CHECK(close(dir) == 0 && close(ends[0]) == 0 && close(ends[1]) == 0);
}

static void test_compare(void)
{
	const int fd = make_file();
	uint8_t *copy = malloc(sizeof content + PAGE);
	uint64_t equal;

	if (!CHECK(copy != NULL))
		return;
	memcpy(copy, content, sizeof content);
	memset(copy + sizeof content, 0, PAGE);
	CHECK(sa_compare_pages(fd, 0, NPAGES, copy, &equal) == 0);
	CHECK(equal == NPAGES);
	CHECK(sa_compare_pages(fd, 200, 101, copy + 200 * PAGE, &equal) == 0);
	CHECK(equal == 101);
	/* A page past the end of the file equals nothing, not even zeros. */
	CHECK(sa_compare_pages(fd, 0, NPAGES + 1, copy, &equal) == 0);
	CHECK(equal == NPAGES);
	CHECK(sa_compare_pages(fd, NPAGES, 1, copy + sizeof content, &equal) == 0);
	CHECK(equal == 0);
	for (size_t page = 0; page < NPAGES; page += 25) {
		copy[page * PAGE + PAGE - 1] ^= 1;
		CHECK(sa_compare_pages(fd, 0, NPAGES, copy, &equal) == 0);
		CHECK(equal == page);
		copy[page * PAGE + PAGE - 1] ^= 1;
	}
	CHECK(sa_compare_pages(fd, 0, 0, copy, &equal) == 0 && equal == 0);
	CHECK(sa_compare_pages(-1, 0, 1, copy, &equal) == -EBADF && equal == 0);
	CHECK(sa_compare_pages(fd, UINT64_MAX, 1, copy, &equal) == -EINVAL);
	CHECK(ftruncate(fd, 40 * PAGE) == 0);
	CHECK(sa_compare_pages(fd, 0, NPAGES, copy, &equal) == 0);
	CHECK(equal == 40);
	free(copy);
	CHECK(close(fd) == 0);
}

static void test_drop(void)
{
	static const uint32_t pages[] = {0, 1, 2, 3, 50, 51, 52, 300};
	const int fd = make_file();
	uint64_t before;
	uint64_t after;
	volatile const uint8_t *map;
	uint8_t byte;

	touch_pages(fd, pages, 8);
	CHECK(sa_drop_pages(fd, 0, 50, &before, &after) == 0);
	CHECK(before == 4 && after == 0);
	CHECK(cached_pages(fd) == 4);
	CHECK(sa_drop_pages(fd, 51, 0, &before, &after) == 0);
	CHECK(before == 3 && after == 0);
	CHECK(sa_drop_pages(fd, 0, 0, &before, &after) == 0);
	CHECK(before == 1 && after == 0);

	/* What somebody maps stays, and is not reported as gone. */
	touch_pages(fd, pages, 8);
	map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, (off_t)2 * PAGE);
	CHECK(map != MAP_FAILED && map[0] == content[2 * PAGE]);
	CHECK(sa_drop_pages(fd, 0, 0, &before, &after) == 0);
	CHECK(before == 8 && after == 1);
	CHECK(munmap((void *)(uintptr_t)map, PAGE) == 0);

	/* Dirty pages are never lost. The kernel starts writing them; how many stay until it is done is its affair. */
	CHECK(sa_drop_pages(fd, 0, 0, &before, &after) == 0);
	CHECK(pwrite(fd, "dirty", 5, (off_t)9 * PAGE) == 5);
	CHECK(sa_drop_pages(fd, 0, 0, &before, &after) == 0);
	CHECK(before == 1 && after == cached_pages(fd));
	CHECK(pread(fd, &byte, 1, (off_t)9 * PAGE) == 1 && byte == 'd');

	CHECK(sa_drop_pages(-1, 0, 0, &before, &after) == -EBADF);
	CHECK(sa_drop_pages(fd, UINT64_MAX, 1, &before, &after) == -EINVAL);
	CHECK(close(fd) == 0);
}

/* Pages of a file system that never writes them out are dirty for ever, so all of them stay. */
static void test_drop_dirty(void)
{
	const int fd = memfd_create("dirty", MFD_CLOEXEC);
	uint64_t before;
	uint64_t after;

	CHECK(fd >= 0 && pwrite(fd, content, 10 * PAGE, 0) == 10 * PAGE);
	CHECK(sa_drop_pages(fd, 0, 0, &before, &after) == 0);
	CHECK(before == 10 && after == 10);
	CHECK(close(fd) == 0);
}

/* ------------------------------------------------------------------------------------- what the kernel hides */

static void checks_as_nobody(int fd)
{
	uint32_t runs[4];
	uint8_t fps[4 * SA_FP_SIZE];
	uint8_t state[4];
	size_t n;
	uint64_t covered;

	if (geteuid() == 0)
		CHECK(setresgid(NOBODY, NOBODY, NOBODY) == 0 && setresuid(NOBODY, NOBODY, NOBODY) == 0);
	CHECK(sa_resident_runs(fd, 4, SA_RESIDENCY_MINCORE, runs, 2, &n, &covered) == -EPERM);
	CHECK(n == 0);
	/* cachestat(2) asks for rights since 6.14; until then it answers. */
	CHECK(sa_resident_runs(fd, 4, SA_RESIDENCY_AUTO, runs, 2, &n, &covered) == -EPERM || n == 1);
	/* All four are resident, the caller says; where RWF_NOWAIT is not supported (tmpfs), plain reads. */
	CHECK(sa_fingerprint_file(fd, key, 4 * PAGE, 0, 4, fps, state) == 0);
	CHECK(memcmp(state, (uint8_t[]){1, 1, 1, 1}, 4) == 0);
	CHECK(memcmp(fps, content_fps, sizeof fps) == 0);
}

/* As before, but page 1 is not resident: it costs the others nothing. The read of it is started, and may be over. */
static void checks_as_nobody_with_a_hole(int fd)
{
	uint8_t fps[4 * SA_FP_SIZE];
	uint8_t state[4];

	CHECK(setresgid(NOBODY, NOBODY, NOBODY) == 0 && setresuid(NOBODY, NOBODY, NOBODY) == 0);
	CHECK(sa_fingerprint_file(fd, key, 4 * PAGE, 0, 4, fps, state) == 0);
	CHECK(state[0] == SA_PAGE_DATA && state[2] == SA_PAGE_DATA && state[3] == SA_PAGE_DATA);
	for (size_t i = 0; i < 4; i++)
		CHECK(state[i] == SA_PAGE_ABSENT ||
		      memcmp(fps + i * SA_FP_SIZE, content_fps + i * SA_FP_SIZE, SA_FP_SIZE) == 0);
}

static void test_not_ours_to_ask(void)
{
	const int fd = make_file();
	const int memory = memfd_create("not ours", MFD_CLOEXEC);
	int readers[2];

	if (geteuid() != 0) {
		fprintf(stderr, "test_pagecache: not root: files of another owner are not tested\n");
		CHECK(close(fd) == 0 && close(memory) == 0);
		return;
	}
	CHECK(ftruncate(fd, 4 * PAGE) == 0 && pwrite(fd, content, 4 * PAGE, 0) == 4 * PAGE);
	CHECK(pwrite(memory, content, 4 * PAGE, 0) == 4 * PAGE);
	CHECK(fchmod(fd, 0644) == 0 && fchmod(memory, 0644) == 0);
	readers[0] = open_again(fd, O_RDONLY);
	readers[1] = open_again(memory, O_RDONLY);
	for (size_t i = 0; i < 2; i++) {
		in_child(checks_as_nobody, readers[i]);
		CHECK(close(readers[i]) == 0);
	}
	CHECK(fsync(fd) == 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
	touch_pages(fd, (const uint32_t[]){0, 2, 3}, 3);
	readers[0] = open_again(fd, O_RDONLY);
	in_child(checks_as_nobody_with_a_hole, readers[0]);
	CHECK(close(readers[0]) == 0);
	CHECK(close(fd) == 0 && close(memory) == 0);
}

/* overlayfs: cachestat(2) sees nothing of its files, and reads know no RWF_NOWAIT. */
static void checks_on_overlay(int unused)
{
	static const uint32_t pages[] = {2, 3, 200};
	static const uint32_t runs[] = {2, 2, 200, 1};
	uint8_t resident[NPAGES] = {0};
	uint32_t got[8];
	char base[PATH_MAX];
	char path[PATH_MAX + 16];
	char options[3 * PATH_MAX + 64];
	size_t n;
	uint64_t covered;
	uint64_t before;
	uint64_t after;
	int fd;

	(void)unused;
	snprintf(base, sizeof base, "%s/sa_overlay_XXXXXX", folder);
	CHECK(mkdtemp(base) != NULL);
	for (const char *const *name = (const char *const[]){"lower", "upper", "work", "merged", NULL}; *name; name++) {
		snprintf(path, sizeof path, "%s/%s", base, *name);
		CHECK(mkdir(path, 0755) == 0);
	}
	snprintf(path, sizeof path, "%s/lower/file", base);
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	CHECK(pwrite(fd, content, SIZE, 0) == SIZE && fsync(fd) == 0);
	CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
	snprintf(options, sizeof options, "lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", base, base, base);
	snprintf(path, sizeof path, "%s/merged", base);
	if (unshare(geteuid() == 0 ? CLONE_NEWNS : CLONE_NEWUSER | CLONE_NEWNS) < 0 ||
	    mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || mount("sa", path, "overlay", 0, options) < 0) {
		fprintf(stderr, "test_pagecache: no right to mount: overlayfs is not tested\n");
	} else {
		snprintf(path, sizeof path, "%s/merged/file", base);
		CHECK(close(fd) == 0);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		CHECK(sa_cachestat(fd, 0, 0, &before, &after) == -EOPNOTSUPP);
		CHECK(sa_drop_pages(fd, 0, 0, &before, &after) == 0 && after == 0);
		touch_pages(fd, pages, 3);
		CHECK(sa_resident_runs(fd, NPAGES, SA_RESIDENCY_AUTO, got, 4, &n, &covered) == 0);
		CHECK(n == 2 && covered == NPAGES && memcmp(got, runs, sizeof runs) == 0);
		resident[2] = resident[3] = resident[200] = 1;
		check_contents(fd, resident);
		CHECK(sa_drop_pages(fd, 3, 0, &before, &after) == 0);
		CHECK(before == 2 && after == 0);
		touch_all(fd);
		check_contents(fd, NULL);
		CHECK(sa_drop_pages(fd, 0, 0, &before, &after) == 0);
		CHECK(before == NPAGES && after == 0);
		snprintf(path, sizeof path, "%s/merged", base);
		CHECK(umount2(path, MNT_DETACH) == 0);
	}
	CHECK(close(fd) == 0);
	for (const char *const *name =
	             (const char *const[]){"lower/file", "lower", "upper", "work/work", "work", "merged", "", NULL};
	     *name; name++) {
		snprintf(path, sizeof path, "%s/%s", base, *name);
		CHECK(remove(path) == 0 || errno == ENOENT);
	}
}

/* --------------------------------------------------------------------------------------- a file that shrinks */

struct shrinking {
	int fd;
	atomic_bool stop;
};

static void *shrink_and_grow(void *argument)
{
	struct shrinking *shrinking = argument;

	while (!atomic_load(&shrinking->stop)) {
		if (ftruncate(shrinking->fd, 10 * PAGE + 100) < 0 || ftruncate(shrinking->fd, SIZE) < 0)
			return shrinking;
	}
	return NULL;
}

/* No signal; what never changes is always right; what changes is one of its two contents, never a mixture. */
static void test_shrinking_file(void)
{
	struct shrinking shrinking = {.fd = make_file()};
	static uint8_t fps[NPAGES * SA_FP_SIZE];
	uint8_t state[NPAGES];
	uint8_t page[PAGE] = {0};
	uint8_t cut[SA_FP_SIZE];
	size_t wrong = 0;
	uint64_t equal;
	pthread_t thread;
	void *failed = NULL;

	memcpy(page, content + 10 * PAGE, 100);
	CHECK(sa_fingerprint_pages(key, page, 1, cut, NULL) == 0);
	touch_all(shrinking.fd);
	CHECK(pthread_create(&thread, NULL, shrink_and_grow, &shrinking) == 0);
	for (int i = 0; i < 2000; i++) {
		CHECK(sa_fingerprint_file(shrinking.fd, key, SIZE, 0, NPAGES, fps, state) == 0);
		CHECK(sa_compare_pages(shrinking.fd, 0, NPAGES, content, &equal) == 0);
		wrong += equal < 10;
		wrong += memcmp(fps, content_fps, (size_t)10 * SA_FP_SIZE) != 0;
		for (size_t p = 10; p < NPAGES; p++) {
			const uint8_t *fp = fps + p * SA_FP_SIZE;

			if (state[p] == SA_PAGE_DATA)
				wrong += memcmp(fp, content_fps + p * SA_FP_SIZE, SA_FP_SIZE) != 0 &&
				         (p != 10 || memcmp(fp, cut, SA_FP_SIZE) != 0);
		}
	}
	atomic_store(&shrinking.stop, true);
	CHECK(pthread_join(thread, &failed) == 0 && failed == NULL);
	CHECK(wrong == 0);
	CHECK(close(shrinking.fd) == 0);
}

struct cutting {
	int fd;
	atomic_uint round; /* cut when it changes */
	atomic_uint done;
	unsigned rounds;
};

static void *cut_once_a_round(void *argument)
{
	struct cutting *cutting = argument;

	for (unsigned round = 1; round <= cutting->rounds; round++) {
		while (atomic_load(&cutting->round) < round)
			sched_yield();
		if (ftruncate(cutting->fd, 10 * PAGE + 100) < 0)
			return cutting;
		atomic_store(&cutting->done, round);
	}
	return NULL;
}

/* A page that was cut while it was read is absent: a page of the old file that ends in zeros never existed. */
static void test_cut_while_read(void)
{
	struct cutting cutting = {.fd = make_file(), .rounds = 400};
	uint8_t fps[32 * SA_FP_SIZE];
	uint8_t state[32];
	size_t wrong = 0;
	pthread_t thread;
	void *failed = NULL;

	CHECK(pthread_create(&thread, NULL, cut_once_a_round, &cutting) == 0);
	for (unsigned round = 1; round <= cutting.rounds; round++) {
		CHECK(pwrite(cutting.fd, content, SIZE, 0) == SIZE);
		atomic_store(&cutting.round, round);
		do {
			wrong += sa_fingerprint_file(cutting.fd, key, SIZE, 0, 32, fps, state) != 0;
			for (size_t p = 0; p < 32; p++)
				wrong += state[p] != SA_PAGE_ABSENT &&
				         memcmp(fps + p * SA_FP_SIZE, content_fps + p * SA_FP_SIZE, SA_FP_SIZE) != 0;
		} while (atomic_load(&cutting.done) < round);
	}
	CHECK(pthread_join(thread, &failed) == 0 && failed == NULL);
	CHECK(wrong == 0);
	CHECK(close(cutting.fd) == 0);
}

int main(void)
{
	struct statfs fs;

	folder = getenv("SA_TEST_DIR");
	if (folder == NULL)
		folder = ".";
	if (statfs(folder, &fs) < 0 || fs.f_type == 0x01021994) {
		fprintf(stderr, "test_pagecache: %s is no use: set SA_TEST_DIR to a folder on a disk, not tmpfs\n",
		        folder);
		return 1;
	}
	make_content();
	test_cachestat();
	test_resident_runs();
	test_resident_runs_of_a_large_file();
	test_fingerprints_cause_no_io();
	test_read_ahead_marks();
	test_sizes();
	test_not_a_regular_file();
	test_compare();
	test_drop();
	test_drop_dirty();
	test_not_ours_to_ask();
	in_child(checks_on_overlay, -1);
	test_shrinking_file();
	test_cut_while_read();
	return check_done("test_pagecache");
}
