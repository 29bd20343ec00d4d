/* Weights in 8 bits: integer / divisor * scale. A byte is a code, the integer plus 128, in the order of the columns. */
#pragma once
#include "reading.h"

/* The integers of LANES codes. */
INLINE V weights8_load(const uint8_t *p)
{
    return __builtin_convertvector((N)((I)bytes_load(p) - 128), V);
}

/* The integers of the first n codes, then zeros. */
INLINE V weights8_some(const uint8_t *p, int64_t n)
{
    if (n >= LANES)
        return weights8_load(p);
    uint8_t some[LANES];
    memset(some, 128, sizeof some);
    memcpy(some, p, (size_t)n);
    return weights8_load(some);
}

/* The scales of R rows for LANES blocks from `first` on. */
INLINE void weights8_scales(const struct weight *w, int64_t r, int64_t first, const int R, float (*out)[MAX_LANES])
{
    EACH_ROW row_scales(w, r + i, first, smaller(LANES, w->blocks - first), out[i]);
}

/* As `few`, for blocks of whole vectors. A block, or FEW_CHAIN vectors of it, is summed before it is scaled. */
INLINE void few_weights8(const struct job *job, int64_t r, const int R, const int M, V *out)
{
    const struct weight *w = job->weight;
    const int64_t end = smaller(w->columns, job->g1 * GROUP), size = 2 * w->half;
    const uint8_t *rows = w->packed + r * w->row_bytes;
    const float *x = job->packed;
    float scales[4][MAX_LANES];
    V acc[FEW_SUMS], sum[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    int64_t c = job->g0 * GROUP, block = c / size, first = block;
    weights8_scales(w, r, first, R, scales);
    while (c < end) {
        if (c == (block + 1) * size && ++block == first + LANES)
            weights8_scales(w, r, first = block, R, scales);
        EACH_ROW EACH_INPUT sum[AT] = v_zero();
        const int64_t stop = smaller(smaller((block + 1) * size, end), c + FEW_CHAIN * LANES);
        for (; c < stop; c += LANES, x += M * LANES) {
            V row[4];
            EACH_ROW row[i] = weights8_some(rows + i * w->row_bytes + c, end - c);
            if (c % 64 == 0) /* once per cache line */
                EACH_ROW prefetch(rows + (i + 8 * R) * w->row_bytes + c);
            EACH_INPUT {
                const V value = v_load(x + j * LANES);
                EACH_ROW sum[AT] = v_fma(row[i], value, sum[AT]);
            }
        }
        EACH_ROW {
            const V scale = v_set1(scales[i][block - first]);
            EACH_INPUT acc[AT] = v_fma(sum[AT], scale, acc[AT]);
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = v_mul(acc[AT], v_set1(1.0f / w->divisor));
}

/* Dequantize columns c to `end` of a row, and zeros past the row's end, to out. `scales` are those from the block of column c on. */
INLINE void dequantize_columns8(const struct weight *w, int64_t row, int64_t c, int64_t end, const float *scales, float *out)
{
    const int64_t size = 2 * w->half;
    const uint8_t *p = w->packed + row * w->row_bytes;
    for (int64_t stop = (c / size + 1) * size; c < end; stop += size, scales++) {
        const V scale = v_set1(*scales / w->divisor);
        for (; c < smaller(stop, end); c += LANES, out += LANES)
            v_store(out, c < w->columns ? v_mul(weights8_some(p + c, w->columns - c), scale) : v_zero());
    }
}

/* As widen_across, for LANES columns of one block, whose scales are those of the rows. */
INLINE void dequantize_across8(const struct weight *w, int64_t r, int64_t c, const int step, const float *scales, float *tile)
{
    const int64_t last = w->rows - 1, left = w->columns - c;
    const uint8_t *p = w->packed + c;
    V v[LANES], scale = v_div(v_load(scales), v_set1(w->divisor));
    EACH_LANE v[i] = left > 0 ? weights8_some(p + smaller(r + i, last) * w->row_bytes, left) : v_zero();
    v_transpose(v);
    EACH_LANE v_store(tile + i * step, v_mul(v[i], scale));
}

/* As `dequantize_block`, for n columns. */
INLINE void dequantize_block8(const struct weight *w, const uint8_t *p, int64_t n, float one, void *out, int64_t i, const int type)
{
    const V scale = v_set1(one), divisor = v_set1(w->divisor);
    for (int64_t j = 0; j < n; j += LANES)
        store_some(out, type, i + j, n - j, v_mul(v_div(weights8_some(p + j, n - j), divisor), scale));
}
