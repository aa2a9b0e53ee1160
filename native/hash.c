/*
 * hash.c - page fingerprints and file roots: BLAKE3-256 of many pages at once, and of one long list of fingerprints.
 *
 * Here: the scalar kernel, which defines the result; batches, tails and trees, the same for every kernel; the choice
 * of a kernel. Left to hash_avx2.c and hash_avx512.c: many chunks side by side. Left to pagecache.c: where pages come
 * from.
 * No build flags of its own (hash_kernel.h).
 *
 * Source: "BLAKE3: one function, fast everywhere" (2021-11-05), section 2.
 */
#include "hash_kernel.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

enum {
	PAGE_CHUNKS = SA_PAGE_SIZE / SA_B3_CHUNK,
	BATCH_PAGES = 16,   /* so that even the 16 roots of a batch fill the widest step */
	SUBTREE_CHUNKS = 64 /* chunks of a file root between two visits to the stack; a power of two */
};

/* ------------------------------------------------------------------------------------------ the scalar kernel */

static uint32_t ror32(uint32_t x, unsigned n)
{
	return (x >> n) | (x << (32 - n));
}

static inline void mix(uint32_t *v, size_t a, size_t b, size_t c, size_t d, uint32_t x, uint32_t y)
{
	v[a] += v[b] + x;
	v[d] = ror32(v[d] ^ v[a], 16);
	v[c] += v[d];
	v[b] = ror32(v[b] ^ v[c], 12);
	v[a] += v[b] + y;
	v[d] = ror32(v[d] ^ v[a], 8);
	v[c] += v[d];
	v[b] = ror32(v[b] ^ v[c], 7);
}

#define SCALAR_ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15) \
	mix(v, 0, 4, 8, 12, m[s0], m[s1]);                                                 \
	mix(v, 1, 5, 9, 13, m[s2], m[s3]);                                                 \
	mix(v, 2, 6, 10, 14, m[s4], m[s5]);                                                \
	mix(v, 3, 7, 11, 15, m[s6], m[s7]);                                                \
	mix(v, 0, 5, 10, 15, m[s8], m[s9]);                                                \
	mix(v, 1, 6, 11, 12, m[s10], m[s11]);                                              \
	mix(v, 2, 7, 8, 13, m[s12], m[s13]);                                               \
	mix(v, 3, 4, 9, 14, m[s14], m[s15]);

/* h becomes the chaining value after one block of 64 bytes, of which length count. Returns the OR of all its words. */
static uint32_t compress(uint32_t *h, const uint8_t *block, uint32_t length, uint64_t counter, uint32_t flags)
{
	uint32_t m[16];
	uint32_t v[16] = {h[0],
	                  h[1],
	                  h[2],
	                  h[3],
	                  h[4],
	                  h[5],
	                  h[6],
	                  h[7],
	                  SA_B3_IV0,
	                  SA_B3_IV1,
	                  SA_B3_IV2,
	                  SA_B3_IV3,
	                  (uint32_t)counter,
	                  (uint32_t)(counter >> 32),
	                  length,
	                  flags};
	uint32_t used = 0;

	memcpy(m, block, sizeof m);
	for (size_t i = 0; i < 16; i++)
		used |= m[i];
	SA_B3_ROUNDS(SCALAR_ROUND)
	for (size_t i = 0; i < 8; i++)
		h[i] = v[i] ^ v[i + 8];
	return used;
}

static void scalar_chunks(const uint32_t *key, uint32_t flags, uint64_t counter, uint64_t counter_mask,
                          const uint8_t *in, uint8_t *ret_cvs, uint8_t *ret_used)
{
	uint32_t h[SA_B3_CV_WORDS];
	uint32_t used = 0;

	memcpy(h, key, sizeof h);
	for (size_t b = 0; b < SA_B3_CHUNK_BLOCKS; b++) {
		const uint32_t first = b == 0 ? SA_B3_CHUNK_START : 0;
		const uint32_t last = b == SA_B3_CHUNK_BLOCKS - 1 ? SA_B3_CHUNK_END : 0;

		used |= compress(h, in + b * SA_B3_BLOCK, SA_B3_BLOCK, counter & counter_mask, flags | first | last);
	}
	memcpy(ret_cvs, h, sizeof h);
	*ret_used = used != 0;
}

static void scalar_parents(const uint32_t *key, uint32_t flags, const uint8_t *cvs, uint8_t *ret_cvs)
{
	uint32_t h[SA_B3_CV_WORDS];

	memcpy(h, key, sizeof h);
	compress(h, cvs, SA_B3_BLOCK, 0, flags | SA_B3_PARENT);
	memcpy(ret_cvs, h, sizeof h);
}

static const struct sa_hash_steps scalar_steps = {1, {{1, scalar_chunks, scalar_parents}}};

/* ------------------------------------------------------------------------------------------- choosing a kernel */

struct kernel {
	const char *name;
	const struct sa_hash_steps *steps; /* NULL: not built */
};

/* Slowest first. */
enum { KERNEL_SCALAR, KERNEL_AVX2, KERNEL_AVX512, KERNEL_COUNT };

static const struct kernel kernels[KERNEL_COUNT] = {
	[KERNEL_SCALAR] = {"scalar", &scalar_steps},
#if SA_HASH_X86
	[KERNEL_AVX2] = {"avx2", &sa_hash_avx2_steps},
	[KERNEL_AVX512] = {"avx512", &sa_hash_avx512_steps},
#else
	[KERNEL_AVX2] = {"avx2", NULL},
	[KERNEL_AVX512] = {"avx512", NULL},
#endif
};

/* -1: nobody has chosen yet. Two threads that find -1 both store the same answer, so relaxed order is enough. */
static atomic_int selected = -1;

/* __builtin_cpu_supports also asks whether the operating system saves the wide registers (XGETBV). */
static int cpu_runs(int kernel)
{
#if SA_HASH_X86
	if (kernel == KERNEL_AVX2)
		return __builtin_cpu_supports("avx2") != 0;
	if (kernel == KERNEL_AVX512)
		return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
		       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
	return kernel == KERNEL_SCALAR;
}

int sa_hash_kernel_count(void)
{
	return KERNEL_COUNT;
}

const char *sa_hash_kernel_name(int kernel)
{
	if (kernel < 0 || kernel >= KERNEL_COUNT)
		return NULL;
	return kernels[kernel].name;
}

int sa_hash_kernel_state(int kernel)
{
	if (kernel < 0 || kernel >= KERNEL_COUNT)
		return -EINVAL;
	if (!kernels[kernel].steps)
		return SA_KERNEL_NOT_BUILT;
	return cpu_runs(kernel) ? SA_KERNEL_RUNS : SA_KERNEL_NO_CPU;
}

static int fastest_kernel(void)
{
	int kernel = KERNEL_COUNT - 1;

	while (kernel > KERNEL_SCALAR && sa_hash_kernel_state(kernel) != SA_KERNEL_RUNS)
		kernel--;
	return kernel;
}

static int selected_kernel(void)
{
	int kernel = atomic_load_explicit(&selected, memory_order_relaxed);

	if (kernel < 0) {
		kernel = fastest_kernel();
		atomic_store_explicit(&selected, kernel, memory_order_relaxed);
	}
	return kernel;
}

int sa_hash_select(const char *name)
{
	int kernel = 0;

	if (!name)
		return -ENOENT;
	if (strcmp(name, "auto") == 0) {
		kernel = fastest_kernel();
	} else {
		while (kernel < KERNEL_COUNT && strcmp(name, kernels[kernel].name) != 0)
			kernel++;
		if (kernel == KERNEL_COUNT)
			return -ENOENT;
		if (sa_hash_kernel_state(kernel) == SA_KERNEL_NOT_BUILT)
			return -ENOSYS;
		if (sa_hash_kernel_state(kernel) == SA_KERNEL_NO_CPU)
			return -ENOTSUP;
	}
	atomic_store_explicit(&selected, kernel, memory_order_relaxed);
	return 0;
}

const char *sa_hash_selected(void)
{
	return kernels[selected_kernel()].name;
}

/* -------------------------------------------------------------------------------- any number of chunks, parents */

/* The step for what is left when no step of the kernel fits any more: the narrowest one, filled up with zeros, unless
 * one lane is all that is needed (measured: scalar is faster then). */
static const struct sa_hash_step *rest_step(const struct sa_hash_steps *steps, size_t rest)
{
	return rest == 1 ? &scalar_steps.step[0] : &steps->step[steps->count - 1];
}

/* Chaining values of n whole chunks; ret_used: see struct sa_hash_step. */
static void hash_chunks(const struct sa_hash_steps *steps, const uint32_t *key, uint32_t flags, uint64_t counter,
                        uint64_t counter_mask, const uint8_t *in, size_t n, uint8_t *ret_cvs, uint8_t *ret_used)
{
	uint8_t padded[SA_B3_NARROWEST * SA_B3_CHUNK];
	uint8_t cvs[SA_B3_NARROWEST * SA_B3_CV];
	uint8_t used[SA_B3_NARROWEST];
	size_t done = 0;
	size_t rest;

	for (size_t s = 0; s < steps->count; s++) {
		const struct sa_hash_step *step = &steps->step[s];

		for (; n - done >= step->lanes; done += step->lanes)
			step->chunks(key, flags, counter + done, counter_mask, in + done * SA_B3_CHUNK,
			             ret_cvs + done * SA_B3_CV, ret_used + done);
	}
	rest = n - done;
	if (rest == 0)
		return;
	memcpy(padded, in + done * SA_B3_CHUNK, rest * SA_B3_CHUNK);
	memset(padded + rest * SA_B3_CHUNK, 0, sizeof padded - rest * SA_B3_CHUNK);
	rest_step(steps, rest)->chunks(key, flags, counter + done, counter_mask, padded, cvs, used);
	memcpy(ret_cvs + done * SA_B3_CV, cvs, rest * SA_B3_CV);
	memcpy(ret_used + done, used, rest);
}

/* Chaining values of n parents; ret_cvs may be cvs. */
static void hash_parents(const struct sa_hash_steps *steps, const uint32_t *key, uint32_t flags, const uint8_t *cvs,
                         size_t n, uint8_t *ret_cvs)
{
	uint8_t padded[SA_B3_NARROWEST * SA_B3_BLOCK] = {0};
	size_t done = 0;
	size_t rest;

	for (size_t s = 0; s < steps->count; s++) {
		const struct sa_hash_step *step = &steps->step[s];

		for (; n - done >= step->lanes; done += step->lanes)
			step->parents(key, flags, cvs + done * SA_B3_BLOCK, ret_cvs + done * SA_B3_CV);
	}
	rest = n - done;
	if (rest == 0)
		return;
	memcpy(padded, cvs + done * SA_B3_BLOCK, rest * SA_B3_BLOCK);
	rest_step(steps, rest)->parents(key, flags, padded, padded);
	memcpy(ret_cvs + done * SA_B3_CV, padded, rest * SA_B3_CV);
}

/* ------------------------------------------------------------------------------------------------------- pages */

int sa_fingerprint_pages(const uint8_t *key, const uint8_t *pages, size_t npages, uint8_t *ret_fps, uint8_t *ret_zero)
{
	const struct sa_hash_steps *steps = kernels[selected_kernel()].steps;
	uint32_t words[SA_B3_CV_WORDS];
	uint8_t cvs[BATCH_PAGES * PAGE_CHUNKS * SA_B3_CV];
	uint8_t used[BATCH_PAGES * PAGE_CHUNKS];

	_Static_assert(PAGE_CHUNKS == 4, "two levels of parents, and the counter mask below");
	if (npages == 0)
		return 0;
	if (!key || !pages || !ret_fps)
		return -EINVAL;
	memcpy(words, key, sizeof words);
	for (size_t done = 0; done < npages;) {
		const size_t n = npages - done < BATCH_PAGES ? npages - done : BATCH_PAGES;

		hash_chunks(steps, words, SA_B3_KEYED_HASH, 0, PAGE_CHUNKS - 1, pages + done * SA_PAGE_SIZE,
		            n * PAGE_CHUNKS, cvs, used);
		hash_parents(steps, words, SA_B3_KEYED_HASH, cvs, 2 * n, cvs);
		hash_parents(steps, words, SA_B3_KEYED_HASH | SA_B3_ROOT, cvs, n, ret_fps + done * SA_FP_SIZE);
		if (ret_zero)
			for (size_t i = 0; i < n; i++) {
				const uint8_t *u = used + i * PAGE_CHUNKS;

				ret_zero[done + i] = (u[0] | u[1] | u[2] | u[3]) == 0;
			}
		done += n;
	}
	return 0;
}

/* -------------------------------------------------------------------------------------------------- file roots */

static const char root_context[] = "sharearea 2026-11-20 file root v1";

/* A chunk of length bytes, 1024 at the most; last_flags go to its last block only. */
static void hash_short_chunk(const uint32_t *key, uint32_t flags, uint64_t counter, const uint8_t *in, size_t length,
                             uint32_t last_flags, uint8_t *ret_cv)
{
	uint32_t h[SA_B3_CV_WORDS];
	uint32_t first = SA_B3_CHUNK_START;
	uint8_t block[SA_B3_BLOCK] = {0};

	memcpy(h, key, sizeof h);
	for (; length > SA_B3_BLOCK; in += SA_B3_BLOCK, length -= SA_B3_BLOCK) {
		compress(h, in, SA_B3_BLOCK, counter, flags | first);
		first = 0;
	}
	memcpy(block, in, length);
	compress(h, block, (uint32_t)length, counter, flags | first | SA_B3_CHUNK_END | last_flags);
	memcpy(ret_cv, h, sizeof h);
}

/* The n bytes that a file root is taken of: 8 bytes of size, then the fingerprints where they lie. Only chunk 0 has
 * bytes of both; every later one lies in the fingerprints, 8 bytes before a multiple of 1024. */
struct root_input {
	uint64_t size;
	const uint8_t *fps;
	size_t bytes;
};

static void root_key(uint32_t *ret_key)
{
	static const uint32_t iv[SA_B3_CV_WORDS] = {SA_B3_IV0, SA_B3_IV1, SA_B3_IV2, SA_B3_IV3,
	                                            SA_B3_IV4, SA_B3_IV5, SA_B3_IV6, SA_B3_IV7};
	uint8_t cv[SA_B3_CV];

	hash_short_chunk(iv, SA_B3_DERIVE_KEY_CONTEXT, 0, (const uint8_t *)root_context, sizeof root_context - 1,
	                 SA_B3_ROOT, cv);
	memcpy(ret_key, cv, sizeof cv);
}

/* Chaining values of chunks [first, first + n) of the input; last_flags go to the input's last block, if it is here. */
static void root_chunks(const struct sa_hash_steps *steps, const uint32_t *key, const struct root_input *input,
                        size_t first, size_t n, uint32_t last_flags, uint8_t *ret_cvs)
{
	const uint32_t flags = SA_B3_DERIVE_KEY_MATERIAL;
	uint8_t used[SUBTREE_CHUNKS]; /* asked of every kernel, of no use here */
	size_t done = 0;
	size_t whole;

	if (first == 0) {
		const size_t bytes = input->bytes < SA_B3_CHUNK ? input->bytes : SA_B3_CHUNK;
		const int is_last = bytes == input->bytes;
		uint8_t chunk[SA_B3_CHUNK];

		memcpy(chunk, &input->size, sizeof input->size);
		if (bytes > sizeof input->size)
			memcpy(chunk + sizeof input->size, input->fps, bytes - sizeof input->size);
		hash_short_chunk(key, flags, 0, chunk, bytes, is_last ? last_flags : 0, ret_cvs);
		done = 1;
	}
	whole = input->bytes / SA_B3_CHUNK;
	whole = whole < first + done ? 0 : whole - first - done;
	if (whole > n - done)
		whole = n - done;
	if (whole > 0)
		hash_chunks(steps, key, flags, first + done, UINT64_MAX,
		            input->fps + (first + done) * SA_B3_CHUNK - sizeof input->size, whole,
		            ret_cvs + done * SA_B3_CV, used);
	done += whole;
	if (done < n)
		hash_short_chunk(key, flags, first + done,
		                 input->fps + (first + done) * SA_B3_CHUNK - sizeof input->size,
		                 input->bytes % SA_B3_CHUNK, last_flags, ret_cvs + done * SA_B3_CV);
}

/* Merge n chaining values level by level, an odd one going up as it is, until at most goal are left; returns how many.
 * This is BLAKE3's tree: the left child of a node is the largest complete tree that leaves something for the right. */
static size_t merge(const struct sa_hash_steps *steps, const uint32_t *key, uint8_t *cvs, size_t n, size_t goal)
{
	while (n > goal) {
		hash_parents(steps, key, SA_B3_DERIVE_KEY_MATERIAL, cvs, n / 2, cvs);
		if (n % 2)
			memmove(cvs + n / 2 * SA_B3_CV, cvs + (n - 1) * SA_B3_CV, SA_B3_CV);
		n = n / 2 + n % 2;
	}
	return n;
}

int sa_file_root(uint64_t size, const uint8_t *fps, size_t npages, uint8_t *ret_root)
{
	const struct sa_hash_steps *steps = kernels[selected_kernel()].steps;
	const struct root_input input = {size, fps, sizeof size + npages * SA_FP_SIZE};
	const size_t nchunks = (input.bytes + SA_B3_CHUNK - 1) / SA_B3_CHUNK;
	uint32_t key[SA_B3_CV_WORDS];
	uint8_t cvs[SUBTREE_CHUNKS * SA_B3_CV];
	uint8_t stack[(64 + 2) * SA_B3_CV]; /* one per bit of the number of subtrees, and what is being added */
	size_t depth = 0;

	if (!ret_root || (!fps && npages > 0) || npages > SIZE_MAX / SA_FP_SIZE / 2)
		return -EINVAL;
	root_key(key);
	if (nchunks == 1) {
		root_chunks(steps, key, &input, 0, 1, SA_B3_ROOT, ret_root);
		return 0;
	}
	for (size_t first = 0; first < nchunks; first += SUBTREE_CHUNKS) {
		size_t n = nchunks - first < SUBTREE_CHUNKS ? nchunks - first : SUBTREE_CHUNKS;
		const size_t complete = first / SUBTREE_CHUNKS;

		root_chunks(steps, key, &input, first, n, 0, cvs);
		/* The two children of the root must be left: it is hashed with a flag of its own, below. */
		n = merge(steps, key, cvs, n, nchunks <= SUBTREE_CHUNKS ? 2 : 1);
		/* Subtrees before this one merge like the bits of their number carry, and only now, when it is certain
		 * that something comes after them, so that none of these parents is the root. */
		while (depth > (size_t)__builtin_popcountll(complete)) {
			depth--;
			hash_parents(steps, key, SA_B3_DERIVE_KEY_MATERIAL, stack + (depth - 1) * SA_B3_CV, 1,
			             stack + (depth - 1) * SA_B3_CV);
		}
		memcpy(stack + depth * SA_B3_CV, cvs, n * SA_B3_CV);
		depth += n;
	}
	for (; depth > 1; depth--)
		hash_parents(steps, key, SA_B3_DERIVE_KEY_MATERIAL | (depth == 2 ? SA_B3_ROOT : 0),
		             stack + (depth - 2) * SA_B3_CV, 1, stack + (depth - 2) * SA_B3_CV);
	memcpy(ret_root, stack, SA_FP_SIZE);
	return 0;
}
