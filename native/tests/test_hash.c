/*
 * test_hash.c - tests of hash.c and its kernels: goldens made with the reference implementation (Python package blake3
 * 1.0.11), every kernel that runs here against the scalar one, zero pages, and the choice of a kernel. Speed is not
 * tested here. No build flags of its own; link it with hash.c, hash_avx2.c and hash_avx512.c.
 */
#include "../sa.h"
#include "check.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { MAX_PAGES = 70, MAX_OFFSET = 64, CANARY = 0xa5 };

/* ----------------------------------------------------------------------------------------------- what is hashed */

/* Byte i of the stream of a seed is the top byte of x(i + 1), x(0) = seed, x(i + 1) = 1664525 x(i) + 1013904223. */
static uint32_t fill(uint8_t *ret, size_t n, uint32_t seed)
{
	for (size_t i = 0; i < n; i++) {
		seed = seed * 1664525U + 1013904223U;
		ret[i] = (uint8_t)(seed >> 24);
	}
	return seed;
}

enum key { KEY_COUNT, KEY_ZERO, KEY_ONES }; /* 00 01 .. 1f; all 00; all ff */
enum page { PAGE_ZERO, PAGE_ONES, PAGE_COUNT, PAGE_FIRST_BIT, PAGE_LAST_BIT };

static void make_key(enum key key, uint8_t *ret)
{
	memset(ret, key == KEY_ONES ? 0xff : 0, SA_FP_SIZE);
	if (key == KEY_COUNT)
		for (size_t i = 0; i < SA_FP_SIZE; i++)
			ret[i] = (uint8_t)i;
}

static void make_page(enum page page, uint8_t *ret)
{
	memset(ret, page == PAGE_ONES ? 0xff : 0, SA_PAGE_SIZE);
	if (page == PAGE_COUNT)
		for (size_t i = 0; i < SA_PAGE_SIZE; i++)
			ret[i] = (uint8_t)(i * 7 + (i >> 8));
	if (page == PAGE_FIRST_BIT)
		ret[0] = 0x01;
	if (page == PAGE_LAST_BIT)
		ret[SA_PAGE_SIZE - 1] = 0x80;
}

struct page_golden {
	enum key key;
	enum page page;
	const char *fp;
};

static const struct page_golden page_goldens[] = {
	{KEY_COUNT, PAGE_ZERO, "68277efeb7544248fc8434b543846721e02fca36952d6f91a31022d06469b6aa"},
	{KEY_COUNT, PAGE_ONES, "708564a333a1e1d8a322b44524bf43bcd9851311f9ea908e8a7b559a6ed78352"},
	{KEY_COUNT, PAGE_COUNT, "e271a0f3df3920f4cca95b692714c479d75e255bc6ab74c69bb16ad45e76ece0"},
	{KEY_COUNT, PAGE_FIRST_BIT, "b371463ebabfd293961ba541f8f3ad68ea950c3ba2a5a6a2489c929904a20abb"},
	{KEY_COUNT, PAGE_LAST_BIT, "062536865f90626dfd1cdd0475168dc66167f108cb9b980b2e78f97d40b5de48"},
	{KEY_ZERO, PAGE_ZERO, "94ad93f65727e4e339876965135e3d2e156b194ed3f610e1981f76f74168af73"},
	{KEY_ZERO, PAGE_ONES, "8220161a76384880cb5b3c86b0ed49db3b48686a455fc8e34b9c6350addd9014"},
	{KEY_ZERO, PAGE_COUNT, "106742997e85f2045defd653464773f94e0131f964c8f46a6ac6254ff0153f1d"},
	{KEY_ZERO, PAGE_FIRST_BIT, "dee33921f66ffdadd8af2430048ab521ffe673e15ce9cce1a693c81623f451b6"},
	{KEY_ZERO, PAGE_LAST_BIT, "4279697caaccfe754b13933cf0437f98a9b2fa158abf9720372b4a05e0d8b670"},
	{KEY_ONES, PAGE_ZERO, "86b6ed915c8e0e982ca199f0b7e3387b3704fad5fa80fdcc7a061b25adf990da"},
	{KEY_ONES, PAGE_ONES, "55fbda9f422f913ef57889a77e53b47c9df8dc09e16b6df528e36b5ff0c0d61d"},
	{KEY_ONES, PAGE_COUNT, "ff11dac15d9a018c5ba82df11f0e21a8edc3dc337d2ee2b73bf44ffdcdd07420"},
	{KEY_ONES, PAGE_FIRST_BIT, "3c09225ab7cdccc7e4f99e572d6fadc3836e4f375e37aae1de916b56565f8ec4"},
	{KEY_ONES, PAGE_LAST_BIT, "d5855e9ae551bf076be6231e9e12043f361305841f8a6c393dc21aeab0fe0ef9"},
};

struct root_golden {
	size_t npages;
	uint64_t size;
	const char *root;
};

/* Over the first npages * 32 bytes of the stream of seed 1. */
static const struct root_golden root_goldens[] = {
	{0, 0U, "2dec499ca2e29c9b0d3ad594a96f7eff0390f11bfa8badb2ff3b21f2754de6f9"},
	{0, 1U, "70302b086d173e9da0f4da7664d925cadcf3439f405bb01fe3c52929a0ff197b"},
	{1, 1U, "4f87ac5846a82ea78f90da9fe49ece7669acc3c7046e8a79de33d8ab131cd6b8"},
	{1, 4096U, "431e980e381fd5b20d22a35bdce9bce21b1c06b4be0cc98e75922608105cafca"},
	{2, 8192U, "ffc414cfad4f1d4d9dcbfd0961e17b1f891e9be41aa0827236086bfd65bf8a91"},
	{2, 0xfedcba9876543210U, "9dd7dacb9fb0ac4d6679b8680074dac976d33909eec3b78898f451c6214b5e3a"},
	{31, 126976U, "788d9b2b541f281506ac1cdb7fad7d2266a71a2789781b15cf8bd399ca5a0793"},
	{32, 131072U, "189a2f4a7c80d75b79906fc972ed019e350190db400d72caf1d3a7ca431177d4"},
	{33, 135168U, "5b7550950248f6273086bdb9efc33eaf7308b906067dacc7a3dc2de5fe163172"},
	{1000, 4091905U, "b52a9659259685502480e3bf17b12073c7fbf3b94bd5c6117f6d21d51a575810"},
	{2047, 8384512U, "f3e45c75a8dfd998a3f51911bf3fd3de12b8e5637526980409c1d90145a2df4a"},
	{2048, 8388608U, "244ac02d813c5a9cac0c34389b617c263382fc00ea314589b5ab72c7ab45d462"},
	{40000, 163840000U, "2e5f807b6f47176fc2081e36227820fdb953f364cab839f43fbf9fc24ccdd50c"},
};

static int equals_hex(const uint8_t *bytes, const char *hex)
{
	char text[2 * SA_FP_SIZE + 1];

	for (size_t i = 0; i < SA_FP_SIZE; i++)
		snprintf(text + 2 * i, 3, "%02x", (unsigned)bytes[i]);
	return strcmp(text, hex) == 0;
}

static int all_are(const uint8_t *bytes, size_t n, uint8_t value)
{
	for (size_t i = 0; i < n; i++)
		if (bytes[i] != value)
			return 0;
	return 1;
}

/* ------------------------------------------------------------------------------------------------- every kernel */

static void test_page_goldens(void)
{
	enum { N = sizeof page_goldens / sizeof page_goldens[0], REPEAT = 5 };
	static uint8_t pages[REPEAT * SA_PAGE_SIZE];
	uint8_t fps[REPEAT * SA_FP_SIZE];
	uint8_t zero[REPEAT];
	uint8_t key[SA_FP_SIZE];

	for (size_t g = 0; g < N; g++) {
		make_key(page_goldens[g].key, key);
		for (size_t i = 0; i < REPEAT; i++)
			make_page(page_goldens[g].page, pages + i * SA_PAGE_SIZE);
		CHECK(sa_fingerprint_pages(key, pages, REPEAT, fps, zero) == 0);
		for (size_t i = 0; i < REPEAT; i++) {
			CHECK(equals_hex(fps + i * SA_FP_SIZE, page_goldens[g].fp));
			CHECK(zero[i] == (page_goldens[g].page == PAGE_ZERO));
		}
	}
}

static void test_root_goldens(void)
{
	enum { N = sizeof root_goldens / sizeof root_goldens[0], LONGEST = 40000 };
	uint8_t *fps = malloc((size_t)LONGEST * SA_FP_SIZE);
	uint8_t root[SA_FP_SIZE + 1];

	if (!CHECK(fps))
		return;
	fill(fps, (size_t)LONGEST * SA_FP_SIZE, 1);
	for (size_t g = 0; g < N; g++) {
		memset(root, CANARY, sizeof root);
		CHECK(sa_file_root(root_goldens[g].size, fps, root_goldens[g].npages, root) == 0);
		CHECK(equals_hex(root, root_goldens[g].root));
		CHECK(root[SA_FP_SIZE] == CANARY);
	}
	CHECK(sa_file_root(0, NULL, 0, root) == 0);
	CHECK(equals_hex(root, root_goldens[0].root));
	free(fps);
}

/* One page of n is different from the others, at every place; then every single byte that can make a page not zero. */
static void test_zero_flags(void)
{
	const size_t bytes = (size_t)MAX_PAGES * SA_PAGE_SIZE;
	uint8_t key[SA_FP_SIZE];
	uint8_t fps[MAX_PAGES * SA_FP_SIZE];
	uint8_t zero[MAX_PAGES];
	uint8_t want[MAX_PAGES];
	uint8_t *pages = malloc(bytes);

	if (!CHECK(pages))
		return;
	make_key(KEY_COUNT, key);
	for (size_t n = 1; n <= 21; n++)
		for (size_t at = 0; at < n; at++) {
			uint8_t *page = pages + at * SA_PAGE_SIZE;

			memset(pages, 0, n * SA_PAGE_SIZE);
			memset(want, 1, n);
			page[(n * 977 + at * 1361) % SA_PAGE_SIZE] = 0x10;
			want[at] = 0;
			CHECK(sa_fingerprint_pages(key, pages, n, fps, zero) == 0);
			CHECK(memcmp(zero, want, n) == 0);

			memset(pages, 0x10, n * SA_PAGE_SIZE);
			memset(want, 0, n);
			memset(page, 0, SA_PAGE_SIZE);
			want[at] = 1;
			CHECK(sa_fingerprint_pages(key, pages, n, fps, zero) == 0);
			CHECK(memcmp(zero, want, n) == 0);
		}
	for (size_t at = 0; at < SA_PAGE_SIZE; at += MAX_PAGES) {
		const size_t n = SA_PAGE_SIZE - at < MAX_PAGES ? SA_PAGE_SIZE - at : MAX_PAGES;

		memset(pages, 0, bytes);
		for (size_t i = 0; i < n; i++)
			pages[i * SA_PAGE_SIZE + at + i] = (uint8_t)(1U << (i % 8));
		CHECK(sa_fingerprint_pages(key, pages, n, fps, zero) == 0);
		CHECK(all_are(zero, n, 0));
	}
	free(pages);
}

/* Every number of pages at many alignments, against the scalar kernel; nothing is written behind the results. */
static void test_pages_like_scalar(const char *kernel)
{
	const size_t bytes = (size_t)MAX_PAGES * SA_PAGE_SIZE + MAX_OFFSET;
	uint8_t want_fps[MAX_PAGES * SA_FP_SIZE];
	uint8_t want_zero[MAX_PAGES];
	uint8_t fps[MAX_PAGES * SA_FP_SIZE + MAX_OFFSET];
	uint8_t zero[MAX_PAGES + MAX_OFFSET];
	uint8_t key[SA_FP_SIZE + 1];
	uint8_t *buffer = malloc(bytes);
	uint32_t seed = 2026;

	if (!CHECK(buffer))
		return;
	for (size_t n = 0; n <= MAX_PAGES; n++) {
		const size_t offset = (n * 29 + 1) % MAX_OFFSET;
		uint8_t *pages = buffer + offset;
		uint8_t *ret_fps = fps + n % 8;

		seed = fill(buffer, bytes, seed);
		seed = fill(key, sizeof key, seed);
		for (size_t i = seed >> 30; i < n; i += 5)
			memset(pages + i * SA_PAGE_SIZE, 0, SA_PAGE_SIZE);
		memset(fps, CANARY, sizeof fps);
		memset(zero, CANARY, sizeof zero);
		CHECK(sa_hash_select("scalar") == 0);
		CHECK(sa_fingerprint_pages(key + 1, pages, n, want_fps, want_zero) == 0);
		CHECK(sa_hash_select(kernel) == 0);
		CHECK(sa_fingerprint_pages(key + 1, pages, n, ret_fps, zero) == 0);
		CHECK(memcmp(ret_fps, want_fps, n * SA_FP_SIZE) == 0);
		CHECK(memcmp(zero, want_zero, n) == 0);
		CHECK(all_are(fps, n % 8, CANARY));
		CHECK(all_are(ret_fps + n * SA_FP_SIZE, sizeof fps - n % 8 - n * SA_FP_SIZE, CANARY));
		CHECK(all_are(zero + n, sizeof zero - n, CANARY));
		memset(fps, CANARY, sizeof fps);
		CHECK(sa_fingerprint_pages(key + 1, pages, n, ret_fps, NULL) == 0);
		CHECK(memcmp(ret_fps, want_fps, n * SA_FP_SIZE) == 0);
	}
	free(buffer);
}

/* Roots of every number of pages up to a few chunks, and around whole subtrees of chunks, against the scalar kernel. */
static void test_roots_like_scalar(const char *kernel)
{
	enum { LONGEST = 9 * 2048 + 40 };
	uint8_t *fps = malloc((size_t)LONGEST * SA_FP_SIZE + 1);
	uint8_t want[SA_FP_SIZE];
	uint8_t root[SA_FP_SIZE];

	if (!CHECK(fps))
		return;
	fill(fps, (size_t)LONGEST * SA_FP_SIZE + 1, 77);
	for (size_t n = 0; n <= LONGEST; n += n < 640 || n % 2048 < 34 || n % 2048 > 2013 ? 1 : 29) {
		const uint64_t size = (uint64_t)n * 0x123456789abcU;

		CHECK(sa_hash_select("scalar") == 0);
		CHECK(sa_file_root(size, fps + n % 2, n, want) == 0);
		CHECK(sa_hash_select(kernel) == 0);
		CHECK(sa_file_root(size, fps + n % 2, n, root) == 0);
		CHECK(memcmp(root, want, sizeof root) == 0);
	}
	free(fps);
}

/* Pages that end where the address space has a hole: a byte too far would be a signal. */
static void test_no_read_beyond(void)
{
	const size_t bytes = 24 * (size_t)SA_PAGE_SIZE;
	uint8_t key[SA_FP_SIZE];
	uint8_t fps[22 * SA_FP_SIZE];
	uint8_t fps_again[22 * SA_FP_SIZE];
	uint8_t root[SA_FP_SIZE];
	uint8_t *map = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t *end;

	if (!CHECK(map != MAP_FAILED))
		return;
	end = map + bytes - SA_PAGE_SIZE;
	if (CHECK(mprotect(map + SA_PAGE_SIZE, bytes - 2 * SA_PAGE_SIZE, PROT_READ | PROT_WRITE) == 0)) {
		make_key(KEY_COUNT, key);
		fill(map + SA_PAGE_SIZE, bytes - 2 * SA_PAGE_SIZE, 5);
		for (size_t n = 1; n <= 22; n++) {
			CHECK(sa_fingerprint_pages(key, end - n * SA_PAGE_SIZE, n, fps, NULL) == 0);
			CHECK(sa_fingerprint_pages(key, end - SA_PAGE_SIZE, 1, fps_again, NULL) == 0);
			CHECK(memcmp(fps + (n - 1) * SA_FP_SIZE, fps_again, SA_FP_SIZE) == 0);
			CHECK(sa_fingerprint_pages(key, map + SA_PAGE_SIZE, n, fps, NULL) == 0);
		}
		for (size_t n = 0; n <= 300; n++)
			CHECK(sa_file_root(n, end - n * SA_FP_SIZE, n, root) == 0);
	}
	CHECK(munmap(map, bytes) == 0);
}

/* ------------------------------------------------------------------------------------------ choice and arguments */

static void test_kernels(void)
{
	const int count = sa_hash_kernel_count();
	int fastest = 0;

	CHECK(count == 3);
	CHECK(sa_hash_kernel_name(-1) == NULL);
	CHECK(sa_hash_kernel_name(count) == NULL);
	CHECK(sa_hash_kernel_state(-1) == -EINVAL);
	CHECK(sa_hash_kernel_state(count) == -EINVAL);
	CHECK(strcmp(sa_hash_kernel_name(0), "scalar") == 0);
	CHECK(strcmp(sa_hash_kernel_name(1), "avx2") == 0);
	CHECK(strcmp(sa_hash_kernel_name(2), "avx512") == 0);
	CHECK(sa_hash_kernel_state(0) == SA_KERNEL_RUNS);
	for (int k = 0; k < count; k++)
		if (sa_hash_kernel_state(k) == SA_KERNEL_RUNS)
			fastest = k;
#if !defined(__x86_64__) || (defined(SA_HASH_X86) && !SA_HASH_X86)
	CHECK(sa_hash_kernel_state(1) == SA_KERNEL_NOT_BUILT);
	CHECK(sa_hash_kernel_state(2) == SA_KERNEL_NOT_BUILT);
#else
	CHECK(sa_hash_kernel_state(1) != SA_KERNEL_NOT_BUILT);
	CHECK(sa_hash_kernel_state(2) != SA_KERNEL_NOT_BUILT);
	CHECK((sa_hash_kernel_state(1) == SA_KERNEL_RUNS) == (__builtin_cpu_supports("avx2") != 0));
#endif

	/* Before any choice it is "auto". */
	CHECK(strcmp(sa_hash_selected(), sa_hash_kernel_name(fastest)) == 0);
	CHECK(sa_hash_select("scalar") == 0);
	CHECK(strcmp(sa_hash_selected(), "scalar") == 0);
	CHECK(sa_hash_select("auto") == 0);
	CHECK(strcmp(sa_hash_selected(), sa_hash_kernel_name(fastest)) == 0);

	/* What cannot be had is an error, and the choice stays what it was. */
	for (int k = 0; k < count; k++) {
		const char *name = sa_hash_kernel_name(k);
		const int state = sa_hash_kernel_state(k);
		const int want = state == SA_KERNEL_RUNS ? 0 : state == SA_KERNEL_NO_CPU ? -ENOTSUP : -ENOSYS;

		CHECK(sa_hash_select("scalar") == 0);
		CHECK(sa_hash_select(name) == want);
		CHECK(strcmp(sa_hash_selected(), want == 0 ? name : "scalar") == 0);
		CHECK(sa_hash_select("sse9") == -ENOENT);
		CHECK(sa_hash_select("") == -ENOENT);
		CHECK(sa_hash_select("AUTO") == -ENOENT);
		CHECK(sa_hash_select(NULL) == -ENOENT);
		CHECK(strcmp(sa_hash_selected(), want == 0 ? name : "scalar") == 0);
	}
}

static void test_arguments(void)
{
	static const uint8_t page[SA_PAGE_SIZE];
	uint8_t key[SA_FP_SIZE] = {0};
	uint8_t fp[SA_FP_SIZE];

	CHECK(sa_fingerprint_pages(key, page, 0, NULL, NULL) == 0);
	CHECK(sa_fingerprint_pages(key, NULL, 0, fp, NULL) == 0);
	CHECK(sa_fingerprint_pages(NULL, page, 1, fp, NULL) == -EINVAL);
	CHECK(sa_fingerprint_pages(key, NULL, 1, fp, NULL) == -EINVAL);
	CHECK(sa_fingerprint_pages(key, page, 1, NULL, NULL) == -EINVAL);
	CHECK(sa_file_root(0, NULL, 1, fp) == -EINVAL);
	CHECK(sa_file_root(0, page, 1, NULL) == -EINVAL);
	CHECK(sa_file_root(0, page, SIZE_MAX / SA_FP_SIZE, fp) == -EINVAL);
}

int main(void)
{
	test_kernels();
	test_arguments();
	for (int k = 0; k < sa_hash_kernel_count(); k++) {
		const char *kernel = sa_hash_kernel_name(k);

		if (sa_hash_kernel_state(k) != SA_KERNEL_RUNS)
			continue;
		CHECK(sa_hash_select(kernel) == 0);
		test_page_goldens();
		test_root_goldens();
		test_zero_flags();
		test_no_read_beyond();
		if (k > 0) {
			test_pages_like_scalar(kernel);
			test_roots_like_scalar(kernel);
		}
	}
	return check_done("test_hash");
}
