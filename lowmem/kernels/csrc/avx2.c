/* The ISA avx2, with FMA and F16C. The sixteen levels are two registers; bit 3 of a code selects one. */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX2)
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

#define FUSED_BATCH 4
#define FUSED_INPUTS 4
#define MANY_VECTORS 2
#define MANY_INPUTS 6
#define FEW_ROWS(M) ((M) <= 4 ? 2 : 1)
#define TILE_VECTORS 2
#define GRAD_SIXTEEN 16
#define TORCH_FLOAT_ROWS 256

#include "body.h"

/* x @ W.T for a bfloat16 batch in 16-bit integers, of which one instruction multiplies sixteen; levels are looked up as bytes.
 *
 * Packed, for each group and batch row: four vectors of integers, in the order in which codes are decoded, and the unit of each word.
 * Vector 2 * high + back holds columns of the low or high nibbles of each word's front or back two bytes. */
#define INT16_VECTORS 5
/* A bfloat16 number below 2^14 and a level of at most 2^14: eight such products add up to less than 2^31. */
#define INT16_BITS 14

/* The exponent of the largest magnitude of two vectors, at least -114, so that 2^(13 - exponent) is a float; 128: not finite. */
INLINE int exponent_of(V a, V b)
{
    const W magnitude = _mm256_set1_epi32(0x7fffffff);
    const W most = _mm256_max_epi32(_mm256_and_si256((W)a, magnitude), _mm256_and_si256((W)b, magnitude));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    const int exponent = (_mm_cvtsi128_si32(four) >> 23) - 127;
    return exponent < -114 ? -114 : exponent;
}

/* Store eight numbers times `factor`, rounded: the pairs of two words go to `front` and `back`. */
INLINE void put_int16(V x, V factor, float *front, float *back)
{
    const W whole = _mm256_cvtps_epi32(v_mul(x, factor));
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    const __m128i sorted = _mm_shuffle_epi32(pairs, 0xd8);
    _mm_storel_epi64((__m128i *)front, sorted);
    _mm_storeh_pd((double *)back, (__m128d)sorted);
}

/* Pack batch row m. The columns of two words share a unit, 2^(exponent - 13); it is NaN if one of them is infinite or NaN. */
static void pack_int16(const struct job *job, int64_t m)
{
    const struct weight *w = job->weight;
    const int64_t size = 2 * w->half, step = (job->m1 - job->m0) * LANES, from = m * w->columns;
    float *out = job->packed + (m - job->m0) * LANES;
    for (int64_t byte = job->g0 * LANES * 4; byte < smaller(w->row_bytes, job->g1 * LANES * 4); byte += 8) {
        const int64_t start = byte / w->half * size, columns = smaller(size, w->columns - start), lower = (columns + 1) / 2;
        const int64_t c = byte % w->half;
        const V low = load_some(job->x, BFLOAT16, from + start + c, lower - c);
        const V high = load_some(job->x, BFLOAT16, from + start + lower + c, columns - lower - c);
        const int exponent = exponent_of(low, high);
        const V factor = v_set1(float_of((uint32_t)(126 + INT16_BITS - exponent) << 23));
        float *to = out + (byte / (LANES * 4) - job->g0) * step * INT16_VECTORS + byte / 4 % LANES;
        put_int16(low, factor, to, to + step);
        put_int16(high, factor, to + 2 * step, to + 3 * step);
        /* 2^(exponent - 13) times the unit of levels, 2^-14, in two factors: their product may be subnormal */
        to[4 * step] = to[4 * step + 1] = exponent > 127 ? NAN : float_of((uint32_t)(exponent + 115) << 23) * 0x1p-15f;
    }
}

#define INT16_ROWS(M) 2

/* As `few`, in 16-bit integers: sums of a word's eight products are exact. */
INLINE void few_int16(const struct job *job, int64_t r, const int R, const int M, V *out)
{
    const struct weight *w = job->weight;
    const float *x = job->packed;
    const __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)w->int16_levels[0]));
    const __m256i high_bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)w->int16_levels[1]));
    const __m256i nibble = _mm256_set1_epi8(15);
    /* front pairs of bytes of each word first, so that pairs of 16-bit levels are in the lanes of their words */
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    struct reading at;
    V acc[FEW_SUMS];
    begin_reading(&at, w, r, job->g0, R);
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t g = job->g0; g < job->g1; g++, x += M * LANES * INT16_VECTORS) {
        read_group(&at, w, r, g, R);
        EACH_ROW {
            const __m256i codes = _mm256_shuffle_epi8(at.words[i], order);
            const __m256i low = _mm256_and_si256(codes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
            const __m256i a = _mm256_shuffle_epi8(low_bytes, low), b = _mm256_shuffle_epi8(high_bytes, low);
            const __m256i c = _mm256_shuffle_epi8(low_bytes, high), d = _mm256_shuffle_epi8(high_bytes, high);
            const __m256i level[4] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b), _mm256_unpacklo_epi8(c, d),
                                      _mm256_unpackhi_epi8(c, d)};
            EACH_INPUT {
#define PRODUCTS_OF(k) _mm256_madd_epi16(level[k], _mm256_loadu_si256((const __m256i *)x + (k) * M + j))
                const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(PRODUCTS_OF(0), PRODUCTS_OF(1)),
                                                     _mm256_add_epi32(PRODUCTS_OF(2), PRODUCTS_OF(3)));
                const V value = v_mul(_mm256_cvtepi32_ps(sum), v_load(x + (4 * M + j) * LANES));
                acc[AT] = v_fma(value, at.scale[i], acc[AT]);
            }
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = v_mul(acc[AT], v_set1(w->int16_unit));
}

ROWS_WITH_MORE(rows_int16, INT16_ROWS, few_int16)

/* Panel n of the batch rows of a piece: up to FEW_MORE of them, with their part of packed x. Returns 0 if there is none. */
static int panel_of(const struct job *job, int64_t n, struct job *panel)
{
    const struct weight *w = job->weight;
    const int64_t floats = (job->g1 - job->g0) * GROUP * job->kernel->number / 4 + w->offsets * padded_blocks(w);
    *panel = *job;
    panel->m0 += n * FEW_MORE;
    panel->m1 = smaller(panel->m0 + FEW_MORE, job->m1);
    panel->packed += n * FEW_MORE * floats;
    return panel->m0 < panel->m1;
}

static void pack_panels_int16(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    struct job one;
    for (int64_t n = part; panel_of(job, n, &one); n += parts) {
        memset(one.packed, 0, (size_t)((one.m1 - one.m0) * (one.g1 - one.g0)) * LANES * INT16_VECTORS * sizeof(float));
        for (int64_t m = one.m0; m < one.m1; m++)
            pack_int16(&one, m);
        sum_blocks(&one);
    }
}

static void int16_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    struct job one;
    for (int64_t n = 0; panel_of(job, n, &one); n++)
        few_rows(&one, part, parts, rows_int16);
}

#define FEW_INT16 32 /* most batch rows that threads need not share the packing of */
#include "floats.h"

const struct isa isa_avx2 = FLOAT_ISA("avx2");
END_TARGET
#endif
