/*
 * hash_avx512.c - the kernel "avx512": 16, 8 and 4 chunks side by side (4, 2 and 1 pages), with vprord rotations.
 * The algorithm is in hash_lanes.h, batches and tails are in hash.c. No build flags of its own (hash_kernel.h).
 */
#include "hash_kernel.h"

#if SA_HASH_X86

#include <immintrin.h>

#define SA_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq")))
#define SA_AVX512_INLINE static inline __attribute__((always_inline)) SA_AVX512

typedef uint32_t v16 __attribute__((vector_size(64)));
typedef uint32_t v8 __attribute__((vector_size(32)));
typedef uint32_t v4 __attribute__((vector_size(16)));

SA_AVX512_INLINE v16 load16(const uint8_t *p, size_t stride)
{
	__m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i_u *)p));

	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i_u *)(p + 4 * stride)), 1);
	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i_u *)(p + 8 * stride)), 2);
	v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i_u *)(p + 12 * stride)), 3);
	return (v16)v;
}

SA_AVX512_INLINE void store16(uint8_t *p, size_t stride, v16 v)
{
	_mm_storeu_si128((__m128i_u *)p, _mm512_castsi512_si128((__m512i)v));
	_mm_storeu_si128((__m128i_u *)(p + 4 * stride), _mm512_extracti32x4_epi32((__m512i)v, 1));
	_mm_storeu_si128((__m128i_u *)(p + 8 * stride), _mm512_extracti32x4_epi32((__m512i)v, 2));
	_mm_storeu_si128((__m128i_u *)(p + 12 * stride), _mm512_extracti32x4_epi32((__m512i)v, 3));
}

SA_AVX512_INLINE v8 load8(const uint8_t *p, size_t stride)
{
	const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i_u *)p));

	return (v8)_mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i_u *)(p + 4 * stride)), 1);
}

SA_AVX512_INLINE void store8(uint8_t *p, size_t stride, v8 v)
{
	_mm_storeu_si128((__m128i_u *)p, _mm256_castsi256_si128((__m256i)v));
	_mm_storeu_si128((__m128i_u *)(p + 4 * stride), _mm256_extracti128_si256((__m256i)v, 1));
}

#define SA_LANES 16
#define SA_TARGET SA_AVX512
#define SA_FN(name) name##_16
#define SA_VEC v16
#define SA_ROR(x, n) ((v16)_mm512_ror_epi32((__m512i)(x), n))
#define SA_LOAD(p, s) load16(p, s)
#define SA_STORE(p, s, v) store16(p, s, v)
#define SA_LO32(a, b) ((v16)_mm512_unpacklo_epi32((__m512i)(a), (__m512i)(b)))
#define SA_HI32(a, b) ((v16)_mm512_unpackhi_epi32((__m512i)(a), (__m512i)(b)))
#define SA_LO64(a, b) ((v16)_mm512_unpacklo_epi64((__m512i)(a), (__m512i)(b)))
#define SA_HI64(a, b) ((v16)_mm512_unpackhi_epi64((__m512i)(a), (__m512i)(b)))
#include "hash_lanes.h"

#define SA_LANES 8
#define SA_TARGET SA_AVX512
#define SA_FN(name) name##_8
#define SA_VEC v8
#define SA_ROR(x, n) ((v8)_mm256_ror_epi32((__m256i)(x), n))
#define SA_LOAD(p, s) load8(p, s)
#define SA_STORE(p, s, v) store8(p, s, v)
#define SA_LO32(a, b) ((v8)_mm256_unpacklo_epi32((__m256i)(a), (__m256i)(b)))
#define SA_HI32(a, b) ((v8)_mm256_unpackhi_epi32((__m256i)(a), (__m256i)(b)))
#define SA_LO64(a, b) ((v8)_mm256_unpacklo_epi64((__m256i)(a), (__m256i)(b)))
#define SA_HI64(a, b) ((v8)_mm256_unpackhi_epi64((__m256i)(a), (__m256i)(b)))
#include "hash_lanes.h"

#define SA_LANES 4
#define SA_TARGET SA_AVX512
#define SA_FN(name) name##_4
#define SA_VEC v4
#define SA_ROR(x, n) ((v4)_mm_ror_epi32((__m128i)(x), n))
#define SA_LOAD(p, s) ((void)(s), (v4)_mm_loadu_si128((const __m128i_u *)(p)))
#define SA_STORE(p, s, v) ((void)(s), _mm_storeu_si128((__m128i_u *)(p), (__m128i)(v)))
#define SA_LO32(a, b) ((v4)_mm_unpacklo_epi32((__m128i)(a), (__m128i)(b)))
#define SA_HI32(a, b) ((v4)_mm_unpackhi_epi32((__m128i)(a), (__m128i)(b)))
#define SA_LO64(a, b) ((v4)_mm_unpacklo_epi64((__m128i)(a), (__m128i)(b)))
#define SA_HI64(a, b) ((v4)_mm_unpackhi_epi64((__m128i)(a), (__m128i)(b)))
#include "hash_lanes.h"

const struct sa_hash_steps sa_hash_avx512_steps = {
	3, {{16, chunks_16, parents_16}, {8, chunks_8, parents_8}, {4, chunks_4, parents_4}}};

#else

typedef int sa_hash_avx512_not_built; /* ISO C wants a declaration in every file */

#endif
