/* grad @ W. Columns lie across the lanes. A thread takes groups of columns, for each of which it goes through all rows of W in order.
 * GRAD_ROWS rows are dequantized into a tile, as pairs in bfloat16; a small batch (`few`) meets 16-bit weights in registers. */
#pragma once
#include "weights8.h"

#define GRAD_INPUTS 6 /* batch rows that are multiplied at a time */
#define GRAD_FEWER 16 /* most batch rows summed in chains of GRAD_ROWS / 2 in float32: torch's are short, too */
/* How many rows ahead 16-bit weights are prefetched to L1 (where rows may share few sets) and to L2. */
#define GRAD_SOON 8
#define GRAD_FAR 64

/* sums (M, GROUP) += grad (M, count) @ rows (count, GROUP), for TILE_VECTORS vectors of columns. Rows, of a tile or of 16-bit
 * weights of this type, are `step` numbers apart. With bf16 elements of both factors are pairs. */
INLINE void accumulate(const float *grad, int64_t grad_stride, const int M, const void *rows, int64_t step, int64_t count,
                       float *sums, const int type, const int bf16)
{
    V acc[GRAD_INPUTS * TILE_VECTORS];
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) acc[j * TILE_VECTORS + n] = v_zero();
    for (int64_t r = 0; r < count; r++) {
        V row[TILE_VECTORS];
        EACH_VECTOR(TILE_VECTORS) row[n] = load_as(rows, type, r * step + n * LANES);
        for (int n = 0; n < TILE_VECTORS * LANES && type != FLOAT32; n += 32) {
            prefetch((const uint16_t *)rows + (r + GRAD_SOON) * step + n);
            prefetch_far((const uint16_t *)rows + (r + GRAD_FAR) * step + n);
        }
        EACH_INPUT {
            const V factor = spread_unit(grad + j * grad_stride + r, bf16);
            EACH_VECTOR(TILE_VECTORS) acc[j * TILE_VECTORS + n] = multiply_add(row[n], factor, acc[j * TILE_VECTORS + n], bf16);
        }
    }
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) {
        float *sum = sums + j * GROUP + n * LANES;
        v_store(sum, v_add(v_load(sum), acc[j * TILE_VECTORS + n]));
    }
}

/* out = group g of rows `row` and row + 1 (zeros without `both`), dequantized and interleaved: GROUP pairs. */
INLINE void decode_pair(const struct weight *w, int64_t row, int both, int64_t g, int64_t t0, T table,
                               const float *scales, float *out)
{
    const W one = words_of_group(w, row, g), two = both ? words_of_group(w, row + 1, g) : (W){0};
    prefetch(w->packed + (row + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
    prefetch(w->packed + (row + 1 + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
    const V first = spread(w->order, scales, t0, g);
    const V second = both ? spread(w->order, scales + TILE_SCALES, t0, g) : v_zero();
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const V even = v_mul(v_lookup(table, one, k), first), odd = v_mul(v_lookup(table, two, k), second);
        v_store(out + k * LANES, pairs(even, odd));
    }
}

/* tile = group g of rows r0 to r1, dequantized; returns its rows, or pairs of rows. `scales` are those from group t0 on. */
INLINE int64_t decode_tile(const struct weight *w, int64_t r0, int64_t r1, int64_t t0, int64_t g, const float *scales, float *tile,
                       const int bf16)
{
    const T table = table_load(w->order ? w->levels : tile); /* 16-bit floats have no levels: the table is not used */
    for (int64_t r = r0; bf16 && r < r1; r += 2)
        decode_pair(w, r, r + 1 < r1, g, t0, table, scales + (r - r0) * TILE_SCALES, tile + (r - r0) / 2 * GROUP);
    for (int64_t i = 0; !bf16 && i < r1 - r0; i++)
        if (w->order)
            decode_group(w, r0 + i, g, t0, table, scales + i * TILE_SCALES, tile + i * GROUP);
        else if (w->half) {
            for (int64_t c = 0; c < GROUP; c += 64)
                prefetch(w->packed + (r0 + i + GRAD_ROWS) * w->row_bytes + g * GROUP + c);
            const float *of_group = scales + i * TILE_SCALES + g * GROUP / (2 * w->half) - t0 * GROUP / (2 * w->half);
            dequantize_columns8(w, r0 + i, g * GROUP, (g + 1) * GROUP, of_group, tile + i * GROUP);
        } else {
            for (int64_t c = 0; c < GROUP; c += 32)
                prefetch((const uint16_t *)w->packed + (r0 + i + GRAD_ROWS) * w->columns + g * GROUP + c);
            OF_SIXTEEN(w->encoding, widen, w, r0 + i, g * GROUP, GROUP, tile + i * GROUP);
        }
    return bf16 ? (r1 - r0 + 1) / 2 : r1 - r0;
}

/* sums (batch, GROUP) += grad @ rows, for group g of `count` rows: see accumulate. The batch rows of grad are `stride` apart. */
INLINE void grad_group(const struct job *job, const float *grad, int64_t stride, const void *rows, int64_t step, int64_t count,
                       float *sums, const int bf16, const int type)
{
    for (int n = 0; n < GROUP; n += TILE_VECTORS * LANES) {
        const void *of = (const char *)rows + n * (type == FLOAT32 ? 4 : 2);
#define CALL(M) accumulate(grad + m * stride, stride, M, of, step, count, sums + m * GROUP + n, type, bf16)
        IN_PASSES(job->m1 - job->m0, GRAD_INPUTS, CALL)
#undef CALL
    }
}

/* out (R, TILE_SCALES) = the scales of R rows for groups g0 to g1, from the first block of g0 on, as whole vectors. */
INLINE void tile_scales(const struct weight *w, int64_t r, const int R, int64_t g0, int64_t g1, float *out)
{
    const struct order *order = w->order;
    const int64_t last = order->block[g1 * LANES - 1]; /* of group g1 - 1 */
    const int64_t first = order->first_block[g0], end = g1 < order->groups ? order->first_block[g1 - 1] + last + 1 : w->blocks;
    V unit[4], scale[4];
    row_units(w, r, R, unit);
    for (int64_t b = first; b < end; b += LANES, out += LANES) {
        few_scales(w, r, b, R, unit, scale);
        EACH_ROW v_store(out + i * TILE_SCALES, scale[i]);
    }
}

/* The 16-bit gradient of rows r0 to r1, GRAD_ROWS floats apart: widened to float32, or as pairs of bfloat16, padded with a zero. */
static void grad_rows(const struct job *job, int64_t r0, int64_t r1, const int bf16, float *out)
{
    const int64_t rows = r1 - r0;
    for (int64_t m = job->m0; m < job->m1; m++, out += GRAD_ROWS) {
        const uint16_t *of = (const uint16_t *)job->x + m * job->weight->rows + r0;
        if (!bf16) {
            OF_SIXTEEN(job->type, widen_run, of, rows, out);
            continue;
        }
        memcpy(out, of, (size_t)rows * sizeof *of);
        if (rows % 2)
            ((uint16_t *)out)[rows] = 0;
    }
}

/* Write the sums (batch, GROUP) of a group to the output, in the order of the columns. */
INLINE void unpack(const struct job *job, int64_t g, const float *sums, const int type)
{
    const struct weight *w = job->weight;
    const int64_t half = w->half, from = g * LANES * 4, size = type == FLOAT32 ? 4 : 2;
    char *out = (char *)job->out + job->m0 * w->columns * size;
    if (w->order && ((from + LANES * 4 - 1) / half + 1) * 2 * half <= w->columns) {
        int64_t column[LANES]; /* column of the first of a word's four low nibbles; its high nibbles are half a block later */
        for (int64_t i = 0; i < LANES; i++)
            column[i] = (from + 4 * i) + (from + 4 * i) / half * half;
        for (int64_t m = job->m0; m < job->m1; m++, sums += GROUP, out += w->columns * size)
            for (int high = 0; high < 2; high++) {
                float runs[4 * LANES]; /* four columns per word */
                const float *of = sums + high * LANES;
                for (int i = 0; i < 4 * LANES; i++)
                    runs[i] = of[i % 4 * 2 * LANES + i / 4];
                uint16_t typed[4 * LANES];
                for (int i = 0; i < 4 && type != FLOAT32; i++)
                    store_as(typed, type, i * LANES, v_load(runs + i * LANES));
                for (int i = 0; i < LANES; i++)
                    memcpy(out + (column[i] + high * half) * size,
                           type == FLOAT32 ? (const void *)(runs + 4 * i) : typed + 4 * i, (size_t)(4 * size));
            }
        return;
    }
    for (int64_t m = job->m0; m < job->m1; m++, sums += GROUP, out += w->columns * size)
        if (!w->order) {
            const int64_t n = smaller(GROUP, w->columns - g * GROUP);
            for (int64_t i = 0; i < n; i += LANES)
                store_some(out, type, g * GROUP + i, n - i, v_load(sums + i));
        } else {
            for (int64_t i = 0, low, high; i < LANES * 4 && from + i < w->row_bytes; i++) {
                const float *of = sums + i % 4 * 2 * LANES + i / 4;
                columns_of(from + i, w->columns, half, &low, &high);
                write_as(out, type, low, of[0]);
                if (high >= 0)
                    write_as(out, type, high, of[LANES]);
            }
        }
}

/* grad @ W for a part of the groups of columns. */
INLINE void grad_part(const struct job *job, int64_t part, int64_t parts, int64_t thread, const int bf16)
{
    const struct weight *w = job->weight;
    float *scales = job->own + thread * job->own_floats, *tile = scales + GRAD_ROWS * 2 * TILE_SCALES, *rows = tile + GRAD_ROWS * MAX_GROUP;
    const int64_t batch = (job->m1 - job->m0) * GROUP, columns = grad_columns(w, job->threads);
    const int64_t step = bf16 ? 2 * GRAD_ROWS : job->batch <= GRAD_FEWER ? GRAD_ROWS / 2 : GRAD_ROWS, stride = job->type == FLOAT32 ? w->rows : GRAD_ROWS;
    int64_t g0, g1;
    share(w->stride / GROUP, MAX_GROUP / GROUP, parts, part, &g0, &g1);
    for (int64_t t0 = g0, t1; t0 < g1; t0 = t1) {
        t1 = smaller(t0 + columns / GROUP, g1);
        /* Each thread has room for the sums of `columns` columns; if that is room for all columns, each has its own place. */
        float *sums = job->packed + (job->threads * columns < w->stride ? thread * columns / GROUP : t0) * batch;
        memset(sums, 0, (size_t)((t1 - t0) * batch) * sizeof(float));
        for (int64_t r0 = 0, r1; r0 < w->rows; r0 = r1) {
            r1 = smaller(r0 + step, w->rows);
            int64_t r = w->order ? r0 : r1;
            const int64_t size = 2 * w->half, first = size ? t0 * GROUP / size : 0;
            for (int64_t i = r0; i < r1 && size && !w->order; i++)
                row_scales(w, i, first, smaller(w->blocks, (t1 * GROUP - 1) / size + 1) - first, scales + (i - r0) * TILE_SCALES);
            for (; r + 4 <= r1; r += 4)
                tile_scales(w, r, 4, t0, t1, scales + (r - r0) * TILE_SCALES);
            for (; r < r1; r++)
                tile_scales(w, r, 1, t0, t1, scales + (r - r0) * TILE_SCALES);
            const float *grad = job->type == FLOAT32 ? (const float *)job->x + job->m0 * w->rows + r0 : rows;
            if (job->type != FLOAT32)
                grad_rows(job, r0, r1, bf16, rows);
            for (int64_t g = t0; g < t1; g++) {
                float *of = sums + (g - t0) * batch;
                const uint16_t *direct = (const uint16_t *)w->packed + r0 * w->columns + g * GROUP;
                if (!job->kernel->few || (g + 1) * GROUP > w->columns)
                    grad_group(job, grad, stride, tile, GROUP, decode_tile(w, r0, r1, t0, g, scales, tile, bf16), of, bf16, FLOAT32);
                else
                    OF_SIXTEEN(w->encoding, grad_group, job, grad, stride, direct, w->columns, r1 - r0, of, 0);
            }
        }
        for (int64_t g = t0; g < t1; g++)
            OF_TYPE(job->out_type, unpack, job, g, sums + (g - t0) * batch);
    }
}

static void grad_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { grad_part(job, part, parts, thread, 0); }
static void grad_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { grad_part(job, part, parts, thread, 1); }
