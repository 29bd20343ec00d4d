/* Vector operations (rows.h) of AVX2, with FMA and F16C. The sixteen levels are two registers; bit 3 of a code selects one. */
#pragma once
#include "kernel.h"
#include "x86_bytes.h"

#define LANES 8
typedef __m256 V;
typedef __m256i W;
typedef struct {
    __m256 low, high;
} T;

#define v_set1 _mm256_set1_ps
#define v_keep(a) __asm__("" : "+x"(a))
#define v_fma _mm256_fmadd_ps
/* out[i] = lane i of a, b, c, d in its low half, and lane i + 4 of them in its high half. */
static inline void v_quarters(V a, V b, V c, V d, V *out)
{
    const __m256d low[2] = {(__m256d)_mm256_unpacklo_ps(a, b), (__m256d)_mm256_unpacklo_ps(c, d)};
    const __m256d high[2] = {(__m256d)_mm256_unpackhi_ps(a, b), (__m256d)_mm256_unpackhi_ps(c, d)};
    out[0] = (V)_mm256_unpacklo_pd(low[0], low[1]), out[1] = (V)_mm256_unpackhi_pd(low[0], low[1]);
    out[2] = (V)_mm256_unpacklo_pd(high[0], high[1]), out[3] = (V)_mm256_unpackhi_pd(high[0], high[1]);
}
static inline void v_transpose(V *v)
{
    V front[4], back[4];
    v_quarters(v[0], v[1], v[2], v[3], front);
    v_quarters(v[4], v[5], v[6], v[7], back);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(front[i], back[i], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(front[i], back[i], 0x31);
    }
}
static inline V v_sums(V *v)
{
    const V front = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const V back = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(front, back, 0x20), _mm256_permute2f128_ps(front, back, 0x31));
}
#define v_spread(a, index) _mm256_permutevar8x32_ps(a, _mm256_loadu_si256((const __m256i *)(index)))

static inline T table_load(const float *levels) { return (T){_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)}; }
static inline __attribute__((always_inline)) V v_lookup(T table, W words, const int k)
{
    const W index = _mm256_srli_epi32(words, 4 * k); /* the permute reads three bits of an index */
    const V bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * k)); /* the blend reads the sign bit */
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                            _mm256_permutevar8x32_ps(table.high, index), bit3);
}
static inline W bytes_load(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }

/* v_code is a binary search: the bits of a code that are found select the boundary for the next bit. */
typedef struct {
    V bit3, bit2[2], bit1, bit0; /* bit1 and bit0: looked up with the bits found so far */
} B;
static inline B boundaries_load(const float *p)
{
    return (B){
        _mm256_set1_ps(p[7]),
        {_mm256_set1_ps(p[3]), _mm256_set1_ps(p[11])},
        _mm256_setr_ps(p[1], p[5], p[9], p[13], 0.0f, 0.0f, 0.0f, 0.0f),
        _mm256_setr_ps(p[0], p[2], p[4], p[6], p[8], p[10], p[12], p[14]),
    };
}
static inline W v_code(B b, V a)
{
#define ABOVE(boundary) _mm256_castps_si256(_mm256_cmp_ps(a, boundary, _CMP_GT_OQ)) /* -1 or 0 */
#define TWICE_LESS(code, above) _mm256_sub_epi32(_mm256_add_epi32(code, code), above)
    const W bit3 = ABOVE(b.bit3);
    const W bit2 = ABOVE(_mm256_blendv_ps(b.bit2[0], b.bit2[1], _mm256_castsi256_ps(bit3)));
    W code = TWICE_LESS(_mm256_abs_epi32(bit3), bit2);
    code = TWICE_LESS(code, ABOVE(_mm256_permutevar8x32_ps(b.bit1, code)));
    return TWICE_LESS(code, ABOVE(_mm256_permutevar8x32_ps(b.bit0, code)));
}
static inline void codes_store(uint8_t *p, W codes)
{
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}

#define one_half _cvtsh_ss
#define v_half(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define v_bfloat(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))

static inline void v_to_half(uint16_t *p, V a)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline W steps_load(const uint8_t *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
#define steps_lookup _mm256_shuffle_epi8

#define FUSED_BATCH 4
#define FUSED_INPUTS 4
#define MANY_VECTORS 2
#define MANY_INPUTS 6
#define FEW_ROWS(M) ((M) <= 4 ? 2 : 1)
#define TILE_VECTORS 2
#define GRAD_SIXTEEN 16
#define TORCH_FLOAT_ROWS 256
