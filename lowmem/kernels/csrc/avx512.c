/* AVX-512: sixteen levels are one register, and a permute looks sixteen of them up. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "kernel.h"

#define LANES 16
#define LEVEL(name) avx512_##name
typedef __m512 V;
typedef __m512i W;
typedef __m512 T;

#define v_zero _mm512_setzero_ps
#define v_set1 _mm512_set1_ps
#define v_load _mm512_loadu_ps
#define v_store _mm512_storeu_ps
#define v_mul _mm512_mul_ps
#define v_fma _mm512_fmadd_ps
#define v_sum _mm512_reduce_add_ps
#define table_load _mm512_loadu_ps
/* The permute reads four bits of each index, so the nibbles above need not be cleared. */
#define v_lookup(table, words, k) _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * (k)), table)
#define v_spread(p, index) _mm512_permutexvar_ps(_mm512_loadu_si512(index), _mm512_loadu_ps(p))

static inline W words_load(const uint8_t *p, int64_t left)
{
    if (left >= 64)
        return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, p);
}
static inline W bytes_load(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline W block_load(const uint8_t *p)
{
    long long eight;
    memcpy(&eight, p, 8);
    const W twice = _mm512_cvtepu8_epi32(_mm_set1_epi64x(eight));
    return _mm512_srlv_epi32(twice, _mm512_set_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0));
}
static inline void v_from_half(const uint16_t *p, int64_t n, float *out)
{
    for (; n >= 16; n -= 16, p += 16, out += 16)
        _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)));
    if (n > 0) {
        const __mmask16 mask = (__mmask16)((1u << n) - 1);
        _mm512_mask_storeu_ps(out, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)));
    }
}

#define v_half(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define v_bfloat(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))

#include "body.h"

const struct level level_avx512 = {
    "avx512", LANES, avx512_linear, avx512_input_grad, avx512_restore, avx512_half_linear,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
