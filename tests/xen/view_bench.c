/*
 * view_bench.c - what reading and mapping a file costs, in nanoseconds, for the same file seen in two ways.
 *
 * view_bench FILE FILE ROUNDS: each test runs on the first and on the second file by turns, so that whatever else the
 * machine does meets both. Prints "NAME FIRST SECOND": the medians. view_bench stat FOLDER FOLDER ROUNDS does the same
 * for opening every file f0 ... f999 of a folder.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L
#define MAX_ROUNDS 101

static volatile uint64_t sink;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double random_reads(const char *path)
{
	static char buffer[PAGE];
	uint32_t state = 12345;
	struct stat st;
	int fd = open(path, O_RDONLY);
	double begun;

	if (fd < 0 || fstat(fd, &st))
		die(path);
	begun = now();
	for (int i = 0; i < 4000; i++) {
		state = state * 1664525U + 1013904223U;
		if (pread(fd, buffer, PAGE, (off_t)(state % (uint32_t)(st.st_size / PAGE)) * PAGE) != PAGE)
			die("pread");
	}
	begun = (now() - begun) / 4000;
	close(fd);
	return begun;
}

static double sequential_reads(const char *path)
{
	static char buffer[1 << 20];
	int fd = open(path, O_RDONLY);
	double begun = now();
	ssize_t got;
	long total = 0;

	if (fd < 0)
		die(path);
	while ((got = read(fd, buffer, sizeof buffer)) > 0)
		total += got;
	if (got < 0)
		die("read");
	begun = (now() - begun) / ((double)total / (1 << 20));
	close(fd);
	return begun;
}

/* Nanoseconds per page; warm: of the second pass, when all pages are mapped. */
static double mapped(const char *path, int warm)
{
	struct stat st;
	int fd = open(path, O_RDONLY);
	const uint64_t *words;
	uint64_t sum = 0;
	double begun = 0;

	if (fd < 0 || fstat(fd, &st))
		die(path);
	words = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (words == MAP_FAILED)
		die("mmap");
	for (int pass = 0; pass <= warm; pass++) {
		begun = now();
		for (long at = 0; at < st.st_size / 8; at += warm ? 1 : PAGE / 8)
			sum += words[at];
		begun = now() - begun;
	}
	sink += sum;
	munmap((void *)words, (size_t)st.st_size);
	close(fd);
	return begun / (double)(st.st_size / PAGE);
}

static double first_touch(const char *path)
{
	return mapped(path, 0);
}

static double warm_pass(const char *path)
{
	return mapped(path, 1);
}

static double open_all(const char *folder)
{
	char name[300];
	struct stat st;
	double begun = now();

	for (int i = 0; i < 1000; i++) {
		int fd;

		snprintf(name, sizeof name, "%s/f%d", folder, i);
		fd = stat(name, &st) ? -1 : open(name, O_RDONLY);
		if (fd < 0)
			die(name);
		close(fd);
	}
	return (now() - begun) / 1000;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void measure(const char *name, double (*test)(const char *), char *const paths[2], int rounds)
{
	static double found[2][MAX_ROUNDS];

	for (int round = 0; round < rounds; round++)
		for (int which = 0; which < 2; which++)
			found[which][round] = test(paths[which]);
	for (int which = 0; which < 2; which++)
		qsort(found[which], (size_t)rounds, sizeof(double), compare);
	printf("%s %.0f %.0f\n", name, found[0][rounds / 2], found[1][rounds / 2]);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	int files = argc == 4 && strcmp(argv[1], "stat") != 0, rounds = argc > 3 ? atoi(argv[argc - 1]) : 0;

	if ((argc != 4 && argc != 5) || rounds < 1 || rounds > MAX_ROUNDS) {
		fprintf(stderr, "view_bench FILE FILE ROUNDS | stat FOLDER FOLDER ROUNDS\n");
		return 2;
	}
	if (files) {
		measure("read_4k_random", random_reads, argv + 1, rounds);
		measure("read_1m_sequential", sequential_reads, argv + 1, rounds);
		measure("mmap_first_touch", first_touch, argv + 1, rounds);
		measure("mmap_sequential_warm", warm_pass, argv + 1, rounds);
	} else {
		measure("stat_and_open", open_all, argv + 2, rounds);
	}
	return 0;
}
