/*
 * test_map.c - map.c on the real kernel: what a sealed segment refuses, and mappings that change under a reader.
 *
 * Files are made in $SA_TEST_DIR or the working folder.
 */
#include "check.h"
#include "sa.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = SA_PAGE_SIZE, NPAGES = 64, NSLOTS = 512 };

static const uint8_t key[SA_FP_SIZE] = "a key of the pool: 32 bytes long";
static uint8_t content[NPAGES * PAGE];
static uint8_t content_fps[NPAGES * SA_FP_SIZE];

static void make_content(void)
{
	uint32_t x = 1;

	for (size_t i = 0; i < sizeof content; i++) {
		x = x * 1664525U + 1013904223U;
		content[i] = (uint8_t)(x >> 24);
	}
	CHECK(sa_fingerprint_pages(key, content, NPAGES, content_fps, NULL) == 0);
}

static int make_file(void)
{
	const char *folder = getenv("SA_TEST_DIR");
	char path[PATH_MAX];
	int fd;

	snprintf(path, sizeof path, "%s/sa_map_XXXXXX", folder ? folder : ".");
	fd = mkstemp(path);
	if (!CHECK(fd >= 0))
		exit(check_done("test_map"));
	CHECK(unlink(path) == 0);
	CHECK(pwrite(fd, content, sizeof content, 0) == sizeof content);
	return fd;
}

/* A segment with the content in slots [100, 164). */
static sa_segment *make_segment(void)
{
	sa_segment *segment = NULL;
	uint8_t ok[NPAGES] = {0};

	if (!CHECK(sa_segment_create("test", NSLOTS, &segment) == 0))
		exit(check_done("test_map"));
	CHECK(sa_segment_fill(segment, key, 100, NPAGES, content, content_fps, ok) == 0);
	CHECK(memchr(ok, 0, NPAGES) == NULL);
	return segment;
}

static uint8_t *map_whole_file(int fd)
{
	void *base = mmap(NULL, sizeof content, PROT_READ, MAP_SHARED, fd, 0);

	if (!CHECK(base != MAP_FAILED))
		exit(check_done("test_map"));
	return base;
}

static size_t open_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	size_t n = 0;

	CHECK(dir != NULL);
	while (readdir(dir))
		n++;
	CHECK(closedir(dir) == 0);
	return n;
}

/* What /proc/self/maps says of the mapping at: its rights, and whether field is in its VmFlags. */
static bool mapping_has(const void *at, const char *rights, const char *flag)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	char line[4096];
	char want[64];
	bool found = false;

	CHECK(smaps != NULL);
	snprintf(want, sizeof want, "%lx-", (unsigned long)(uintptr_t)at);
	while (fgets(line, sizeof line, smaps)) {
		if (!found && strncmp(line, want, strlen(want)) == 0) {
			found = true;
			if (strncmp(strchr(line, ' ') + 1, rights, strlen(rights)) != 0)
				break;
		} else if (found && strncmp(line, "VmFlags:", 8) == 0) {
			const bool has = strstr(line, flag) != NULL;

			CHECK(fclose(smaps) == 0);
			return has;
		}
	}
	CHECK(fclose(smaps) == 0);
	return false;
}

/* ----------------------------------------------------------------------------------------------------- segments */

static void test_segment(void)
{
	const size_t descriptors = open_descriptors();
	sa_segment *segment = make_segment();
	sa_segment *adopted = NULL;
	uint8_t pages[3 * PAGE];
	uint8_t ok[NPAGES];
	uint64_t dev[2];
	uint64_t ino[2];
	uint64_t bytes;
	uint64_t more;

	CHECK(sa_segment_nslots(segment) == NSLOTS && sa_segment_writable(segment) == 1);
	CHECK(sa_segment_adopt(sa_segment_fd(segment), NSLOTS, &adopted) == 0);
	CHECK(sa_segment_nslots(adopted) == NSLOTS && sa_segment_writable(adopted) == 0);
	CHECK(sa_segment_fd(adopted) != sa_segment_fd(segment));
	CHECK(sa_segment_identity(segment, &dev[0], &ino[0]) == 0);
	CHECK(sa_segment_identity(adopted, &dev[1], &ino[1]) == 0);
	CHECK(dev[0] == dev[1] && ino[0] == ino[1]);

	CHECK(sa_segment_allocated(segment, &bytes) == 0 && bytes >= sizeof content);
	CHECK(sa_segment_fill(segment, key, NSLOTS - 1, 1, content, content_fps, ok) == 0 && ok[0] == 1);
	CHECK(sa_segment_allocated(segment, &more) == 0 && more >= bytes);
	/* Reading slots that were never filled gives zeros, and takes no memory. */
	CHECK(sa_segment_read(segment, 0, 3, pages) == 0);
	CHECK(pages[0] == 0 && memcmp(pages, pages + 1, sizeof pages - 1) == 0);
	CHECK(sa_segment_allocated(segment, &bytes) == 0 && bytes == more);

	CHECK(sa_segment_read(adopted, 102, 3, pages) == 0 && memcmp(pages, content + 2 * PAGE, sizeof pages) == 0);
	CHECK(sa_segment_read(adopted, NSLOTS - 1, 1, pages) == 0 && memcmp(pages, content, PAGE) == 0);
	CHECK(sa_segment_verify(adopted, key, 100, NPAGES, content_fps, ok) == 0 && memchr(ok, 0, NPAGES) == NULL);
	CHECK(sa_segment_verify(adopted, key, 101, NPAGES - 1, content_fps, ok) == 0);
	CHECK(memchr(ok, 1, NPAGES - 1) == NULL);

	/* Bounds; what is adopted is read only. */
	CHECK(sa_segment_fill(adopted, key, 0, 1, content, content_fps, ok) == -EROFS);
	CHECK(sa_segment_fill(segment, key, NSLOTS, 1, content, content_fps, ok) == -ERANGE);
	CHECK(sa_segment_fill(segment, key, NSLOTS - 1, 2, content, content_fps, ok) == -ERANGE);
	CHECK(sa_segment_fill(segment, key, 1, UINT32_MAX, content, content_fps, ok) == -ERANGE);
	CHECK(sa_segment_verify(segment, key, UINT32_MAX, 2, content_fps, ok) == -ERANGE);
	CHECK(sa_segment_read(segment, NSLOTS, 1, pages) == -ERANGE);
	CHECK(sa_segment_fill(segment, key, NSLOTS, 0, content, content_fps, ok) == 0);

	sa_segment_destroy(adopted);
	sa_segment_destroy(segment);
	sa_segment_destroy(NULL);
	CHECK(open_descriptors() == descriptors);
}

/* The copy is hashed, page by page: a wrong fingerprint is told from right ones around it. */
static void test_fill_tells_a_mismatch(void)
{
	sa_segment *segment = make_segment();
	uint8_t pages[NPAGES * PAGE];
	uint8_t ok[NPAGES];
	size_t bad = 0;

	memcpy(pages, content, sizeof pages);
	pages[0] ^= 1;
	pages[33 * PAGE + PAGE - 1] ^= 128;
	CHECK(sa_segment_fill(segment, key, 200, NPAGES, pages, content_fps, ok) == 0);
	for (size_t i = 0; i < NPAGES; i++)
		bad += ok[i] != (i != 0 && i != 33);
	CHECK(bad == 0);
	sa_segment_destroy(segment);
}

static void check_never_writable(int fd)
{
	char path[64];
	void *map;
	int again;

	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EPERM);
	map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(map != MAP_FAILED && mprotect(map, PAGE, PROT_READ | PROT_WRITE) < 0 && errno == EACCES);
	CHECK(munmap(map, PAGE) == 0);
	map = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, SA_SEGMENT_HEADER);
	CHECK(map != MAP_FAILED && munmap(map, PAGE) == 0);
	CHECK(pwrite(fd, "x", 1, SA_SEGMENT_HEADER) < 0 && errno == EPERM);
	CHECK(ftruncate(fd, PAGE) < 0 && errno == EPERM);
	CHECK(ftruncate(fd, (off_t)1 << 30) < 0 && errno == EPERM);
	CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, SA_SEGMENT_HEADER, PAGE) < 0 && errno == EPERM);
	CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) < 0 && errno == EPERM);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	again = open(path, O_RDWR | O_CLOEXEC);
	if (again >= 0) {
		CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, again, 0) == MAP_FAILED && errno == EPERM);
		CHECK(pwrite(again, "x", 1, SA_SEGMENT_HEADER) < 0 && errno == EPERM);
		CHECK(close(again) == 0);
	}
	again = open(path, O_RDONLY | O_TRUNC | O_CLOEXEC);
	CHECK(again < 0);
}

static void test_seals(void)
{
	sa_segment *segment = make_segment();
	sa_segment *adopted = NULL;
	uint8_t ok[NPAGES];

	CHECK(sa_segment_adopt(sa_segment_fd(segment), NSLOTS, &adopted) == 0);
	check_never_writable(sa_segment_fd(segment));
	check_never_writable(sa_segment_fd(adopted));
	CHECK(sa_segment_verify(segment, key, 100, NPAGES, content_fps, ok) == 0 && memchr(ok, 0, NPAGES) == NULL);
	/* Its creator can still fill it. */
	CHECK(sa_segment_fill(segment, key, 300, NPAGES, content, content_fps, ok) == 0);
	CHECK(memchr(ok, 0, NPAGES) == NULL);
	sa_segment_destroy(adopted);
	sa_segment_destroy(segment);
}

static void test_refused_segments(void)
{
	static const int seals[] = {0, F_SEAL_FUTURE_WRITE, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL,
	                            F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK,
	                            F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SEAL};
	const size_t descriptors = open_descriptors();
	sa_segment *segment = make_segment();
	sa_segment *refused = segment;
	const int file = make_file();
	char name[300];

	CHECK(sa_segment_adopt(sa_segment_fd(segment), NSLOTS - 1, &refused) == -EINVAL && refused == NULL);
	CHECK(sa_segment_adopt(sa_segment_fd(segment), NSLOTS + 1, &refused) == -EINVAL);
	CHECK(sa_segment_adopt(sa_segment_fd(segment), 0, &refused) == -EINVAL);
	CHECK(sa_segment_adopt(-1, NSLOTS, &refused) == -EBADF);
	CHECK(sa_segment_adopt(file, NSLOTS, &refused) == -EPERM);
	for (size_t i = 0; i < sizeof seals / sizeof seals[0]; i++) {
		const int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);

		CHECK(ftruncate(fd, SA_SEGMENT_HEADER + NSLOTS * PAGE) == 0 && fcntl(fd, F_ADD_SEALS, seals[i]) == 0);
		CHECK(sa_segment_adopt(fd, NSLOTS, &refused) == -EPERM && refused == NULL);
		CHECK(close(fd) == 0);
	}
	CHECK(sa_segment_create("none", 0, &refused) == -EINVAL && refused == NULL);
	CHECK(sa_segment_create(NULL, 1, &refused) == -EINVAL);
	memset(name, 'x', sizeof name);
	name[sizeof name - 1] = 0;
	refused = segment;
	CHECK(sa_segment_create(name, 1, &refused) == -EINVAL && refused == NULL);
	CHECK(close(file) == 0);
	sa_segment_destroy(segment);
	CHECK(open_descriptors() == descriptors);
}

/* ----------------------------------------------------------------------------------------------------- mappings */

static void test_map_runs(void)
{
	static const struct sa_run runs[] = {{0, 100, 1}, {5, 105, 10}, {40, 140, 24}};
	sa_segment *segment = make_segment();
	const int file = make_file();
	const int reader = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	uint8_t *base = map_whole_file(file);
	const int fd = sa_segment_fd(segment);
	size_t mapped;
	size_t equal;

	CHECK(sa_map_runs(base, NPAGES, fd, runs, 3, &mapped) == 0 && mapped == 3);
	CHECK(memcmp(base, content, sizeof content) == 0);
	CHECK(sa_compare_runs(base, NPAGES, file, runs, 3, &equal) == 0 && equal == 3);
	/* Read only for good: never writable, never executable. */
	CHECK(mapping_has(base + 5 * PAGE, "r--s", " mr "));
	CHECK(mprotect(base + 5 * PAGE, PAGE, PROT_READ | PROT_WRITE) < 0 && errno == EACCES);
	/* The slots do not care what becomes of the file: no fault where the file has no page any more. */
	CHECK(ftruncate(file, 6 * PAGE) == 0);
	CHECK(memcmp(base + 5 * PAGE, content + 5 * PAGE, 10 * PAGE) == 0);
	CHECK(memcmp(base + 40 * PAGE, content + 40 * PAGE, 24 * PAGE) == 0);
	CHECK(sa_compare_runs(base, NPAGES, file, runs, 3, &equal) == 0 && equal == 1);
	CHECK(pwrite(file, content, sizeof content, 0) == sizeof content);

	/* And back. */
	CHECK(sa_map_file(base, file, 5, 10, 0) == 0);
	CHECK(memcmp(base, content, sizeof content) == 0);
	CHECK(sa_map_file(base, file, 0, NPAGES, 1) == 0);
	CHECK(mapping_has(base, "r--s", " rr"));
	CHECK(sa_map_file(base, file, 0, NPAGES, 0) == 0);
	CHECK(mapping_has(base, "r--s", " mr") && !mapping_has(base, "r--s", " rr"));
	CHECK(memcmp(base, content, sizeof content) == 0);
	CHECK(pwrite(file, "changed", 7, 50 * PAGE) == 7 && memcmp(base + 50 * PAGE, "changed", 7) == 0);

	CHECK(sa_map_runs(base, NPAGES, fd, runs, 3, &mapped) == 0 && mapped == 3);
	CHECK(memcmp(base, content, sizeof content) == 0);
	CHECK(sa_compare_runs(base, NPAGES, file, runs, 3, &equal) == 0 && equal == 2);
	CHECK(sa_map_runs(base, NPAGES, reader, runs, 0, &mapped) == 0 && mapped == 0);
	CHECK(munmap(base, sizeof content) == 0);
	CHECK(close(file) == 0 && close(reader) == 0);
	sa_segment_destroy(segment);
}

static void test_refused_runs(void)
{
	static const struct {
		struct sa_run run;
		int error;
	} wrong[] = {
		{{NPAGES, 0, 1}, -ERANGE},     {{NPAGES - 1, 0, 2}, -ERANGE},
		{{UINT32_MAX, 0, 1}, -ERANGE}, {{UINT32_MAX, 0, UINT32_MAX}, -ERANGE},
		{{1, 0, UINT32_MAX}, -ERANGE}, {{0, NSLOTS, 1}, -ERANGE},
		{{0, NSLOTS - 1, 2}, -ERANGE}, {{0, UINT32_MAX, 2}, -ERANGE},
		{{0, 0, 0}, -EINVAL},
	};
	sa_segment *segment = make_segment();
	const int file = make_file();
	const int fd = sa_segment_fd(segment);
	uint8_t *base = map_whole_file(file);
	size_t n = 9;

	/* The file is told from the segment by what it holds. */
	CHECK(pwrite(file, "file", 4, 0) == 4);
	for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
		const struct sa_run runs[] = {{0, 100, 1}, wrong[i].run};

		CHECK(sa_map_runs(base, NPAGES, fd, runs, 2, &n) == wrong[i].error && n == 0);
		CHECK(memcmp(base, "file", 4) == 0);
		if (wrong[i].run.slot == 0)
			CHECK(sa_compare_runs(base, NPAGES, file, &wrong[i].run, 1, &n) == wrong[i].error && n == 0);
	}
	CHECK(sa_map_runs(base + 1, NPAGES, fd, &(struct sa_run){0, 100, 1}, 1, &n) == -EINVAL);
	CHECK(sa_map_runs(NULL, NPAGES, fd, &(struct sa_run){0, 100, 1}, 1, &n) == -EINVAL);
	CHECK(sa_map_runs(base, UINT64_MAX / 2, fd, &(struct sa_run){0, 100, 1}, 1, &n) == -EINVAL);
	CHECK(sa_map_runs(base, NPAGES, -1, &(struct sa_run){0, 100, 1}, 1, &n) == -EBADF);
	CHECK(sa_map_runs(base, NPAGES, file, &(struct sa_run){0, 0, 1}, 1, &n) == -ERANGE);
	CHECK(sa_map_file(base + 1, file, 0, 1, 0) == -EINVAL);
	CHECK(sa_map_file(NULL, file, 0, 1, 0) == -EINVAL);
	CHECK(sa_map_file(base, file, 0, 0, 0) == -EINVAL);
	CHECK(sa_map_file(base, file, UINT64_MAX, 2, 0) == -EINVAL);
	CHECK(sa_map_file(base, file, 1, UINT64_MAX / PAGE, 0) == -EINVAL);
	CHECK(sa_map_file(base, -1, 0, 1, 0) == -EBADF);
	CHECK(memcmp(base, "file", 4) == 0);
	CHECK(munmap(base, sizeof content) == 0);
	CHECK(close(file) == 0);
	sa_segment_destroy(segment);
}

/* ------------------------------------------------------------------------------------------ readers meanwhile */

struct reading {
	const uint8_t *base;
	atomic_bool stop;
	atomic_size_t rounds;
	size_t wrong;
};

static void *read_all_the_time(void *argument)
{
	struct reading *reading = argument;

	while (!atomic_load(&reading->stop)) {
		for (size_t p = 0; p < NPAGES; p++)
			reading->wrong += memcmp(reading->base + p * PAGE, content + p * PAGE, PAGE) != 0;
		atomic_fetch_add(&reading->rounds, 1);
	}
	return NULL;
}

static void test_reader_meanwhile(void)
{
	static const struct sa_run runs[] = {{0, 100, 7}, {9, 109, 1}, {16, 116, 32}, {63, 163, 1}};
	sa_segment *segment = make_segment();
	const int file = make_file();
	uint8_t *base = map_whole_file(file);
	struct reading reading = {.base = base};
	pthread_t thread;
	size_t mapped;
	size_t wrong = 0;

	CHECK(pthread_create(&thread, NULL, read_all_the_time, &reading) == 0);
	for (int i = 0; i < 5000 || atomic_load(&reading.rounds) < 500; i++) {
		wrong += sa_map_runs(base, NPAGES, sa_segment_fd(segment), runs, 4, &mapped) != 0 || mapped != 4;
		wrong += sa_map_file(base, file, 0, NPAGES, i & 1) != 0;
	}
	atomic_store(&reading.stop, true);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(wrong == 0 && reading.wrong == 0);
	CHECK(munmap(base, sizeof content) == 0);
	CHECK(close(file) == 0);
	sa_segment_destroy(segment);
}

/* In a process of its own: use up the mappings it may have, then map every other page. */
static void check_out_of_mappings(int file, int fd)
{
	uint8_t *base = map_whole_file(file);
	const size_t hole = (size_t)4 << 30;
	struct sa_run runs[NPAGES / 2];
	size_t mapped = 0;
	size_t used = 0;
	size_t done;
	uint8_t *area = mmap(NULL, hole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	CHECK(area != MAP_FAILED);
	for (uint32_t i = 0; i < NPAGES / 2; i++)
		runs[i] = (struct sa_run){.page = i * 2 + 1, .slot = 100 + i * 2 + 1, .count = 1};
	/* Each page with rights of its own is two mappings more. */
	while ((used * 2 + 1) * PAGE < hole && mprotect(area + (used * 2 + 1) * PAGE, PAGE, PROT_READ) == 0)
		used++;
	CHECK((used * 2 + 1) * PAGE < hole && errno == ENOMEM);
	/* Make room for some of the runs, not for all. */
	CHECK(munmap(area, 21 * PAGE) == 0);
	CHECK(sa_map_runs(base, NPAGES, fd, runs, NPAGES / 2, &mapped) == -ENOMEM);
	CHECK(mapped > 0 && mapped < NPAGES / 2);
	/* Nothing is missing and nothing is wrong: done runs are slots, the others the file. */
	CHECK(memcmp(base, content, sizeof content) == 0);
	CHECK(pwrite(file, "file", 4, (off_t)runs[mapped - 1].page * PAGE) == 4);
	CHECK(pwrite(file, "file", 4, (off_t)runs[mapped].page * PAGE) == 4);
	done = (size_t)runs[mapped - 1].page * PAGE;
	CHECK(memcmp(base + done, content + done, 4) == 0);
	CHECK(memcmp(base + (size_t)runs[mapped].page * PAGE, "file", 4) == 0);
	/* The program takes what is left, and still there is a way back. */
	while (mmap(NULL, PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED)
		;
	CHECK(errno == ENOMEM);
	CHECK(sa_map_file(base, file, 0, NPAGES, 1) == 0);
	CHECK(memcmp(base + done, "file", 4) == 0);
	/* A second time, though nothing was set aside anew but what the first way back left over. */
	CHECK(sa_map_file(base, file, 1, 2, 0) == 0);
}

static void test_out_of_mappings(void)
{
	sa_segment *segment = make_segment();
	const int file = make_file();
	int status = 0;
	pid_t child;

	fflush(NULL);
	child = fork();
	if (child == 0) {
		check_failures = 0;
		check_out_of_mappings(file, sa_segment_fd(segment));
		fflush(NULL);
		_exit(check_failures ? 1 : 0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(close(file) == 0);
	sa_segment_destroy(segment);
}

int main(void)
{
	make_content();
	test_segment();
	test_fill_tells_a_mismatch();
	test_seals();
	test_refused_segments();
	test_map_runs();
	test_refused_runs();
	test_reader_meanwhile();
	test_out_of_mappings();
	return check_done("test_map");
}
