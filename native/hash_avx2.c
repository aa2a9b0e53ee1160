/*
 * hash_avx2.c - the kernel "avx2": 8 and 4 chunks side by side (2 and 1 pages). Rotations by 16 and 8 are byte
 * shuffles, those by 12 and 7 two shifts. The algorithm is in hash_lanes.h, batches and tails are in hash.c. No build
 * flags of its own (hash_kernel.h).
 */
#include "hash_kernel.h"

#if SA_HASH_X86

#include <immintrin.h>

#define SA_AVX2 __attribute__((target("avx2")))
#define SA_AVX2_INLINE static inline __attribute__((always_inline)) SA_AVX2

typedef uint32_t v8 __attribute__((vector_size(32)));
typedef uint32_t v4 __attribute__((vector_size(16)));

/* Byte shuffles for rotations by 16 and 8, once per 128-bit part. */
static const uint8_t shuffle_16[32] __attribute__((aligned(32))) = {
	2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
static const uint8_t shuffle_8[32] __attribute__((aligned(32))) = {
	1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12, 1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12};

/* In assembly so that the shuffle stays in memory: the 16 registers are all needed for the state, and the compiler
 * would keep the two shuffles in two of them (measured: a quarter slower). */
SA_AVX2_INLINE v8 ror8(v8 x, unsigned n)
{
	if (n == 16)
		__asm__("vpshufb %1, %0, %0" : "+x"(x) : "m"(shuffle_16));
	else if (n == 8)
		__asm__("vpshufb %1, %0, %0" : "+x"(x) : "m"(shuffle_8));
	else
		x = (x >> n) | (x << (32 - n));
	return x;
}

SA_AVX2_INLINE v4 ror4(v4 x, unsigned n)
{
	if (n == 16)
		__asm__("vpshufb %1, %0, %0" : "+x"(x) : "m"(shuffle_16));
	else if (n == 8)
		__asm__("vpshufb %1, %0, %0" : "+x"(x) : "m"(shuffle_8));
	else
		x = (x >> n) | (x << (32 - n));
	return x;
}

SA_AVX2_INLINE v8 load8(const uint8_t *p, size_t stride)
{
	const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i_u *)p));

	return (v8)_mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i_u *)(p + 4 * stride)), 1);
}

SA_AVX2_INLINE void store8(uint8_t *p, size_t stride, v8 v)
{
	_mm_storeu_si128((__m128i_u *)p, _mm256_castsi256_si128((__m256i)v));
	_mm_storeu_si128((__m128i_u *)(p + 4 * stride), _mm256_extracti128_si256((__m256i)v, 1));
}

#define SA_LANES 8
#define SA_TARGET SA_AVX2
#define SA_FN(name) name##_8
#define SA_VEC v8
#define SA_ROR(x, n) ror8(x, n)
#define SA_LOAD(p, s) load8(p, s)
#define SA_STORE(p, s, v) store8(p, s, v)
#define SA_LO32(a, b) ((v8)_mm256_unpacklo_epi32((__m256i)(a), (__m256i)(b)))
#define SA_HI32(a, b) ((v8)_mm256_unpackhi_epi32((__m256i)(a), (__m256i)(b)))
#define SA_LO64(a, b) ((v8)_mm256_unpacklo_epi64((__m256i)(a), (__m256i)(b)))
#define SA_HI64(a, b) ((v8)_mm256_unpackhi_epi64((__m256i)(a), (__m256i)(b)))
#include "hash_lanes.h"

#define SA_LANES 4
#define SA_TARGET SA_AVX2
#define SA_FN(name) name##_4
#define SA_VEC v4
#define SA_ROR(x, n) ror4(x, n)
#define SA_LOAD(p, s) ((void)(s), (v4)_mm_loadu_si128((const __m128i_u *)(p)))
#define SA_STORE(p, s, v) ((void)(s), _mm_storeu_si128((__m128i_u *)(p), (__m128i)(v)))
#define SA_LO32(a, b) ((v4)_mm_unpacklo_epi32((__m128i)(a), (__m128i)(b)))
#define SA_HI32(a, b) ((v4)_mm_unpackhi_epi32((__m128i)(a), (__m128i)(b)))
#define SA_LO64(a, b) ((v4)_mm_unpacklo_epi64((__m128i)(a), (__m128i)(b)))
#define SA_HI64(a, b) ((v4)_mm_unpackhi_epi64((__m128i)(a), (__m128i)(b)))
#include "hash_lanes.h"

const struct sa_hash_steps sa_hash_avx2_steps = {2, {{8, chunks_8, parents_8}, {4, chunks_4, parents_4}}};

#else

typedef int sa_hash_avx2_not_built; /* ISO C wants a declaration in every file */

#endif
