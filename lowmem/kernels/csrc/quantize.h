/* Quantizes rows, bit for bit as lowmem/quant/scale_search.py does: products are rounded before they are added, hence no v_fma. */
#pragma once
#include "row_calls.h"
#include "rows.h"

#define ERROR_SUMS 16 /* partial sums of a block's error, and of a row's squares, whatever LANES is */

/* The sums of squared errors and of squared numbers of a row, in float64, in which squares of float32 numbers are exact. The order
 * of additions does not depend on LANES. */
struct squares {
    double lost[ERROR_SUMS], size[ERROR_SUMS];
};

/* Add ERROR_SUMS numbers, or fewer with zeros behind them, and their errors. */
INLINE void add_squares(const float *x, const float *error, struct squares *sums)
{
    for (int j = 0; j < ERROR_SUMS; j++) {
        sums->lost[j] += (double)error[j] * error[j];
        sums->size[j] += (double)x[j] * x[j];
    }
}

INLINE void sum_squares(struct squares *sums, double *out)
{
    for (int half = ERROR_SUMS / 2; half; half /= 2)
        for (int j = 0; j < half; j++) {
            sums->lost[j] += sums->lost[j + half];
            sums->size[j] += sums->size[j + half];
        }
    out[0] = sums->lost[0];
    out[1] = sums->size[0];
}

/* The bits of the largest magnitude of n numbers. */
INLINE uint32_t largest_bits(const float *x, int64_t n)
{
    uint32_t most = 0; /* as integers, bits are ordered as magnitudes, with NaN above infinity */
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* Whether the weight of largest magnitude is negative, and no positive weight has that magnitude. */
INLINE int is_negative(const float *x, int64_t n, uint32_t largest)
{
    int positive = largest == 0;
    for (int64_t i = 0; i < n; i++)
        positive |= bits_of(x[i]) == largest;
    return !positive;
}

/* The divisor for the weights of a block. A scale of zero becomes infinity, so that all weights get the zero code. */
INLINE float divisor_of(float scale) { return scale == 0.0f ? float_of(0x7f800000) : scale; }

/* out[0] = the squared errors of LANES weights with a scale, times importance if `weighted`; with `both`, out[1] of -scale. */
INLINE void squares(V x, V importance, V scale, V divisor, B boundaries, T levels, const int both, const int weighted,
                           V *out)
{
    const V relative = v_div(x, divisor);
#pragma GCC unroll 2
    for (int s = 0; s <= both; s++) {
        const V near = v_mul(v_lookup(levels, v_code(boundaries, s ? v_sub(v_zero(), relative) : relative), 0), scale);
        const V error = s ? v_add(x, near) : v_sub(x, near);
        out[s] = weighted ? v_mul(v_mul(error, error), importance) : v_mul(error, error);
    }
}

/* The same for a block, summed. The order of additions does not depend on LANES. */
INLINE void errors(const float *x, const float *importance, int64_t n, float scale, B boundaries, T levels,
                          const int both, const int weighted, float *out)
{
    const V factor = v_set1(scale), divisor = v_set1(divisor_of(scale));
    V sums[2][ERROR_SUMS / LANES], square[2];
    for (int h = 0; h < ERROR_SUMS / LANES; h++)
        sums[0][h] = sums[1][h] = v_zero();
    for (int64_t i = 0; i < n; i += ERROR_SUMS)
#pragma GCC unroll 2
        for (int64_t h = 0, at = i; h < ERROR_SUMS / LANES && at < n; h++, at += LANES) {
            squares(load_some(x, FLOAT32, at, n - at), weighted ? load_some(importance, FLOAT32, at, n - at) : v_zero(), factor,
                    divisor, boundaries, levels, both, weighted, square);
            for (int s = 0; s <= both; s++) {
                /* drop the errors of the zeros past the block's end, which are not zero in formats without a zero */
                float values[LANES];
                v_store(values, square[s]);
                sums[s][h] = v_add(sums[s][h], load_some(values, FLOAT32, 0, n - at));
            }
        }
    for (int s = 0; s <= both; s++) {
        float parts[ERROR_SUMS];
        for (int h = 0; h < ERROR_SUMS / LANES; h++)
            v_store(parts + h * LANES, sums[s][h]);
        for (int half = ERROR_SUMS / 2; half; half /= 2)
            for (int j = 0; j < half; j++)
                parts[j] += parts[j + half];
        out[s] = parts[0];
    }
}

/* The candidate with the least error, the first of equal ones (NaN is never less). `top`: the weight of largest magnitude. */
INLINE float best(const struct quantizing *q, const float *x, const float *importance, int64_t n, float top,
                         const int both, const int weighted)
{
    const B boundaries = boundaries_load(q->boundaries);
    const T levels = table_load(q->weight->levels);
    float best = 0.0f, least = 0.0f;
    for (int64_t c = 0; c < q->tried; c++) {
        float scale = top * q->candidates[c], error[2];
        scale = scale > q->largest ? q->largest : scale < -q->largest ? -q->largest : scale;
        errors(x, importance, n, scale, boundaries, levels, both, weighted, error);
        if (c == 0 || error[0] < least)
            best = scale, least = error[0];
        if (both && error[1] < least)
            best = -scale, least = error[1];
    }
    return best;
}

/* The scale of a block of n weights at a column, found by search. */
static float searched(const struct quantizing *q, const float *x, int64_t column, int64_t n, float top)
{
    const float *importance = q->importance ? q->importance + column : NULL;
    if (q->has_sign)
        return importance ? best(q, x, importance, n, top, 1, 1) : best(q, x, NULL, n, top, 1, 0);
    return importance ? best(q, x, importance, n, top, 0, 1) : best(q, x, NULL, n, top, 0, 0);
}

/* Double quantization of n scales: a byte of steps per scale, then the float16 row scale; scales[b] becomes the stored scale. A
 * scale below one step is stored as one positive step: no code of its block is then at an end level, and its sign is lost
 * anyway. */
INLINE void encode_double(float *scales, int64_t n, const int has_sign, uint8_t *out)
{
    const float most = has_sign ? 127.0f : 255.0f, raise = has_sign ? (float)(127 * (1 + 0x1p-20)) : (float)(255 * (1 + 0x1p-20));
    float largest = 0.0f;
    for (int64_t b = 0; b < n; b++)
        largest = fabsf(scales[b]) > largest ? fabsf(scales[b]) : largest;
    const uint16_t bits = float_to_half_below(largest);
    const float row_scale = half_to_float(bits), divisor = row_scale > 0x1p-24f ? row_scale : 0x1p-24f;
    memcpy(out + n, &bits, 2);
    for (int64_t b = 0; b < n; b++) {
        const float raised = fabsf(scales[b]) * raise / divisor;
        int steps = raised >= most ? (int)most : raised < 1.0f ? 1 : (int)raised;
        if (scales[b] == 0.0f || row_scale == 0.0f)
            steps = 0;
        const int negative = has_sign && scales[b] < 0.0f && raised >= 1.0f;
        out[b] = (uint8_t)(steps + (negative && steps ? 128 : 0));
        scales[b] = (float)(negative ? -steps : steps) * row_scale / most;
    }
}

/* Store the scales of a row, and replace them by the divisors of their blocks' weights. */
static void encode(const struct weight *w, float *scales, uint8_t *out)
{
    const int64_t n = w->blocks;
    if (w->encoding == SCALES_FLOAT32) {
        for (int64_t b = 0; b < n; b++)
            scales[b] = fabsf(scales[b]) < 0x1p-126f ? 0.0f : scales[b];
        memcpy(out, scales, (size_t)n * sizeof *scales);
    } else if (w->encoding == SCALES_FLOAT16) {
        for (int64_t b = 0; b < n; b++) {
            uint16_t bits = float_to_half_below(scales[b]);
            bits = bits == 0x8000 ? 0 : bits; /* no negative zero */
            memcpy(out + 2 * b, &bits, 2);
            scales[b] = half_to_float(bits);
        }
    } else if (w->encoding == SCALES_DOUBLE) {
        encode_double(scales, n, 0, out);
    } else {
        encode_double(scales, n, 1, out);
    }
    for (int64_t b = 0; b < n; b++)
        scales[b] = divisor_of(scales[b]);
}

/* Whether all n codes of a block are equal to `code`. */
INLINE int all_equal(const uint8_t *codes, int64_t n, uint8_t code)
{
    for (int64_t i = 0; i < n; i++)
        if (codes[i] != code)
            return 0;
    return 1;
}

/* Codes of up to LANES numbers of a block from element i on, of 4 bits; near[i] becomes their values. */
INLINE void code4(const float *x, int64_t i, int64_t n, V scale, V divisor, B boundaries, T levels, uint8_t *codes, float *near)
{
    const W found = v_code(boundaries, v_div(load_some(x, FLOAT32, i, n - i), divisor));
    codes_store(codes + i, found);
    v_store(near, v_mul(v_lookup(levels, found, 0), scale));
}

/* The same of n numbers in 8 bits. Boundaries are evenly spaced but for the first, -inf: a place is computed to within one. */
INLINE void codes8(const struct quantizing *q, const float *x, int64_t n, float scale, float divisor, uint8_t *codes, float *near)
{
    const float *boundaries = q->boundaries, low = boundaries[1], step = 253.0f / (boundaries[254] - low);
    for (int64_t i = 0; i < n; i++) {
        const float value = x[i] / divisor;
        float place = (value - low) * step + 1.5f;
        place = place < 1.0f ? 1.0f : place > 254.0f ? 254.0f : place;
        const int code = (int)place + (boundaries[(int)place] < value);
        codes[i] = (uint8_t)code;
        near[i] = (float)(code - 128) / q->weight->divisor * scale;
    }
}

/* The codes of up to ERROR_SUMS numbers of a block of n, from element i on, a byte each; their errors are added to the sums. */
INLINE void encode_some(const struct quantizing *q, const float *x, int64_t i, int64_t n, const int64_t count, float divisor,
                        B boundaries, T levels, const int bits, uint8_t *codes, struct squares *sums)
{
    const float scale = divisor == float_of(0x7f800000) ? 0.0f : divisor;
    float near[ERROR_SUMS], error[ERROR_SUMS] = {0}, values[ERROR_SUMS] = {0};
    if (bits == 4)
#pragma GCC unroll 4
        for (int64_t h = 0; h < count; h += LANES)
            code4(x, i + h, n, v_set1(scale), v_set1(divisor), boundaries, levels, codes, near + h);
    else
        codes8(q, x + i, count, scale, divisor, codes + i, near);
    for (int64_t j = 0; j < count; j++) {
        values[j] = x[i + j];
        error[j] = values[j] - near[j];
    }
    add_squares(values, error, sums);
}

/* The same for a block. */
INLINE void encode_block(const struct quantizing *q, const float *x, int64_t n, float divisor, const int bits, uint8_t *codes,
                         struct squares *sums)
{
    const B boundaries = boundaries_load(q->boundaries);
    const T levels = table_load(bits == 4 ? q->weight->levels : q->boundaries);
    int64_t i = 0;
    for (; i + ERROR_SUMS <= n; i += ERROR_SUMS)
        encode_some(q, x, i, n, ERROR_SUMS, divisor, boundaries, levels, bits, codes, sums);
    if (i < n)
        encode_some(q, x, i, n, n - i, divisor, boundaries, levels, bits, codes, sums);
}

/* The largest magnitude of a block as a scale; in 8 bits twice, so that dequantized weights give the same scale again,
   and rounded down where a scale that is rounded up gives a weight beyond float32. */
INLINE float scale_of(const struct quantizing *q, uint32_t largest)
{
    if (q->weight->levels)
        return float_of(largest);
    const uint32_t infinite = 0x7f800000;
    const float once = float_of(largest) / q->top, product = once * q->top;
    const int beyond = bits_of(product) == infinite && bits_of(once) < infinite;
    return beyond ? float_of(bits_of(once) - 1) : product / q->top;
}

/* Quantize rows `from` to `to`. Returns 0 if a weight is not finite or its magnitude is above the largest. */
static int quantize(const struct quantizing *q, int64_t from, int64_t to, uint8_t *own)
{
    const struct weight *w = q->weight;
    const int64_t size = 2 * w->half, wide = round_up(w->columns, MAX_LANES);
    float *scales = (float *)own, *widened = scales + round_up(w->blocks, MAX_LANES);
    uint8_t *codes = (uint8_t *)(widened + (q->type == FLOAT32 ? 0 : wide));
    const int is_double = w->encoding >= SCALES_DOUBLE, has_zero = !w->levels || w->levels[q->zero] == 0.0f;
    for (int64_t r = from; r < to; r++) {
        const float *x = (const float *)q->x + r * w->columns;
        if (q->type != FLOAT32) {
            OF_SIXTEEN(q->type, widen_run, (const uint16_t *)q->x + r * w->columns, w->columns, widened);
            x = widened;
        }
        uint8_t *packed = (uint8_t *)w->packed + r * w->row_bytes, *stored = (uint8_t *)w->scales + r * scale_bytes(w);
        struct squares sums = {{0}, {0}};
        for (int64_t b = 0; b < w->blocks; b++) {
            const int64_t n = smaller(size, w->columns - b * size);
            const uint32_t largest = largest_bits(x + b * size, n);
            const float scale = scale_of(q, largest);
            if (bits_of(scale) > bits_of(q->largest))
                return 0;
            const int negative = q->has_sign && is_negative(x + b * size, n, largest);
            scales[b] = negative ? -scale : scale;
            if (q->tried)
                scales[b] = searched(q, x + b * size, b * size, n, scales[b]);
        }
        encode(w, scales, stored);
        for (int64_t b = 0; b < w->blocks; b++, x += size) {
            const int64_t n = smaller(size, w->columns - b * size), half = (n + 1) / 2;
            uint8_t *block = w->levels ? codes : packed + b * size;
            if (w->levels)
                encode_block(q, x, n, scales[b], 4, block, &sums);
            else
                encode_block(q, x, n, scales[b], 8, block, &sums);
            if (n % 2 && w->levels)
                codes[n] = (uint8_t)q->zero;
            /* A block of zero codes dequantizes to zeros, and quantizing these would give a scale of zero: store that. */
            if (is_double && has_zero && stored[b] == 1 && all_equal(block, n, (uint8_t)q->zero))
                stored[b] = 0;
            for (int64_t j = 0; w->levels && j < half; j++)
                packed[b * w->half + j] = (uint8_t)(codes[j] | codes[half + j] << 4);
        }
        sum_squares(&sums, q->squares + 2 * r);
    }
    return 1;
}

static void quantize_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    struct quantizing *q = job->call;
    int64_t from, to;
    share(q->weight->rows, 1, parts, part, &from, &to);
    if (!quantize(q, from, to, q->scratch + thread * q->own))
        q->failed = 1;
}

/* The sums of the squared differences of two rows, or of the numbers alone without a second one. */
INLINE void compare_rows(const struct comparing *call, int64_t row, const int type, const int other)
{
    const int64_t n = call->columns, at = row * n;
    struct squares sums = {{0}, {0}};
    for (int64_t i = 0; i < n; i += ERROR_SUMS) {
        float x[ERROR_SUMS] = {0}, error[ERROR_SUMS] = {0};
        for (int64_t j = i; j < n && j < i + ERROR_SUMS; j += LANES) {
            const V value = load_some(call->x, type, at + j, n - j);
            v_store(x + j - i, value);
            v_store(error + j - i, v_sub(value, load_some(call->other, other, at + j, n - j)));
        }
        add_squares(x, error, &sums);
    }
    sum_squares(&sums, call->squares + 2 * row);
}

INLINE void compare_typed(const struct comparing *call, int64_t row, const int type)
{
    OF_TYPE(call->other_type, compare_rows, call, row, type);
}

static void compare_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct comparing *call = job->call;
    int64_t row, to;
    for (share(call->rows, 1, parts, part, &row, &to); row < to; row++)
        OF_TYPE(call->type, compare_typed, call, row);
}
