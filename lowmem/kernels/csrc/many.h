/* x @ W.T for larger batches. Rows of W lie across the lanes: LANES of them are decoded at a time and multiplied with each number of
 * x, without horizontal sums. A unit is what is multiplied at a time: a column in float32, a pair of columns in bfloat16. pack.h
 * packs x; fused.h multiplies decoded codes in registers; tiled.h dequantizes rows into a tile for the whole batch. */
#pragma once
#include "pairs.h"

#define UNITS(bf16) ((bf16) ? 4 : 8) /* units in a word */
#define MANY_ROWS (LANES * MANY_VECTORS) /* rows of a tile */
_Static_assert(MANY_VECTORS <= MAX_VECTORS && MANY_INPUTS <= 16, "scratch and passes have room for them");
/* Most batch rows summed in chains of FEWER_CHAIN words, in fused.h and tiled.h: those of torch (MKL) are short, too. */
#define FEWER 12
#define FEWER_CHAIN 2
#define EACH_LANE _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
#define EACH_OF_MANY _Pragma("GCC unroll 16") for (int j = 0; j < M; j++)
#define EACH_ROWS for (int v = 0; v < MANY_VECTORS; v++)

/* Broadcast a unit of x: a number, or a pair of bfloat16 numbers. */
INLINE V spread_unit(const float *p, const int bf16) { return bf16 ? spread_pair(p) : v_set1(*p); }

/* sum + a * b; in bfloat16 the sum of both products of a pair. */
INLINE V multiply_add(V a, V b, V sum, const int bf16) { return bf16 ? multiply_pairs(a, b, sum) : v_fma(a, b, sum); }

/* Transpose the words of a group of LANES rows: out[i * step + lane] = word i of row r + lane. Rows past the last repeat it. */
INLINE void words_across(const struct weight *w, int64_t r, int64_t group, const int step, float *out)
{
    const int64_t start = group * LANES * 4, left = w->row_bytes - start, last = w->rows - 1;
    const uint8_t *p = w->packed + start;
    V v[LANES];
    if (r + LANES <= w->rows && left >= LANES * 4) {
        p += r * w->row_bytes;
        EACH_LANE v[i] = v_of_words(words_load(p + i * w->row_bytes, LANES * 4));
    } else {
        EACH_LANE v[i] = v_of_words(words_load(p + smaller(r + i, last) * w->row_bytes, left));
    }
    v_transpose(v);
    EACH_LANE v_store(out + i * step, v[i]);
}

/* Transpose the scales of n blocks of LANES rows: out[b * step + lane] = the scale of block first + b of row r + lane, zero for
 * blocks past the row's end. Prefetches the scales of the rows that come next. */
INLINE void scales_across(const struct weight *w, int64_t r, int64_t first, int64_t n, const int step, float *out)
{
    const int64_t stride = scale_bytes(w), last = w->rows - 1;
    const int many = w->encoding >= SCALES_DOUBLE; /* double quantization */
    V unit = v_zero();
    if (many) {
        float units[LANES];
        for (int64_t i = 0; i < LANES; i++)
            units[i] = row_scale(w, smaller(r + i, last));
        unit = v_load(units);
    }
    for (int64_t b = 0; b < n; b += LANES, out += LANES * step) {
        V v[LANES];
        const int64_t there = smaller(n, w->blocks - first) - b, next = step * stride + (first + b) * stride / w->blocks;
        for (int64_t i = 0; i < LANES; i++) {
            const uint8_t *p = w->scales + smaller(r + i, last) * stride;
            v[i] = v_scales(p, first + b, there, w->encoding);
            prefetch(p + next);
        }
        v_transpose(v);
        for (int64_t i = 0; i < smaller(n - b, LANES); i++) { /* rounded exactly as row_scales rounds */
            if (many)
                v[i] = v_div(v_mul(v[i], unit), v_set1(row_steps(w)));
            v_store(out + i * step, v[i]);
        }
    }
}

/* Transpose sums (rows, LANES) to (LANES, rows). */
INLINE void turn(const float *sums, const int rows, float *out)
{
    for (int r = 0; r < rows; r += LANES) {
        V v[LANES];
        EACH_LANE v[i] = v_load(sums + (r + i) * LANES);
        v_transpose(v);
        EACH_LANE v_store(out + i * rows + r, v[i]);
    }
}

/* The bias of `rows` rows from r on, in place or copied to `widened`; zeros where it is none, or was added before. */
INLINE const float *bias_of(const struct job *job, int64_t r, int64_t rows, float *widened)
{
    if (!job->bias || job->g0)
        return widened;
    if (job->bias_type == FLOAT32)
        return (const float *)job->bias + r;
    OF_SIXTEEN(job->bias_type, widen_run, (const uint16_t *)job->bias + r, rows, widened);
    return widened;
}

/* Write sums (batch, vectors * LANES) of `rows` rows from r on to out, whose rows are `step` apart: with the bias, or, for
 * later groups of columns, with the partial sums of those before. */
INLINE void put_rows_as(const struct job *job, int64_t r, int64_t rows, const int vectors, const float *sums, void *out,
                               int64_t step, const int type)
{
    float widened[MAX_VECTORS * LANES] = {0};
    const float *bias = bias_of(job, r, rows, widened);
    const float *before = job->g0 ? job->partial + job->m0 * job->weight->rows + r : bias;
    const int64_t further = job->g0 ? job->weight->rows : 0, end = job->m1 * step + r;
    for (int64_t at = job->m0 * step + r; at < end; at += step, before += further, sums += vectors * LANES)
        for (int64_t i = 0, n; (n = rows - i) > 0; i += LANES)
            store_some(out, type, at + i, n, v_add(v_load(sums + i), load_some(before, FLOAT32, i, n)));
}

/* The same to the output, rounded to its type, or to the partial sums if columns are left. */
static void put_rows(const struct job *job, int64_t r, int64_t rows, const int vectors, const float *sums)
{
    if (job->g1 * GROUP < job->weight->columns)
        put_rows_as(job, r, rows, vectors, sums, job->partial, job->weight->rows, FLOAT32);
    else
        OF_TYPE(job->out_type, put_rows_as, job, r, rows, vectors, sums, job->out, job->out_step);
}

/* Packed x from column c on (counted from the first packed column), for the first batch row of a piece. */
INLINE const float *packed_at(const struct job *job, int64_t c, const int bf16)
{
    const int64_t batch = job->m1 - job->m0;
    return job->packed + c / PART(bf16) * PART_FLOATS * batch + c % PART(bf16) / (bf16 ? 2 : 1);
}

/* The bytes of the codes (or 16-bit floats) of so many columns. */
INLINE int64_t code_bytes(const struct weight *w, int64_t columns) { return w->order ? columns / 2 : w->half ? columns : columns * 2; }

/* The address of codes (or 16-bit floats) to prefetch: `columns` columns after column c of row r, where the last packed column
 * is followed by the first one of the row `rows` further. */
INLINE const uint8_t *codes_behind(const struct job *job, int64_t r, int64_t c, int64_t columns, int64_t rows)
{
    const int64_t begin = job->g0 * GROUP, width = job->g1 * GROUP - begin, behind = c - begin + columns;
    r += behind / width * rows;
    c = begin + behind % width;
    return job->weight->packed + r * job->weight->row_bytes + code_bytes(job->weight, c);
}

/* Transpose the scales of `vectors` times LANES rows for a chunk of columns that starts at `start`. Returns the first block. */
INLINE int64_t chunk_scales(const struct job *job, int64_t r, int64_t start, const int vectors, float *scales)
{
    const struct weight *w = job->weight;
    const int64_t first = start / 2 / w->half, end = smaller(start + chunk_of(w), job->g1 * GROUP) / 2 - 1;
    for (int v = 0; v < vectors; v++)
        scales_across(w, r + v * LANES, first, end / w->half - first + 1, vectors * LANES, scales + v * LANES);
    return first;
}
