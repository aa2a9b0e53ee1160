/*
 * test_estimate.c - the tally of an estimate without Python: what is counted by example, in pieces of any size, holes,
 * page classes by well-made and by broken ELF headers, blocks that go to the file and come back, and a full disk. That
 * whole folders and images give what a slow count gives, tests/test_estimate.py shows.
 */
#include "check.h"
#include "sa.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ROOTS = 3, GROUPS = 4 };

static const uint8_t key[SA_FP_SIZE] = {1, 2, 3};

/* What sa_tally_join adds to, over all parts. */
struct answer {
	struct sa_tally_sums sums;
	uint64_t repeated[ROOTS];
	uint64_t pairs[ROOTS * ROOTS];
	uint64_t groups[GROUPS];
};

static int scratch_file(void)
{
	const int fd = memfd_create("estimate", MFD_CLOEXEC);

	if (fd < 0)
		abort();
	return fd;
}

static sa_tally *open_tally(uint32_t nroots)
{
	const int fd = scratch_file();
	sa_tally *tally = NULL;

	if (!CHECK(sa_tally_create(fd, key, nroots, &tally) == 0))
		abort();
	close(fd);
	return tally;
}

/* n pages that differ from one another and from those of other seeds. */
static void fill(uint8_t *ret, size_t n, uint32_t seed)
{
	memset(ret, 0x5a, n * SA_PAGE_SIZE);
	for (uint32_t i = 0; i < n; i++) {
		memcpy(ret + (size_t)i * SA_PAGE_SIZE + 100, &seed, sizeof seed);
		memcpy(ret + (size_t)i * SA_PAGE_SIZE + 200, &i, sizeof i);
	}
}

static void feed(sa_tally *tally, uint32_t root, uint32_t file, const uint8_t *data, size_t size, size_t piece)
{
	CHECK(sa_tally_begin(tally, root, file) == 0);
	for (size_t done = 0; done < size; done += piece)
		CHECK(sa_tally_feed(tally, data + done, size - done < piece ? size - done : piece) == 0);
	CHECK(sa_tally_end(tally) == 0);
}

static int ask(const sa_tally *tally, const uint32_t *weights, const uint32_t *groups, size_t nfiles, int without_text,
               struct answer *ret)
{
	const struct sa_tally_question question = {groups, nfiles, GROUPS, weights, without_text};

	memset(ret, 0, sizeof *ret);
	for (uint32_t part = 0; part < SA_TALLY_PARTS; part++) {
		const int error =
			sa_tally_join(tally, part, &question, &ret->sums, ret->repeated, ret->pairs, ret->groups);

		if (error)
			return error;
	}
	return 0;
}

static const uint32_t all_there[ROOTS] = {SA_TALLY_ONE, SA_TALLY_ONE, SA_TALLY_ONE};
static const uint64_t one = SA_TALLY_ONE;

static void test_counts(void)
{
	static uint8_t pages[10 * SA_PAGE_SIZE];
	static uint8_t zeros[3 * SA_PAGE_SIZE];
	static const uint32_t groups[5] = {1, 2, 2, 3, 0};
	static const uint32_t half[ROOTS] = {SA_TALLY_ONE / 2, SA_TALLY_ONE / 4, SA_TALLY_ONE};
	static const uint32_t too_much[ROOTS] = {SA_TALLY_ONE, SA_TALLY_ONE + 1, 0};
	sa_tally *tally = open_tally(ROOTS);
	struct sa_tally_root root;
	struct answer answer;

	fill(pages, 10, 7);
	feed(tally, 0, 0, pages, 6 * SA_PAGE_SIZE, 6 * SA_PAGE_SIZE);              /* 0..5 */
	feed(tally, 0, 1, pages + 4 * SA_PAGE_SIZE, 2 * SA_PAGE_SIZE, 1000);       /* 4, 5 again */
	feed(tally, 1, 2, pages + 2 * SA_PAGE_SIZE, 8 * SA_PAGE_SIZE, 4097);       /* 2..9 */
	feed(tally, 2, 3, pages + 5 * SA_PAGE_SIZE, 2 * SA_PAGE_SIZE - 1, 100000); /* 5, and 6 without its last byte */
	feed(tally, 2, 4, zeros, sizeof zeros, 4096);

	CHECK(sa_tally_root(tally, 0, &root) == 0);
	CHECK(root.files == 2 && root.pages == 8 && root.zero == 0 && root.by_class[SA_CLASS_DATA] == 8);
	CHECK(sa_tally_root(tally, 2, &root) == 0);
	CHECK(root.files == 2 && root.pages == 5 && root.zero == 3 && root.by_class[SA_CLASS_DATA] == 2);
	CHECK(sa_tally_root(tally, 3, &root) == -EINVAL);

	CHECK(ask(tally, all_there, groups, 5, 0, &answer) == 0);
	CHECK(answer.sums.distinct == 11);
	/* 2, 3, 4 in two roots, 5 in three */
	CHECK(answer.sums.saved[SA_CLASS_DATA] == 5 * one);
	CHECK(answer.sums.saved[SA_CLASS_TEXT] == 0 && answer.sums.saved[SA_CLASS_RODATA] == 0);
	CHECK(answer.sums.area == 4 * one);
	CHECK(answer.sums.repeated == 2 * one);
	CHECK(answer.repeated[0] == 2 && answer.repeated[1] == 0 && answer.repeated[2] == 0);
	CHECK(answer.pairs[0 * ROOTS + 1] == 4 * one);
	CHECK(answer.pairs[0 * ROOTS + 2] == 1 * one);
	CHECK(answer.pairs[1 * ROOTS + 2] == 1 * one);
	CHECK(answer.groups[1] == 5 * one && answer.groups[0] == 0 && answer.groups[2] == 0 && answer.groups[3] == 0);

	/* each pair: the smaller chance; all: without the greatest */
	CHECK(ask(tally, half, groups, 5, 0, &answer) == 0);
	CHECK(answer.pairs[0 * ROOTS + 1] == 4 * one / 4);
	CHECK(answer.pairs[0 * ROOTS + 2] == one / 2);
	CHECK(answer.pairs[1 * ROOTS + 2] == one / 4);
	CHECK(answer.sums.saved[SA_CLASS_DATA] == 3 * one / 4 + (one / 2 + one / 4));
	CHECK(answer.sums.area == 3 * one / 4 + one / 2);
	CHECK(answer.repeated[0] == 2);

	CHECK(ask(tally, too_much, groups, 5, 0, &answer) == -ERANGE);
	CHECK(ask(tally, all_there, groups, 3, 0, &answer) == -ERANGE);
	sa_tally_destroy(tally);
}

static void test_holes_and_files(void)
{
	static uint8_t pages[6 * SA_PAGE_SIZE];
	static const uint32_t groups[4] = {0};
	sa_tally *tally = open_tally(ROOTS);
	struct sa_tally_root root;
	struct answer answer;
	const int fd = scratch_file();
	uint64_t fed = 99;

	fill(pages, 6, 3);
	memset(pages + SA_PAGE_SIZE, 0, 3 * SA_PAGE_SIZE);

	/* the same content by feeding, by holes that begin and end inside a page, and from a sparse file */
	feed(tally, 0, 0, pages, sizeof pages - 10, 777);
	memset(pages + SA_PAGE_SIZE - 40, 0, 40);
	memset(pages + (size_t)4 * SA_PAGE_SIZE, 0, 60);
	feed(tally, 0, 1, pages, sizeof pages - 10, sizeof pages);
	CHECK(sa_tally_begin(tally, 1, 2) == 0);
	CHECK(sa_tally_feed(tally, pages, SA_PAGE_SIZE - 40) == 0);
	CHECK(sa_tally_hole(tally, 40 + 3 * SA_PAGE_SIZE + 60) == 0);
	CHECK(sa_tally_feed(tally, pages + (size_t)4 * SA_PAGE_SIZE + 60, 2 * SA_PAGE_SIZE - 60 - 10) == 0);
	CHECK(sa_tally_end(tally) == 0);
	CHECK(pwrite(fd, pages, SA_PAGE_SIZE, 0) == SA_PAGE_SIZE);
	CHECK(pwrite(fd, pages + (size_t)4 * SA_PAGE_SIZE, 2 * SA_PAGE_SIZE - 10, (off_t)4 * SA_PAGE_SIZE) ==
	      2 * SA_PAGE_SIZE - 10);
	CHECK(sa_tally_file(tally, 2, 3, fd, sizeof pages - 10, 1, &fed) == 0);
	CHECK(fed == sizeof pages - 10);
	for (uint32_t i = 1; i < ROOTS; i++) {
		CHECK(sa_tally_root(tally, i, &root) == 0);
		CHECK(root.pages == 6 && root.zero == 3 && root.by_class[SA_CLASS_DATA] == 3);
	}
	CHECK(ask(tally, all_there, groups, 4, 0, &answer) == 0);
	CHECK(answer.pairs[0 * ROOTS + 1] == 3 * one && answer.pairs[1 * ROOTS + 2] == 3 * one);
	CHECK(answer.sums.saved[SA_CLASS_DATA] == 6 * one);
	CHECK(answer.repeated[0] == 1); /* its last page only: the cut ones differ */

	/* shorter than the caller knew, with and without holes; holes at the end; nothing at all */
	CHECK(sa_tally_file(tally, 2, 3, fd, 2 * sizeof pages, 1, &fed) == 0 && fed == sizeof pages - 10);
	CHECK(sa_tally_file(tally, 2, 3, fd, 2 * sizeof pages, 0, &fed) == 0 && fed == sizeof pages - 10);
	CHECK(ftruncate(fd, 40 * SA_PAGE_SIZE) == 0);
	CHECK(sa_tally_file(tally, 2, 3, fd, 40 * SA_PAGE_SIZE, 1, &fed) == 0 && fed == 40 * SA_PAGE_SIZE);
	CHECK(sa_tally_file(tally, 2, 3, fd, 0, 1, &fed) == 0 && fed == 0);
	CHECK(sa_tally_root(tally, 2, &root) == 0);
	CHECK(root.files == 5 && root.pages == 6 * 3 + 40 && root.zero == 3 * 3 + 37);

	/* holes are not read: nobody could read these */
	{
		const uint64_t tib = UINT64_C(1) << 40;
		const struct sa_tally_root before = root;

		CHECK(ftruncate(fd, (off_t)tib) == 0);
		CHECK(sa_tally_file(tally, 2, 3, fd, tib, 1, &fed) == 0 && fed == tib);
		CHECK(sa_tally_root(tally, 2, &root) == 0);
		CHECK(root.pages == before.pages + tib / SA_PAGE_SIZE);
		CHECK(root.zero == before.zero + tib / SA_PAGE_SIZE - 3);
		root = before;
	}

	/* a stretch from the middle; what cannot be read; calls in the wrong order */
	CHECK(sa_tally_begin(tally, 2, 3) == 0);
	CHECK(sa_tally_begin(tally, 2, 3) == -EINVAL);
	CHECK(sa_tally_feed_fd(tally, fd, (uint64_t)4 * SA_PAGE_SIZE, SA_PAGE_SIZE + 5, 0, &fed) == 0);
	CHECK(fed == SA_PAGE_SIZE + 5);
	CHECK(sa_tally_feed_fd(tally, fd, UINT64_MAX, 1, 0, &fed) == -EINVAL);
	CHECK(sa_tally_feed_fd(tally, -1, 0, 1, 0, &fed) == -EBADF);
	CHECK(sa_tally_abandon(tally) == 0);
	CHECK(sa_tally_end(tally) == -EINVAL && sa_tally_feed(tally, pages, 1) == -EINVAL);
	CHECK(sa_tally_hole(tally, 1) == -EINVAL && sa_tally_abandon(tally) == -EINVAL);
	CHECK(sa_tally_file(tally, 2, 3, -1, 1, 1, &fed) == -EBADF);
	CHECK(sa_tally_begin(tally, ROOTS, 3) == -EINVAL);
	CHECK(sa_tally_root(tally, 2, &root) == 0);
	CHECK(root.pages == 6 * 3 + 40 + (UINT64_C(1) << 40) / SA_PAGE_SIZE +
	                            1); /* the short page of the abandoned file is not counted */
	sa_tally_destroy(tally);
	close(fd);
}

/* ------------------------------------------------------------------------------------------------- page classes */

static void put(uint8_t *to, uint64_t value, size_t size, int big_endian)
{
	for (size_t i = 0; i < size; i++)
		to[big_endian ? size - 1 - i : i] = (uint8_t)(value >> (8 * i));
}

struct load {
	uint32_t flags; /* 1 X, 2 W, 4 R */
	uint64_t offset;
	uint64_t length;
};

/* Program headers of an ELF file at offset 64. */
static void make_elf(uint8_t *ret, int is64, int big, uint16_t type, const struct load *loads, size_t n)
{
	const size_t word = is64 ? 8 : 4;
	const size_t entry = is64 ? 56 : 32;

	memcpy(ret, "\177ELF", 4);
	ret[4] = is64 ? 2 : 1;
	ret[5] = big ? 2 : 1;
	put(ret + 16, type, 2, big);
	put(ret + (is64 ? 32 : 28), 64, word, big);
	put(ret + (is64 ? 54 : 42), entry, 2, big);
	put(ret + (is64 ? 56 : 44), n, 2, big);
	for (size_t i = 0; i < n; i++) {
		uint8_t *header = ret + 64 + i * entry;

		put(header, 1, 4, big);
		put(header + (is64 ? 4 : 24), loads[i].flags, 4, big);
		put(header + (is64 ? 8 : 4), loads[i].offset, word, big);
		put(header + (is64 ? 32 : 16), loads[i].length, word, big);
	}
}

static const struct load loads[] = {
	{4, 0, 5000},                                    /* pages 0, 1: read */
	{5, 2 * SA_PAGE_SIZE, 2 * SA_PAGE_SIZE},         /* 2, 3: text */
	{4, 4 * SA_PAGE_SIZE - 8, SA_PAGE_SIZE},         /* 3, 4: read, and 3 stays text */
	{6, 5 * SA_PAGE_SIZE, SA_PAGE_SIZE},             /* 5: written */
	{7, 7 * SA_PAGE_SIZE, 1},                        /* 7: text, though written too */
	{5, 9 * SA_PAGE_SIZE, 0},                        /* nothing */
	{1, UINT64_MAX - 2 * SA_PAGE_SIZE, UINT32_MAX},  /* beyond all numbers */
	{1, (UINT64_C(1) << 32) - SA_PAGE_SIZE, 1 << 20} /* beyond this file */
};

static void test_classes(void)
{
	static uint8_t pages[10 * SA_PAGE_SIZE];
	static const uint32_t groups[6] = {0, 1, 2, 3, 1, 2};
	struct sa_tally_root root;
	struct answer answer;

	for (int variant = 0; variant < 8; variant++) {
		sa_tally *tally = open_tally(ROOTS);
		const uint16_t type = variant & 4 ? 2 : 3;

		memset(pages, 0, sizeof pages);
		fill(pages, 10, 1);
		make_elf(pages, variant & 1, variant & 2, type, loads, sizeof loads / sizeof loads[0]);
		feed(tally, 0, 0, pages, sizeof pages, sizeof pages);
		CHECK(sa_tally_root(tally, 0, &root) == 0);
		CHECK(root.by_class[SA_CLASS_TEXT] == 3);
		CHECK(root.by_class[SA_CLASS_RODATA] == 3);
		CHECK(root.by_class[SA_CLASS_DATA] == 4);

		/* what begins with a hole, objects and core dumps have no mapped segments */
		CHECK(sa_tally_begin(tally, 2, 2) == 0 && sa_tally_hole(tally, SA_PAGE_SIZE) == 0);
		CHECK(sa_tally_feed(tally, pages, sizeof pages) == 0 && sa_tally_end(tally) == 0);
		CHECK(sa_tally_root(tally, 2, &root) == 0 && root.by_class[SA_CLASS_DATA] == 10);
		put(pages + 16, 4, 2, variant & 2);
		feed(tally, 1, 1, pages, sizeof pages, sizeof pages);
		CHECK(sa_tally_root(tally, 1, &root) == 0 && root.by_class[SA_CLASS_DATA] == 10);

		/* Pages 1 to 9 are in all three roots, text in root 0 only; page 0 differs in root 1. */
		CHECK(ask(tally, all_there, groups, 3, 0, &answer) == 0);
		CHECK(answer.sums.saved[SA_CLASS_TEXT] == 3 * one);
		CHECK(answer.sums.saved[SA_CLASS_RODATA] == (2 * 2 + 1) * one);
		CHECK(answer.sums.saved[SA_CLASS_DATA] == (2 * 4 + 3) * one);
		CHECK(answer.pairs[0 * ROOTS + 1] == 9 * one && answer.pairs[0 * ROOTS + 2] == 10 * one);
		CHECK(answer.groups[0] == 19 * one);
		CHECK(ask(tally, all_there, groups, 3, 1, &answer) == 0);
		CHECK(answer.sums.saved[SA_CLASS_TEXT] == 3 * one); /* told, and not in what follows */
		CHECK(answer.pairs[0 * ROOTS + 1] == 6 * one && answer.pairs[1 * ROOTS + 2] == 9 * one);
		CHECK(answer.groups[0] == 13 * one && answer.groups[1] == 3 * one);

		/* A text page that the same root has as data too: it comes twice there, and only as data is it shared. */
		CHECK(answer.repeated[0] == 0);
		feed(tally, 0, 3, pages + 2 * SA_PAGE_SIZE, SA_PAGE_SIZE, SA_PAGE_SIZE);
		CHECK(ask(tally, all_there, groups, 4, 0, &answer) == 0);
		CHECK(answer.repeated[0] == 1 && answer.sums.repeated == one);
		CHECK(answer.sums.saved[SA_CLASS_TEXT] == 2 * one);
		CHECK(answer.groups[0] == 19 * one);
		CHECK(ask(tally, all_there, groups, 4, 1, &answer) == 0);
		CHECK(answer.repeated[0] == 1 && answer.sums.repeated == 0);
		CHECK(answer.pairs[0 * ROOTS + 1] == 7 * one);
		sa_tally_destroy(tally);
	}
}

/* splitmix64, so that every run is the same */
static uint64_t random_state = 1;

static uint64_t draw(void)
{
	uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

/* Headers that lie: the sanitizers watch. Whatever they say, each page has one class. */
static void test_broken_headers(void)
{
	sa_tally *tally = open_tally(1);
	struct sa_tally_root root;
	uint64_t pages = 0;

	for (int round = 0; round < 20000; round++) {
		const size_t size = 1 + draw() % 3000;
		uint8_t *data = malloc(size); /* of exactly this size: a byte too far is seen */
		uint8_t made[3000] = {0};

		if (!data)
			abort();
		make_elf(made, round & 1, round & 2, 3, loads, sizeof loads / sizeof loads[0]);
		for (uint64_t bytes = draw() % 12; bytes > 0; bytes--)
			made[draw() % (draw() % 2 ? 64 : 600)] = (uint8_t)draw();
		made[2999] = 1;
		memcpy(data, made, size);
		feed(tally, 0, 0, data, size, size);
		free(data);
		pages++;
	}
	CHECK(sa_tally_root(tally, 0, &root) == 0);
	CHECK(root.pages == pages);
	CHECK(root.zero + root.by_class[0] + root.by_class[1] + root.by_class[2] == pages);
	CHECK(root.by_class[SA_CLASS_TEXT] > 0 && root.by_class[SA_CLASS_RODATA] > 0);
	sa_tally_destroy(tally);
}

/* ------------------------------------------------------------------------------------------- the caller's file */

/* One page 70,000 times in one root, so that its part is written and read back and merged, and among them pages that
 * are in both. */
static void test_blocks_come_back(void)
{
	enum { REPEATS = 70000, EVERY = 50 };
	static uint8_t page[SA_PAGE_SIZE];
	static uint8_t other[SA_PAGE_SIZE];
	static const uint32_t groups[2] = {3, 3};
	sa_tally *tally = open_tally(2);
	struct sa_tally_root root;
	struct answer answer;
	uint64_t spilled = 0;

	fill(page, 1, 1);
	for (uint32_t r = 0; r < 2; r++) {
		CHECK(sa_tally_begin(tally, r, r) == 0);
		for (uint32_t i = 0; i < REPEATS; i++) {
			if (r == 0)
				CHECK(sa_tally_feed(tally, page, sizeof page) == 0);
			if (i % EVERY == 0) {
				fill(other, 1, i + 2);
				CHECK(sa_tally_feed(tally, other, sizeof other) == 0);
			}
		}
		CHECK(sa_tally_end(tally) == 0);
	}
	CHECK(sa_tally_spilled(tally, &spilled) == 0);
	CHECK(spilled > UINT64_C(24) * REPEATS * 9 / 10);
	CHECK(sa_tally_root(tally, 0, &root) == 0 && root.pages == REPEATS + REPEATS / EVERY);
	CHECK(ask(tally, all_there, groups, 2, 0, &answer) == 0);
	CHECK(answer.sums.distinct == 1 + REPEATS / EVERY);
	CHECK(answer.sums.saved[SA_CLASS_DATA] == one * (REPEATS / EVERY));
	CHECK(answer.pairs[1] == one * (REPEATS / EVERY));
	CHECK(answer.repeated[0] == REPEATS - 1 && answer.repeated[1] == 0);
	CHECK(answer.sums.repeated == 0);
	CHECK(answer.groups[3] == one * (REPEATS / EVERY));
	sa_tally_destroy(tally);
}

static void test_a_full_disk(void)
{
	static uint8_t page[SA_PAGE_SIZE] = {1};
	const int fd = open("/dev/full", O_RDWR | O_CLOEXEC);
	sa_tally *tally = NULL;
	int error = 0;

	if (!CHECK(fd >= 0))
		return;
	CHECK(sa_tally_create(fd, key, 1, &tally) == 0);
	close(fd);
	CHECK(sa_tally_begin(tally, 0, 0) == 0);
	for (int i = 0; i < 2000 && !error; i++)
		error = sa_tally_feed(tally, page, sizeof page);
	CHECK(error == -ENOSPC);
	sa_tally_destroy(tally);
}

static void test_arguments(void)
{
	sa_tally *tally = NULL;

	CHECK(sa_tally_create(-1, key, 1, &tally) == -EBADF);
	CHECK(sa_tally_create(0, key, 0, &tally) == -EINVAL);
	CHECK(sa_tally_create(0, key, 65536, &tally) == -EINVAL);
	CHECK(sa_tally_create(0, NULL, 1, &tally) == -EINVAL);
	CHECK(!tally);
	sa_tally_destroy(NULL);
}

int main(void)
{
	test_counts();
	test_holes_and_files();
	test_classes();
	test_broken_headers();
	test_blocks_come_back();
	test_a_full_disk();
	test_arguments();
	return check_done("estimate");
}
