/*
 * hash_kernel.h - what hash.c and its kernels (hash_avx2.c, hash_avx512.c) agree on: BLAKE3's constants, and what a
 * kernel is. Batches, tails, trees and the choice of a kernel are hash.c's.
 *
 * Build: no file of the hash needs a flag of its own. Each vector function carries its instruction set as a function
 * attribute, and the vector files are empty but for a marker where SA_HASH_X86 is 0: list them all, everywhere.
 *
 * Source of every constant: "BLAKE3: one function, fast everywhere" (2021-11-05), sections 2.2 to 2.6.
 */
#ifndef SA_HASH_KERNEL_H
#define SA_HASH_KERNEL_H

#include "sa.h"

/* -DSA_HASH_X86=0 builds what other processors get. */
#ifndef SA_HASH_X86
#if defined(__x86_64__) && defined(__GNUC__)
#define SA_HASH_X86 1
#else
#define SA_HASH_X86 0
#endif
#endif

enum {
	SA_B3_BLOCK = 64,
	SA_B3_CHUNK = 1024,
	SA_B3_CHUNK_BLOCKS = SA_B3_CHUNK / SA_B3_BLOCK,
	SA_B3_CV = 32, /* bytes of a chaining value */
	SA_B3_CV_WORDS = 8,
	SA_B3_NARROWEST = 4 /* lanes of the narrowest step of every vector kernel */
};

/* Domain separation flags. */
#define SA_B3_CHUNK_START 0x01U
#define SA_B3_CHUNK_END 0x02U
#define SA_B3_PARENT 0x04U
#define SA_B3_ROOT 0x08U
#define SA_B3_KEYED_HASH 0x10U
#define SA_B3_DERIVE_KEY_CONTEXT 0x20U
#define SA_B3_DERIVE_KEY_MATERIAL 0x40U

#define SA_B3_IV0 0x6a09e667U
#define SA_B3_IV1 0xbb67ae85U
#define SA_B3_IV2 0x3c6ef372U
#define SA_B3_IV3 0xa54ff53aU
#define SA_B3_IV4 0x510e527fU
#define SA_B3_IV5 0x9b05688cU
#define SA_B3_IV6 0x1f83d9abU
#define SA_B3_IV7 0x5be0cd19U

/* The seven rounds: which message word each quarter round takes. Row n + 1 is row n permuted by row 1. */
#define SA_B3_ROUNDS(ROUND)                                         \
	ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) \
	ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8) \
	ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1) \
	ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6) \
	ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4) \
	ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7) \
	ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)

/* One width of a kernel: exactly `lanes` chunks or parents side by side, never fewer, never more. */
struct sa_hash_step {
	size_t lanes;

	/* Chaining values of `lanes` whole chunks that lie one after the other at in. Chunk i has the counter
	 * (counter + i) & counter_mask; flags go to every block. ret_cvs: lanes * 32 bytes. ret_used: lanes bytes, 1
	 * where a chunk has a byte that is not zero. */
	void (*chunks)(const uint32_t *key, uint32_t flags, uint64_t counter, uint64_t counter_mask, const uint8_t *in,
	               uint8_t *ret_cvs, uint8_t *ret_used);

	/* Chaining values of `lanes` parents; the two children of parent i are at cvs + 64 * i. ret_cvs: lanes * 32
	 * bytes, and may be cvs itself: all children are loaded before anything is stored. */
	void (*parents)(const uint32_t *key, uint32_t flags, const uint8_t *cvs, uint8_t *ret_cvs);
};

/* Widths of a kernel, widest first; each divides the one before it. */
struct sa_hash_steps {
	size_t count;
	struct sa_hash_step step[3];
};

#if SA_HASH_X86
extern const struct sa_hash_steps sa_hash_avx2_steps;
extern const struct sa_hash_steps sa_hash_avx512_steps;
#endif

#endif
