/* The ISA avx2, with FMA and F16C. The sixteen levels are two registers; bit 3 of a code selects one. */
#include <float.h>

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

/* x @ W.T for a bfloat16 batch in 16-bit integers, of which one instruction multiplies sixteen. Sixteen columns share an exponent. */
/* A bfloat16 number below 2^14 and a level of at most 2^14: eight such products add up to less than 2^31. */
#define INT16_BITS 14

/* Round eight columns and eight more to integers, x / 2^(exponent - 13), where the exponent is that of the largest magnitude, and at
 * least -120: then all numbers of bfloat16 are whole, down to 2^-133. Returns the unit, 2^(exponent - 27). Of infinite columns it is infinite, and all others
 * become zero: words of only zeros must get another unit. It is NaN if a column is. */
INLINE float to_int16(V low, V high, __m128i *lows, __m128i *highs)
{
#define ROUND_TO_INT16(a) \
    _mm256_cvtps_epi32(v_mul(v_mul(_mm256_max_ps(_mm256_min_ps(a, v_set1(FLT_MAX)), v_set1(-FLT_MAX)), factor), rest))
    const W magnitude = _mm256_set1_epi32(0x7fffffff);
    const W most = _mm256_max_epi32(_mm256_and_si256((W)low, magnitude), _mm256_and_si256((W)high, magnitude));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    const int largest = _mm_cvtsi128_si32(four), found = (largest >> 23) - 127, exponent = found < -120 ? -120 : found;
    const int more = exponent < -114 ? 6 : 0; /* 2^(13 - exponent) is no float: two multiply by it */
    const V factor = v_set1(float_of((uint32_t)(126 + INT16_BITS - more - exponent) << 23)), rest = v_set1((float)(1 << more));
    const W a = ROUND_TO_INT16(low), b = ROUND_TO_INT16(high);
    *lows = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    *highs = _mm_packs_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    if (exponent > 127)
        return largest > 0x7f800000 ? NAN : INFINITY;
    return float_of((uint32_t)(exponent + 127) << 23) * 0x1p-27f; /* the product may be subnormal */
}

/* Pack batch row m for 4-bit codes: for each group four vectors of integers, in the order in which codes are decoded, and the unit of
 * each word. Vector 2 * high + back holds columns of the low or high nibbles of each word's front or back two bytes. */
static void pack_int16(const struct job *job, int64_t m)
{
    const struct weight *w = job->weight;
    const int64_t size = 2 * w->half, step = (job->m1 - job->m0) * LANES, from = m * w->columns;
    float *out = job->packed + (m - job->m0) * LANES;
    for (int64_t byte = job->g0 * LANES * 4; byte < smaller(w->row_bytes, job->g1 * LANES * 4); byte += 8) {
        const int64_t start = byte / w->half * size, columns = smaller(size, w->columns - start), lower = (columns + 1) / 2;
        const int64_t c = byte % w->half;
        float *to = out + (byte / (LANES * 4) - job->g0) * step * 5 + byte / 4 % LANES;
        __m128i x[2];
        const float unit = to_int16(load_some(job->x, BFLOAT16, from + start + c, lower - c),
                                    load_some(job->x, BFLOAT16, from + start + lower + c, columns - lower - c), x, x + 1);
        const __m128i any = _mm_or_si128(x[0], x[1]);
        to[4 * step] = _mm_extract_epi64(any, 0) ? unit : 0.0f;
        to[4 * step + 1] = _mm_extract_epi64(any, 1) ? unit : 0.0f;
        for (int high = 0; high < 2; high++) {
            const __m128i sorted = _mm_shuffle_epi32(x[high], 0xd8); /* the front pairs of two words, then the back pairs */
            _mm_storel_epi64((__m128i *)(to + 2 * high * step), sorted);
            _mm_storeh_pd((double *)(to + (2 * high + 1) * step), (__m128d)sorted);
        }
    }
}

/* Pack batch row m for 8-bit codes: for 32 columns, two vectors of integers, whose halves are those of 16 columns, and their units. */
static void pack_int16_columns(const struct job *job, int64_t m)
{
    const int64_t columns = job->weight->columns, step = (job->m1 - job->m0) * LANES, first = job->g0 * GROUP;
    for (int64_t c = first; c < smaller(columns, job->g1 * GROUP); c += 16) {
        float *to = job->packed + (m - job->m0) * LANES + (c - first) / 32 * step * 3 + c % 32 / 4;
        __m128i x[2];
        const float unit = to_int16(load_some(job->x, BFLOAT16, m * columns + c, columns - c),
                                    load_some(job->x, BFLOAT16, m * columns + c + 8, columns - c - 8), x, x + 1);
        _mm_storeu_si128((__m128i *)to, x[0]);
        _mm_storeu_si128((__m128i *)(to + step), x[1]);
        const __m128i none = _mm_cmpeq_epi32(_mm_or_si128(x[0], x[1]), _mm_setzero_si128());
        _mm_storeu_ps(to + 2 * step, _mm_andnot_ps((__m128)none, _mm_set1_ps(unit)));
    }
}

#define INT16_ROWS(M) 2
#define INT16_ROWS8(M) ((M) <= 2 ? 4 : 2)

#define INT16_AT(k) _mm256_loadu_si256((const __m256i *)x + (k) * M + j)

/* As `few`, in 16-bit integers: sums of a word's eight products are exact. Low and high bytes of levels are looked up. */
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
    for (int64_t g = job->g0; g < job->g1; g++, x += 5 * M * LANES) {
        read_group(&at, w, r, g, R);
        EACH_ROW {
            const __m256i codes = _mm256_shuffle_epi8(at.words[i], order);
            const __m256i low = _mm256_and_si256(codes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
            const __m256i a = _mm256_shuffle_epi8(low_bytes, low), b = _mm256_shuffle_epi8(high_bytes, low);
            const __m256i c = _mm256_shuffle_epi8(low_bytes, high), d = _mm256_shuffle_epi8(high_bytes, high);
            const __m256i level[4] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b), _mm256_unpacklo_epi8(c, d),
                                      _mm256_unpackhi_epi8(c, d)};
            EACH_INPUT {
                __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++)
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(level[k], INT16_AT(k)));
                const V value = v_mul(_mm256_cvtepi32_ps(sum), v_load(x + (4 * M + j) * LANES));
                acc[AT] = v_fma(value, at.scale[i], acc[AT]);
            }
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = v_mul(acc[AT], v_set1(w->int16_unit));
}

/* As `few_weights8`: an integer times 256 is a byte above a zero, and four products add up to less than 2^31. */
INLINE void few_int16_weights8(const struct job *job, int64_t r, const int R, const int M, V *out)
{
    const struct weight *w = job->weight;
    const int64_t end = smaller(w->columns, job->g1 * GROUP), size = 2 * w->half;
    const uint8_t *rows = w->packed + r * w->row_bytes;
    const float *x = job->packed;
    float scales[4][MAX_LANES];
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t c = job->g0 * GROUP, block = c / size, first = block - LANES; c < end; c += 32, x += 3 * M * LANES) {
        while (c >= (block + 1) * size)
            block++;
        const int64_t second = block + (c + 16 >= (block + 1) * size); /* the block of the second 16 columns */
        if (second >= first + LANES)
            weights8_scales(w, r, first = block, R, scales);
        EACH_ROW {
            prefetch(rows + (i + 8 * R) * w->row_bytes + c);
            const __m256i codes = _mm256_xor_si256(words_load(rows + i * w->row_bytes + c, end - c), _mm256_set1_epi8(-128));
            const __m256i front = _mm256_unpacklo_epi8(_mm256_setzero_si256(), codes);
            const __m256i back = _mm256_unpackhi_epi8(_mm256_setzero_si256(), codes);
            const V scale = _mm256_set_m128(_mm_set1_ps(scales[i][second - first]), _mm_set1_ps(scales[i][block - first]));
            EACH_INPUT {
                const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(front, INT16_AT(0)), _mm256_madd_epi16(back, INT16_AT(1)));
                acc[AT] = v_fma(v_mul(_mm256_cvtepi32_ps(sum), v_load(x + (2 * M + j) * LANES)), scale, acc[AT]);
            }
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = v_mul(acc[AT], v_set1(0x1p6f / w->divisor)); /* units are of levels of 2^14 */
}

ROWS_WITH_MORE(rows_int16, INT16_ROWS, few_int16)
ROWS_WITH_MORE(rows_int16_weights8, INT16_ROWS8, few_int16_weights8)

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
        memset(one.packed, 0, (size_t)((one.m1 - one.m0) * (one.g1 - one.g0) * GROUP * job->kernel->number));
        for (int64_t m = one.m0; m < one.m1; m++)
            job->weight->levels ? pack_int16(&one, m) : pack_int16_columns(&one, m);
        sum_blocks(&one);
    }
}

static void int16_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    struct job one;
    for (int64_t n = 0; panel_of(job, n, &one); n++)
        few_rows(&one, part, parts, job->weight->levels ? rows_int16 : rows_int16_weights8);
}

#define FEW_INT16 32 /* up to so many batch rows are packed by one thread */
#include "floats.h"

const struct isa isa_avx2 = FLOAT_ISA("avx2");
END_TARGET
#endif
