/* The gradient of one input with evenly spaced levels (grid.h): codes are multiplied as they are, in integers, four rows at a time.
 *
 *   sum of level[c] s g = step * unit * (codes * sum of c v + base * sum of v),      s g ~ unit * v
 *
 * where s is the scale of a row's block, g what the input has for the row, and v an integer of DIGITS signed bytes, each of which
 * vpdpbusd sums for itself, exactly. The unit is the same for all rows of a chunk and a window of columns: the largest s times the
 * largest g there, over the most that v can be. Rows are rounded up and down in turns (each at another fraction), so that what
 * many rows lose alike does not add up: a column is off by about
 *
 *   2^-24 * (largest s / smallest s) * (largest g / norm of g)      times the norms' product
 *
 * (by eight times as much where rows are chosen so that their fractions are alike). Where that is more than GRAD_LOST times 2^-24,
 * chunk and window are left to others, as is what is not finite. Rows of codes are interleaved byte by byte, so that the four
 * products that vpdpbusd adds are of one column; a quarter of a vector has 16 bytes of each row, and each half of them is of one
 * block: a slot. */

#define GRAD_LOST 2.0f
#define EACH_QUARTER _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++)
#define LARGEST_GRAD 0x1p60f /* what is larger, or as small, is left to others */

_Static_assert(GRAD_GRID_ROWS * 16 <= GRAD_ROWS * MAX_GROUP, "digits lie where a tile would");
_Static_assert((GRAD_GRID_ROWS * (2 * 15 + 31) * 128ll) * 257 < 1ll << 31, "so are sums of two digits, with twice the codes and a base of up to 31, whole numbers");

/* The largest of 32 numbers of 16 bits. */
INLINE int LEVEL(largest_half)(W numbers)
{
    return _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_srli_epi32(numbers, 16), _mm512_and_si512(numbers, _mm512_set1_epi32(0xffff))));
}

/* The largest magnitude of n float16 scales of each of some rows, and how often it holds the smallest that is not zero; 0: there is
 * none, or one that is subnormal or not finite. */
INLINE float LEVEL(largest_scale)(const uint16_t *p, int64_t stride, int64_t rows, int64_t n, float *times)
{
    const W ones = _mm512_set1_epi16(-1);
    W most = _mm512_setzero_si512(), least = ones; /* twice each, without its sign; the smallest less 1, so that it is not a zero */
#define SCALES(load)                                      \
    {                                                     \
        const W scale = load, twice = _mm512_add_epi16(scale, scale); \
        most = _mm512_max_epu16(most, twice);             \
        least = _mm512_min_epu16(least, _mm512_add_epi16(twice, ones)); \
    }
    const __mmask32 rest = ((__mmask32)1 << n % 32) - 1;
    for (; rows > 0; rows--, p += stride) {
        for (int64_t i = 0; i < n; i += 32)
            prefetch_far(p + GRAD_GRID_ROWS * stride + i);
        for (int64_t i = 0; i < n / 32 * 32; i += 32)
            SCALES(_mm512_loadu_si512(p + i))
        if (n % 32)
            SCALES(_mm512_maskz_loadu_epi16(rest, p + n / 32 * 32))
    }
#undef SCALES
    const int top = LEVEL(largest_half)(most) / 2, bottom = (0x10000 - LEVEL(largest_half)(_mm512_xor_si512(least, ones))) / 2;
    if (top >= 0x7c00 || bottom < 0x0400 || !top)
        return 0.0f;
    *times = half_to_float((uint16_t)top) / half_to_float((uint16_t)bottom);
    return half_to_float((uint16_t)top);
}

/* The largest magnitude of GRAD_GRID_ROWS numbers, and how often their norm holds it. */
INLINE float LEVEL(largest_of)(const float *x, float *norm)
{
    V most = v_zero(), squares = v_zero();
    for (int i = 0; i < GRAD_GRID_ROWS; i += LANES)
        most = _mm512_max_ps(_mm512_abs_ps(v_load(x + i)), most); /* of a NaN and another, the other: its norm is a NaN */
    const float largest = _mm512_reduce_max_ps(most);
    const V inverse = v_set1(1.0f / largest);
    for (int i = 0; i < GRAD_GRID_ROWS; i += LANES) {
        const V part = v_mul(v_load(x + i), inverse);
        squares = v_fma(part, part, squares);
    }
    *norm = sqrtf(_mm512_reduce_add_ps(squares));
    return largest;
}

/* Rows r0 to r1 of a window. */
static void LEVEL(begin_window)(const struct weight *w, const float *grad, int64_t r0, int64_t r1, int64_t number, struct LEVEL(grad_window) *to)
{
    const int64_t first = number * GRAD_WINDOW * LANES * 4 / w->half, blocks = smaller(GRAD_WINDOW * LANES * 4 / w->half, w->blocks - first);
    float times = 0.0f, norm;
    memcpy(to->factors, grad, (size_t)(r1 - r0) * sizeof *grad);
    for (int64_t i = r1 - r0; i < GRAD_GRID_ROWS; i++)
        to->factors[i] = 0.0f;
    const float largest = LEVEL(largest_of)(to->factors, &norm);
    const float scale = LEVEL(largest_scale)((const uint16_t *)w->scales + r0 * w->blocks + first, w->blocks, r1 - r0, blocks, &times);
    to->number = number;
    to->fits = scale > 0.0f && largest <= LARGEST_GRAD && largest >= 1.0f / LARGEST_GRAD && times <= GRAD_LOST * norm;
    to->unit = largest * scale / 0x7f7f00; /* whatever rounds up, digits hold it */
    for (int i = 0; i < GRAD_GRID_ROWS && to->fits; i += LANES) {
        const V row = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_set1_epi32(i), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
        const V turn = v_mul(row, v_set1(0.618034f)); /* the golden ratio's fractions lie evenly, however many rows there are */
        v_store(to->turns + i, v_fma(v_sub(turn, _mm512_roundscale_ps(turn, 0)), v_set1(0.98f), v_set1(0x8080)));
        v_store(to->factors + i, v_mul(v_load(to->factors + i), v_set1(1.0f / to->unit)));
    }
    for (int s = 0; s < LANES; s++)
        to->block[s] = (uint16_t)((s % 4 / 2 * LANES * 4 + s / 4 * 16 + s % 2 * 8) / w->half);
}

/* 16 scales of a row from p on, of which `there` may be read. */
INLINE __m256i LEVEL(scales_at)(const uint16_t *p, const int there)
{
    return there == LANES ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi16((__mmask16)((1u << there) - 1), p);
}

/* Half h of the bytes of each quarter of four vectors, side by side: those of the first four places to out[0], then out[1]. */
INLINE void LEVEL(bytes_across)(const W *rows, const int h, W *out)
{
    const W front = h ? _mm512_unpackhi_epi8(rows[0], rows[1]) : _mm512_unpacklo_epi8(rows[0], rows[1]);
    const W back = h ? _mm512_unpackhi_epi8(rows[2], rows[3]) : _mm512_unpacklo_epi8(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi16(front, back);
    out[1] = _mm512_unpackhi_epi16(front, back);
}

/* Digits of the scales from p on times `factors`, and their sums: of four rows, four vectors, one for each slot of a quarter, which has
 * the digits of four rows, the lowest one first. `turns`: where rows are rounded. `fetch`: codes to fetch, `step` bytes apart. */
INLINE void LEVEL(grad_digits)(const uint16_t *p, int64_t stride, int64_t rows, const int there, __m256i slots, const float *factors,
                               const float *turns, const uint8_t *fetch, int64_t step, W *digits, W *sums)
{
    const W half = _mm512_set1_epi32(0x8080), ones = _mm512_set1_epi8(1);
    EACH_QUARTER sums[q] = _mm512_setzero_si512();
    for (; rows > 0; rows -= 4, p += 4 * stride, digits += 4, factors += 4, turns += 4, fetch += 4 * step) {
        const int64_t at[4] = {0, rows > 1 ? stride : 0, rows > 2 ? 2 * stride : 0, rows > 3 ? 3 * stride : 0}; /* zeros are factors of others */
        W v[4], of[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const V scale = _mm512_cvtph_ps(_mm256_permutexvar_epi16(slots, LEVEL(scales_at)(p + at[i], there)));
            prefetch_far(fetch + i * step);
            v[i] = _mm512_xor_si512(_mm512_cvtps_epi32(v_fma(scale, v_set1(factors[i]), v_set1(turns[i]))), half);
        }
        LEVEL(bytes_across)(v, 0, of);
        LEVEL(bytes_across)(v, 1, of + 2);
        EACH_QUARTER {
            sums[q] = _mm512_dpbusd_epi32(sums[q], ones, of[q]);
            _mm512_storeu_si512(digits + q, of[q]);
        }
    }
}

#define DIGIT(d)                                                                                           \
    {                                                                                                      \
        const W digit = _mm512_shuffle_epi32(_mm512_loadu_si512(digits), (_MM_PERM_ENUM)(0x55 * d));       \
        EACH_QUARTER sum[d][q] = LEVEL(add_bytes)(sum[d][q], part[q], digit);                              \
    }

/* Half h of the quarters of rows of codes with the digits of their slots: to out the low nibbles of two words of a quarter, and then
 * the high ones. `base` is what each digit of a slot counts more, besides its codes. */
INLINE void LEVEL(grad_half)(const struct weight *w, const uint8_t *p, int64_t rows, const int h, const W *digits, W base,
                             const uint8_t *fetch, V *low, V *high)
{
    const W nibble = _mm512_set1_epi8(15);
    const int64_t stride = w->row_bytes;
    W sum[DIGITS][4], part[4];
#pragma GCC unroll 3
    for (int d = 0; d < DIGITS; d++)
        EACH_QUARTER sum[d][q] = _mm512_setzero_si512();
    for (; rows > 0; rows -= 4, p += 4 * stride, fetch += 4 * stride, digits += 4) {
        prefetch_far(fetch);
        prefetch_far(fetch + stride);
        const W codes[4] = {
            _mm512_loadu_si512(p), _mm512_loadu_si512(p + (rows > 1 ? stride : 0)), _mm512_loadu_si512(p + (rows > 2 ? 2 * stride : 0)),
            _mm512_loadu_si512(p + (rows > 3 ? 3 * stride : 0)),
        };
        LEVEL(bytes_across)(codes, h, part);
        part[2] = _mm512_and_si512(_mm512_srli_epi16(part[0], 4), nibble);
        part[3] = _mm512_and_si512(_mm512_srli_epi16(part[1], 4), nibble);
        part[0] = _mm512_and_si512(part[0], nibble);
        part[1] = _mm512_and_si512(part[1], nibble);
        DIGIT(0) DIGIT(1) DIGIT(2)
    }
    const int twice = w->codes - 1;
    const W low_base = _mm512_shuffle_epi32(base, 0), middle = _mm512_shuffle_epi32(base, 0x55), top = _mm512_shuffle_epi32(base, 0xaa);
    const W high_base = _mm512_add_epi32(_mm512_slli_epi32(top, 8), middle);
    EACH_QUARTER {
        const W upper = _mm512_add_epi32(_mm512_slli_epi32(sum[2][q], 8), sum[1][q]);
        const V above = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, twice), high_base));
        const V below = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[0][q], twice), low_base));
        v_store((float *)(q < 2 ? low + q : high + q - 2), v_fma(above, v_set1(256.0f), below));
    }
}

OWN_FUNCTION LEVEL(grad_front)(const struct weight *w, const uint8_t *p, int64_t rows, const W *digits, W base, const uint8_t *fetch,
                               V *low, V *high)
{
    LEVEL(grad_half)(w, p, rows, 0, digits, base, fetch, low, high);
}

OWN_FUNCTION LEVEL(grad_back)(const struct weight *w, const uint8_t *p, int64_t rows, const W *digits, W base, const uint8_t *fetch,
                              V *low, V *high)
{
    LEVEL(grad_half)(w, p, rows, 1, digits, base, fetch, low, high);
}

/* Sums of a quarter's words, byte by byte, in the order of the words, times a unit: added to every other vector of `sums`. */
INLINE void LEVEL(add_quarters)(const V *v, V unit, float *sums)
{
    V out[4];
    v_quarters(v[0], v[1], v[2], v[3], out);
    EACH_QUARTER {
        float *at = sums + 2 * q * LANES;
        v_store(at, v_fma(out[q], unit, v_load(at)));
    }
}

/* Rows r0 to r1 of group g, and of the next one before t1 if both share their slots. Returns how many groups are done: 0 where they
 * are to be multiplied by other means, which does not depend on the groups that a thread has. */
INLINE int LEVEL(grad_grid)(const struct weight *w, const float *grad, int64_t r0, int64_t r1, int64_t t0, int64_t t1, int64_t g,
                            struct LEVEL(grad_window) *window, float *scratch, float *sums)
{
    const int64_t pair = g / 2 * 2, first = pair * LANES * 4 / w->half, rows = r1 - r0, stride = w->blocks;
    if ((g + 1) * LANES * 4 > w->row_bytes)
        return 0;
    if (window->number != g / GRAD_WINDOW)
        LEVEL(begin_window)(w, grad, r0, r1, g / GRAD_WINDOW, window);
    if (!window->fits)
        return 0;
    const int there = (int)smaller(LANES, w->blocks - first);
    const uint16_t *scales = (const uint16_t *)w->scales + r0 * stride + first;
    const __m256i slots = _mm256_loadu_si256((const __m256i *)window->block);
    W *digits = (W *)scratch, base[4];
    const uint8_t *p = w->packed + r0 * w->row_bytes + g * LANES * 4;
    const int64_t step = r0 || g > t0 ? 0 : w->row_bytes; /* where nothing has been before that fetched them */
    if (there == LANES)
        LEVEL(grad_digits)(scales, stride, rows, LANES, slots, window->factors, window->turns, p, step, digits, base);
    else
        LEVEL(grad_digits)(scales, stride, rows, there, slots, window->factors, window->turns, p, step, digits, base);
    EACH_QUARTER base[q] = _mm512_mullo_epi32(base[q], _mm512_set1_epi32(w->base));
    int64_t at = g;
    for (; at < smaller(pair + 2, t1) && (at + 1) * LANES * 4 <= w->row_bytes; at++, p += LANES * 4, sums += GROUP) {
        const int64_t slot = 2 * (at - pair);
        const uint8_t *fetch = pair + 2 < t1 ? p + 2 * LANES * 4 : w->packed + r1 * w->row_bytes + (t0 + at - pair) * LANES * 4;
        V low[4], high[4];
        LEVEL(grad_front)(w, p, rows, digits + slot, base[slot], fetch, low, high);
        LEVEL(grad_back)(w, p, rows, digits + slot + 1, base[slot + 1], fetch + 2 * w->row_bytes, low + 2, high + 2);
        const V unit = v_set1(window->unit * w->step);
        LEVEL(add_quarters)(low, unit, sums);
        LEVEL(add_quarters)(high, unit, sums + LANES);
    }
    return (int)(at - g);
}
