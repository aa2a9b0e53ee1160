/*
 * hash_lanes.h - the body of a vector kernel for one number of lanes, included once for each (so it has no include
 * guard). Lane i of every vector belongs to chunk or parent i. Which widths a kernel has, and when which one runs, is
 * left to the includer and to hash.c. No build flags (hash_kernel.h). The includer defines, and this file undefines at
 * its end:
 *
 *   SA_LANES          4, 8 or 16
 *   SA_TARGET         function attribute with the instruction set
 *   SA_FN(name)       the name of a function of this width
 *   SA_VEC            vector of SA_LANES uint32_t
 *   SA_ROR(x, n)      rotate right by n: 16, 12, 8 or 7
 *   SA_LOAD(p, s)     the 16 bytes at p, p + 4s, p + 8s, p + 12s (as many as there are 128-bit parts)
 *   SA_STORE(p, s, v) the other way
 *   SA_LO32, SA_HI32, SA_LO64, SA_HI64   interleave two vectors inside their 128-bit parts
 *
 * A transposition is loads that put the same 16 bytes of chunks j, j + 4, j + 8, j + 12 into one vector, and a 4 by 4
 * transposition inside the 128-bit parts: half the shuffles of a full one, and the loads do the rest.
 */

/* Whole arrays of vectors stay in registers only if every index is a constant. */
#ifdef __clang__
#define SA_UNROLL _Pragma("unroll")
#else
#define SA_UNROLL _Pragma("GCC unroll 16")
#endif
#define SA_INLINE static inline __attribute__((always_inline)) SA_TARGET

SA_INLINE SA_VEC SA_FN(all)(uint32_t word)
{
	return (SA_VEC){0} + word;
}

SA_INLINE void SA_FN(transpose4)(SA_VEC *v)
{
	const SA_VEC a = SA_LO32(v[0], v[1]);
	const SA_VEC b = SA_HI32(v[0], v[1]);
	const SA_VEC c = SA_LO32(v[2], v[3]);
	const SA_VEC d = SA_HI32(v[2], v[3]);

	v[0] = SA_LO64(a, c);
	v[1] = SA_HI64(a, c);
	v[2] = SA_LO64(b, d);
	v[3] = SA_HI64(b, d);
}

/* Message words of one block of each lane; the lanes' blocks are stride bytes apart. */
SA_INLINE void SA_FN(load_block)(const uint8_t *in, size_t stride, SA_VEC *ret_m)
{
	SA_UNROLL
	for (size_t q = 0; q < 4; q++) {
		SA_UNROLL
		for (size_t j = 0; j < 4; j++)
			ret_m[4 * q + j] = SA_LOAD(in + j * stride + 16 * q, stride);
		SA_FN(transpose4)(ret_m + 4 * q);
	}
}

SA_INLINE void SA_FN(store_cvs)(SA_VEC *h, uint8_t *ret_cvs)
{
	SA_UNROLL
	for (size_t q = 0; q < 2; q++) {
		SA_FN(transpose4)(h + 4 * q);
		SA_UNROLL
		for (size_t j = 0; j < 4; j++)
			SA_STORE(ret_cvs + j * SA_B3_CV + 16 * q, SA_B3_CV, h[4 * q + j]);
	}
}

/* Four quarter rounds side by side, each step of all four before the next: they do not depend on one another. The empty
 * assembly keeps the compiler from adding message and b first and a last: b is what the addition has to wait for. */
#define SA_ADD4(x, y) (v[(x)] += v[(y)], v[(x) + 1] += v[(y) + 1], v[(x) + 2] += v[(y) + 2], v[(x) + 3] += v[(y) + 3])
#define SA_MSG4(a, b, c, d)                                             \
	v[0] += m[(a)], v[1] += m[(b)], v[2] += m[(c)], v[3] += m[(d)]; \
	__asm__("" : "+v"(v[0]), "+v"(v[1]), "+v"(v[2]), "+v"(v[3]))
#define SA_MIX(d, a, n) (v[(d)] = SA_ROR(v[(d)] ^ v[(a)], n))

#define SA_ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15) \
	SA_MSG4(s0, s2, s4, s6);                                                       \
	SA_ADD4(0, 4);                                                                 \
	SA_MIX(12, 0, 16), SA_MIX(13, 1, 16), SA_MIX(14, 2, 16), SA_MIX(15, 3, 16);    \
	SA_ADD4(8, 12);                                                                \
	SA_MIX(4, 8, 12), SA_MIX(5, 9, 12), SA_MIX(6, 10, 12), SA_MIX(7, 11, 12);      \
	SA_MSG4(s1, s3, s5, s7);                                                       \
	SA_ADD4(0, 4);                                                                 \
	SA_MIX(12, 0, 8), SA_MIX(13, 1, 8), SA_MIX(14, 2, 8), SA_MIX(15, 3, 8);        \
	SA_ADD4(8, 12);                                                                \
	SA_MIX(4, 8, 7), SA_MIX(5, 9, 7), SA_MIX(6, 10, 7), SA_MIX(7, 11, 7);          \
	SA_MSG4(s8, s10, s12, s14);                                                    \
	v[0] += v[5], v[1] += v[6], v[2] += v[7], v[3] += v[4];                        \
	SA_MIX(15, 0, 16), SA_MIX(12, 1, 16), SA_MIX(13, 2, 16), SA_MIX(14, 3, 16);    \
	v[10] += v[15], v[11] += v[12], v[8] += v[13], v[9] += v[14];                  \
	SA_MIX(5, 10, 12), SA_MIX(6, 11, 12), SA_MIX(7, 8, 12), SA_MIX(4, 9, 12);      \
	SA_MSG4(s9, s11, s13, s15);                                                    \
	v[0] += v[5], v[1] += v[6], v[2] += v[7], v[3] += v[4];                        \
	SA_MIX(15, 0, 8), SA_MIX(12, 1, 8), SA_MIX(13, 2, 8), SA_MIX(14, 3, 8);        \
	v[10] += v[15], v[11] += v[12], v[8] += v[13], v[9] += v[14];                  \
	SA_MIX(5, 10, 7), SA_MIX(6, 11, 7), SA_MIX(7, 8, 7), SA_MIX(4, 9, 7);

/* h becomes the chaining values after one block of 64 bytes. */
SA_INLINE void SA_FN(compress)(SA_VEC *h, const SA_VEC *m, SA_VEC counter_lo, SA_VEC counter_hi, uint32_t flags)
{
	SA_VEC v[16] = {h[0],
	                h[1],
	                h[2],
	                h[3],
	                h[4],
	                h[5],
	                h[6],
	                h[7],
	                SA_FN(all)(SA_B3_IV0),
	                SA_FN(all)(SA_B3_IV1),
	                SA_FN(all)(SA_B3_IV2),
	                SA_FN(all)(SA_B3_IV3),
	                counter_lo,
	                counter_hi,
	                SA_FN(all)(SA_B3_BLOCK),
	                SA_FN(all)(flags)};

	SA_B3_ROUNDS(SA_ROUND)
	SA_UNROLL
	for (size_t i = 0; i < 8; i++)
		h[i] = v[i] ^ v[i + 8];
}

SA_TARGET static void SA_FN(chunks)(const uint32_t *key, uint32_t flags, uint64_t counter, uint64_t counter_mask,
                                    const uint8_t *in, uint8_t *ret_cvs, uint8_t *ret_used)
{
	SA_VEC h[8];
	SA_VEC m[16];
	SA_VEC lo;
	SA_VEC hi;
	SA_VEC used = {0};
	const uintptr_t here = (uintptr_t)in;

	for (size_t i = 0; i < SA_LANES; i++) {
		const uint64_t c = (counter + i) & counter_mask;

		lo[i] = (uint32_t)c;
		hi[i] = (uint32_t)(c >> 32);
	}
	SA_UNROLL
	for (size_t i = 0; i < 8; i++)
		h[i] = SA_FN(all)(key[i]);
	for (size_t b = 0; b < SA_B3_CHUNK_BLOCKS; b++) {
		const uint32_t first = b == 0 ? SA_B3_CHUNK_START : 0;
		const uint32_t last = b == SA_B3_CHUNK_BLOCKS - 1 ? SA_B3_CHUNK_END : 0;

		/* The same block of the chunks that come next: so many streams at once are more than the processor
		 * follows by itself (measured from memory: a quarter faster with it on AVX-512, a fifth on AVX2). The
		 * address may be behind the caller's pages; a prefetch never faults. */
		SA_UNROLL
		for (size_t i = 0; i < SA_LANES; i++)
			__builtin_prefetch((const void *)(here + (SA_LANES + i) * SA_B3_CHUNK + b * SA_B3_BLOCK));
		SA_FN(load_block)(in + b * SA_B3_BLOCK, SA_B3_CHUNK, m);
		SA_UNROLL
		for (size_t i = 0; i < 16; i++)
			used |= m[i];
		SA_FN(compress)(h, m, lo, hi, flags | first | last);
	}
	SA_FN(store_cvs)(h, ret_cvs);
	for (size_t i = 0; i < SA_LANES; i++)
		ret_used[i] = used[i] != 0;
}

SA_TARGET static void SA_FN(parents)(const uint32_t *key, uint32_t flags, const uint8_t *cvs, uint8_t *ret_cvs)
{
	SA_VEC h[8];
	SA_VEC m[16];

	SA_UNROLL
	for (size_t i = 0; i < 8; i++)
		h[i] = SA_FN(all)(key[i]);
	SA_FN(load_block)(cvs, SA_B3_BLOCK, m);
	SA_FN(compress)(h, m, (SA_VEC){0}, (SA_VEC){0}, flags | SA_B3_PARENT);
	SA_FN(store_cvs)(h, ret_cvs);
}

#undef SA_UNROLL
#undef SA_INLINE
#undef SA_ADD4
#undef SA_MSG4
#undef SA_MIX
#undef SA_ROUND
#undef SA_LANES
#undef SA_TARGET
#undef SA_FN
#undef SA_VEC
#undef SA_ROR
#undef SA_LOAD
#undef SA_STORE
#undef SA_LO32
#undef SA_HI32
#undef SA_LO64
#undef SA_HI64
