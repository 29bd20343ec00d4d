/* Vector operations (rows.h) of AVX-512. The sixteen levels are one register, and one permute looks up sixteen codes. */
#pragma once
#include "kernel.h"
#include "x86_bytes.h"

#define LANES 16
typedef __m512 V;
typedef __m512i W;
typedef __m512 T;

#define v_set1 _mm512_set1_ps
#define v_keep(a) __asm__("" : "+v"(a))
#define v_fma _mm512_fmadd_ps
/* Transpose 16 x 16 numbers: interleave pairs, then fours, then quarters of vectors. */
static inline void v_transpose(V *v)
{
    V a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* b[i + 4 q]: columns i, i + 4, i + 8, i + 12 of rows 4 q to 4 q + 3 */
        const V low0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), low1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        const V high0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd), high1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        v[i] = _mm512_shuffle_f32x4(low0, low1, 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(low0, low1, 0xdd);
        v[i + 4] = _mm512_shuffle_f32x4(high0, high1, 0x88);
        v[i + 12] = _mm512_shuffle_f32x4(high0, high1, 0xdd);
    }
}
static inline V v_sums(V *v)
{
#define FOLD(a, b) _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)v[2 * i], b = (__m512d)v[2 * i + 1];
        v[i] = _mm512_add_ps((V)_mm512_unpacklo_pd(a, b), (V)_mm512_unpackhi_pd(a, b));
    }
    return FOLD(FOLD(v[0], v[1]), FOLD(v[2], v[3]));
}
#define table_load _mm512_loadu_ps
/* The permute reads four bits of an index, so the nibbles above need not be cleared. */
#define v_lookup(table, words, k) _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * (k)), table)
#define v_spread(a, index) _mm512_permutexvar_ps(_mm512_loadu_si512(index), a)

#define OWN_WORDS
static inline W words_load(const uint8_t *p, int64_t left)
{
    if (left >= 64)
        return _mm512_loadu_si512(p);
    if (left <= 0)
        return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, p);
}
static inline W bytes_load(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
#define OWN_BLOCKS
static inline W block_load(const uint8_t *p)
{
    long long eight;
    memcpy(&eight, p, 8);
    const W twice = _mm512_cvtepu8_epi32(_mm_set1_epi64x(eight));
    return _mm512_srlv_epi32(twice, _mm512_set_epi32(4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0));
}

/* v_code is a binary search: the bits of a code that are found select the boundary for the next bit. */
typedef struct {
    V bit3, bit2, bit1, bit0; /* looked up with the bits found so far */
} B;
static inline B boundaries_load(const float *p)
{
    return (B){_mm512_set1_ps(p[7]), _mm512_maskz_loadu_ps(0x0fff, p + 3), _mm512_maskz_loadu_ps(0x3fff, p + 1),
               _mm512_maskz_loadu_ps(0x7fff, p)};
}
static inline W v_code(B b, V a)
{
    W code = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a, b.bit3, _CMP_GT_OQ), 8);
#define CODE_BIT(boundary, bit)                                                                                  \
    code = _mm512_mask_or_epi32(code, _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(code, boundary), _CMP_GT_OQ), code, \
                                _mm512_set1_epi32(bit))
    CODE_BIT(b.bit2, 4);
    CODE_BIT(b.bit1, 2);
    CODE_BIT(b.bit0, 1);
    return code;
}
static inline void codes_store(uint8_t *p, W codes) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(codes)); }

#define one_half _cvtsh_ss
#define v_half(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define v_bfloat(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))

static inline void v_to_half(uint16_t *p, V a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Broadcast 32 bits with the integer instruction: the floating-point one slows vdpbf16ps down by a quarter on Zen 4. */
static inline W word_of(const void *p)
{
    int32_t word;
    memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
}

static inline W steps_load(const uint8_t *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
#define steps_lookup _mm512_shuffle_epi8

#define FUSED_BATCH 24
#define FUSED_INPUTS 12
#define MANY_VECTORS 2
#define MANY_INPUTS 12
#define FEW_ROWS(M) ((M) <= 3 ? 4 : 2)
#define TILE_VECTORS 4
#define GRAD_SIXTEEN 32
