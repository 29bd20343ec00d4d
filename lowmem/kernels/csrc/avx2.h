/* Vector operations (rows.h) of AVX2 with FMA and F16C. The sixteen levels are two registers; bit 3 of a code selects one. */
#include <immintrin.h>

#include "kernel.h"

#define LANES 8
typedef __m256 V;
typedef __m256i W;
typedef struct {
    __m256 low, high;
} T;

#define v_of_words _mm256_castsi256_ps
#define words_of_v _mm256_castps_si256
#define v_zero _mm256_setzero_ps
#define v_set1 _mm256_set1_ps
#define v_load _mm256_loadu_ps
#define v_store _mm256_storeu_ps
#define v_keep(a) __asm__("" : "+x"(a))
#define v_add _mm256_add_ps
#define v_mul _mm256_mul_ps
#define v_sub _mm256_sub_ps
#define v_div _mm256_div_ps
#define v_fma _mm256_fmadd_ps
#define OWN_SHUFFLES /* v_sum4, v_runs, v_transpose */
static inline void v_sum4(V a, V b, V c, V d, float *out)
{
    const V all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d)); /* partial sums of a, b, c, d in each half */
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
/* Interleave pairs of lanes of a and b, in each half: the low pairs, or the high ones. */
static inline V v_pairs_low(V a, V b)
{
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
static inline V v_pairs_high(V a, V b)
{
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
/* run[i] = lane i of a, b, c, d in its low half, and lane i + 4 of them in its high half. */
static inline void v_quarters(V a, V b, V c, V d, V *run)
{
    const V ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
    const V ab_high = _mm256_unpackhi_ps(a, b), cd_high = _mm256_unpackhi_ps(c, d);
    run[0] = v_pairs_low(ab, cd), run[1] = v_pairs_high(ab, cd);
    run[2] = v_pairs_low(ab_high, cd_high), run[3] = v_pairs_high(ab_high, cd_high);
}
static inline void v_runs(V a, V b, V c, V d, float *out)
{
    V run[4];
    v_quarters(a, b, c, d, run);
    for (int i = 0; i < 4; i++) {
        _mm_storeu_ps(out + 4 * i, _mm256_castps256_ps128(run[i]));
        _mm_storeu_ps(out + 16 + 4 * i, _mm256_extractf128_ps(run[i], 1));
    }
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
#define v_spread(a, index) _mm256_permutevar8x32_ps(a, _mm256_loadu_si256((const __m256i *)(index)))

static inline T table_load(const float *levels)
{
    const T table = {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)};
    return table;
}
static inline __attribute__((always_inline)) V v_lookup(T table, W words, const int k)
{
    const W index = _mm256_srli_epi32(words, 4 * k); /* the permute reads three bits of an index */
    const V bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * k)); /* the blend reads the sign bit */
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                            _mm256_permutevar8x32_ps(table.high, index), bit3);
}
static inline float v_sum(V a)
{
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
static inline W words_load(const uint8_t *p, int64_t left)
{
    if (left >= 32)
        return _mm256_loadu_si256((const __m256i *)p);
    uint8_t part[32] = {0};
    if (left > 0)
        memcpy(part, p, (size_t)left);
    return _mm256_loadu_si256((const __m256i *)part);
}
static inline W bytes_load(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline W block_load(const uint8_t *p)
{
    int four;
    memcpy(&four, p, 4);
    return _mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_set1_epi32(four)), _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0));
}
#define OWN_STEPS
static inline V v_steps(const uint8_t *p, int encoding)
{
    const W steps = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    if (encoding == SCALES_DOUBLE)
        return _mm256_cvtepi32_ps(steps);
    /* 1, or -1 where a byte has the sign bit */
    const W sign = _mm256_sub_epi32(_mm256_set1_epi32(1), _mm256_srli_epi32(_mm256_and_si256(steps, _mm256_set1_epi32(128)), 6));
    return _mm256_cvtepi32_ps(_mm256_sign_epi32(_mm256_and_si256(steps, _mm256_set1_epi32(127)), sign));
}

/* v_code is a binary search: the bits of a code that are found select the boundary for the next bit. */
typedef struct {
    V bit3, bit2[2], bit1, bit0; /* bit1 and bit0: looked up with the bits found so far */
} B;
static inline B boundaries_load(const float *p)
{
    const B b = {
        _mm256_set1_ps(p[7]),
        {_mm256_set1_ps(p[3]), _mm256_set1_ps(p[11])},
        _mm256_setr_ps(p[1], p[5], p[9], p[13], 0.0f, 0.0f, 0.0f, 0.0f),
        _mm256_setr_ps(p[0], p[2], p[4], p[6], p[8], p[10], p[12], p[14]),
    };
    return b;
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
static inline void v_to_bfloat(uint16_t *p, V a)
{
    const W bits = _mm256_castps_si256(a), even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const W rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even), 16);
    const W is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const W words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#define FUSED_BATCH 4
#define FUSED_INPUTS 4
#define MANY_VECTORS 2
#define MANY_INPUTS 6
#define FEW_ROWS(M) ((M) <= 4 ? 2 : 1)
#define TILE_VECTORS 2
#define GRAD_CODES 3
#define GRAD_SIXTEEN 16
#define GRAD_VECTORS 4
