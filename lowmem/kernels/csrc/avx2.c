/* The ISA avx2. */
#include <float.h>

#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX2)
#include "avx2.h"

/* Products in 8-bit integers (inputs8.h). A signed byte of the weight gives its sign to one of x, and its magnitude is the unsigned
 * factor: two products add up to at most 2 * 128 * 127 in 16 bits. Four pairs of shifted steps, which are at most 32, do as well. */
#define INPUTS8_SHIFTED 16
#define INPUTS8_SHIFTS_CODES 0
#define IS_SHIFTED(w) ((w)->inputs8_zero != 0)
#define QUADS(is_shifted) ((is_shifted) ? 4 : 2)
#define INPUTS8_INPUTS 6
struct steps {
    W bytes, magnitude;
};
static inline struct steps steps_of(W bytes, const int is_shifted)
{
    return (struct steps){bytes, is_shifted ? bytes : _mm256_abs_epi8(bytes)};
}
static inline __attribute__((always_inline)) W add_products(W sum, const struct steps *w, const W *x, const int n, const int is_shifted)
{
    const W one = _mm256_set1_epi16(1);
    if (is_shifted) {
        W pairs = _mm256_maddubs_epi16(w[0].bytes, x[0]);
#pragma GCC unroll 4
        for (int k = 1; k < n; k++)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[k].bytes, x[k]));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, one));
    }
#pragma GCC unroll 4
    for (int k = 0; k < n; k++)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w[k].magnitude, _mm256_sign_epi8(x[k], w[k].bytes)), one));
    return sum;
}

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
