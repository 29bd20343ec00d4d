/* grad @ W. A thread takes groups of columns and, for each of them, goes through all rows of W in order, so that it alone
 * writes its columns. Columns lie across the lanes. A small batch (`few`) is multiplied with codes that are decoded in
 * registers, or 16-bit floats that are widened there; a larger one with a tile of GRAD_ROWS dequantized rows. */

#define GRAD_INPUTS 6     /* batch rows that are multiplied at a time with a tile */
#define GRAD_FEW_INPUTS 3 /* the same with codes decoded in registers */
#define GRAD_FEW_BATCH 16 /* most batch rows of any ISA for that */
/* Rows at a time then. Their gradient, followed by their units, is stored in the scratch that holds scales where tiles are
 * used. */
#define GRAD_FEW_ROWS 128
/* The same with 16-bit weights. While these rows are multiplied, as many more are prefetched to L2 (but for a single batch
 * row). */
#define GRAD_SIXTEEN_ROWS 64
/* Rows of either whose products are added in one chain, which is then added to the sum of the chains before. */
#define GRAD_CHAIN 16
#define ROW_UNITS_AT (GRAD_FEW_BATCH * GRAD_FEW_ROWS) /* offset in floats of their units: what a step of a row's scales counts */
_Static_assert(ROW_UNITS_AT + GRAD_FEW_ROWS <= 2 * GRAD_ROWS * TILE_SCALES, "they fit there");
_Static_assert(GRAD_SIXTEEN * GRAD_SIXTEEN_ROWS <= 2 * GRAD_ROWS * TILE_SCALES, "so does what the inputs have for rows of 16-bit weights");
_Static_assert(GRAD_CODES <= GRAD_FEW_BATCH && GRAD_CODES <= GRAD_MOST(1) && GRAD_SIXTEEN <= GRAD_MOST(0), "they are few");
#define EACH_SUM _Pragma("GCC unroll 8") for (int j = 0; j < M * G; j++) /* over batch rows, or over groups */

/* p += a. */
INLINE void add_to(float *p, V a) { v_store(p, v_add(v_load(p), a)); }

/* done += chain, and chain = 0, for N vectors. */
INLINE void end_chain(V *done, V *chain, const int N)
{
    EACH_VECTOR(N) {
        done[n] = v_add(done[n], chain[n]);
        chain[n] = v_zero();
    }
}

/* sums (M, GROUP) += grad (M, rows) @ tile (rows, GROUP), for TILE_VECTORS vectors of columns. */
INLINE void accumulate(const float *grad, int64_t grad_stride, const int M, const float *tile, int rows, float *sums)
{
    V acc[GRAD_INPUTS * TILE_VECTORS];
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) acc[j * TILE_VECTORS + n] = v_zero();
    for (int r = 0; r < rows; r++, tile += GROUP) {
        V row[TILE_VECTORS];
        EACH_VECTOR(TILE_VECTORS) row[n] = v_load(tile + n * LANES);
        EACH_INPUT {
            const V factor = v_set1(grad[j * grad_stride + r]);
            EACH_VECTOR(TILE_VECTORS) acc[j * TILE_VECTORS + n] = v_fma(row[n], factor, acc[j * TILE_VECTORS + n]);
        }
    }
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) add_to(sums + j * GROUP + n * LANES, acc[j * TILE_VECTORS + n]);
}

/* Whether one vector holds the scales of groups g and g + 1, and the latter is before t1. */
INLINE int share_scales(const struct weight *w, int64_t g, int64_t t1)
{
    return g + 1 < t1 && w->order->first_block[g] == w->order->first_block[g + 1];
}

/* factor = scale * grad for row r, per lane: the scales from block `first` on, spread over the words, times the gradient of M
 * batch rows, or, for one of them, of G groups. */
INLINE void row_factors(const struct weight *w, int64_t r, float row_unit, int64_t first, const int32_t *block,
                               const float *grad, int64_t grad_stride, const int M, const int G, V *factor)
{
    const V unit = v_set1(row_unit);
    V scale;
    few_scales(w, r, 1, first, 1, &unit, &scale);
    if (M == 1) {
        scale = v_mul(scale, v_set1(*grad));
        EACH_SUM factor[j] = v_spread(scale, block + j * 4 * LANES);
    } else {
        scale = v_spread(scale, block);
        EACH_INPUT factor[j] = v_mul(scale, v_set1(grad[j * grad_stride]));
    }
}

/* sums (M, GROUP) += grad @ W for rows r0 to r1 and N vectors of group g from nibble k0 on. Codes are decoded in registers.
 * units[r - r0] is what the steps of row r count. For one batch row G can be 2: groups g and g + 1. */
INLINE void accumulate_few(const struct weight *w, const float *grad, int64_t grad_stride, const int M, const int G,
                                  const int N, int64_t r0, int64_t r1, int64_t g, const int k0, const float *units, float *sums)
{
    const T table = table_load(w->levels);
    const int32_t *block = w->order->block + g * 4 * LANES;
    const int64_t first = w->order->first_block[g], row_bytes = w->row_bytes, left = row_bytes - g * LANES * 4;
    const uint8_t *p = w->packed + r0 * row_bytes + g * LANES * 4;
    V acc[GRAD_FEW_INPUTS * GRAD_VECTORS], done[GRAD_FEW_INPUTS * GRAD_VECTORS], factor[GRAD_FEW_INPUTS];
    EACH_SUM EACH_VECTOR(N) acc[j * N + n] = done[j * N + n] = v_zero();
    row_factors(w, r0, units[0], first, block, grad, grad_stride, M, G, factor);
    for (int64_t r = r0; r < r1; r++, p += row_bytes) {
        V later[GRAD_FEW_INPUTS]; /* a long chain of operations, so it is started a row ahead */
        const int64_t next = smaller(r + 1, r1 - 1);
        row_factors(w, next, units[next - r0], first, block, grad + (next - r0), grad_stride, M, G, later);
        W words[2];
        for (int i = 0; i < G; i++) {
            words[i] = words_load(p + i * LANES * 4, left - i * LANES * 4);
            prefetch(p + GRAD_ROWS * row_bytes + i * LANES * 4);
        }
        EACH_VECTOR(N) {
            V level[2];
            for (int i = 0; i < G; i++)
                level[i] = v_lookup(table, words[i], k0 + n);
            EACH_SUM acc[j * N + n] = v_fma(level[G == 2 ? j : 0], factor[j], acc[j * N + n]);
        }
        EACH_SUM factor[j] = later[j];
        if ((r - r0) % GRAD_CHAIN == GRAD_CHAIN - 1)
            EACH_SUM end_chain(done + j * N, acc + j * N, N);
    }
    EACH_SUM EACH_VECTOR(N) add_to(sums + j * GROUP + n * LANES, v_add(done[j * N + n], acc[j * N + n]));
}

/* The same with 16-bit weights: N vectors of columns from column c on. Rows are often a power of two apart, so that they share
 * few sets of L1, which hold few of them: rows are prefetched to L2 a block of rows ahead, and to L1 only 8 rows ahead. */
INLINE void accumulate_sixteen(const struct weight *w, const float *grad, int64_t grad_stride, const int M, const int N,
                                      int64_t r0, int64_t r1, int64_t c, float *sums, const int type)
{
    const int64_t stride = w->columns, soon = 8 * stride, far = GRAD_SIXTEEN_ROWS * stride;
    const uint16_t *p = (const uint16_t *)w->packed + r0 * stride + c;
    V acc[GRAD_FEW_INPUTS * GRAD_VECTORS], done[GRAD_FEW_INPUTS * GRAD_VECTORS];
    EACH_INPUT EACH_VECTOR(N) acc[j * N + n] = done[j * N + n] = v_zero();
    for (int64_t r = r0; r < r1; r++, p += stride, grad++) {
        V row[16];
        EACH_VECTOR(N) {
            row[n] = sixteen(p + n * LANES, type);
            if (n % 2 == 0) {
                prefetch(p + n * LANES + soon);
                if (N <= 8) /* no gain was measured with more */
                    prefetch_far(p + n * LANES + far);
            }
        }
        EACH_INPUT {
            const V factor = v_set1(grad[j * grad_stride]);
            EACH_VECTOR(N) acc[j * N + n] = v_fma(row[n], factor, acc[j * N + n]);
        }
        if ((r - r0) % GRAD_CHAIN == GRAD_CHAIN - 1)
            EACH_INPUT end_chain(done + j * N, acc + j * N, N);
    }
    EACH_INPUT EACH_VECTOR(N) add_to(sums + j * GROUP + n * LANES, v_add(done[j * N + n], acc[j * N + n]));
}

/* The same for group g and all batch rows. One batch row leaves registers for more groups, if they are before t1 and whole.
 * Returns the number of groups that are done. */
INLINE int grad_sixteen(const struct weight *w, const float *grad, int64_t stride, int64_t batch, int64_t r0, int64_t r1,
                               int64_t t1, int64_t g, float *sums, const int type)
{
    const int64_t c = g * GROUP, groups = 2 * GRAD_VECTORS / 8;
    if (batch == 1 && g + groups <= t1 && c + groups * GROUP <= w->columns) {
        accumulate_sixteen(w, grad, stride, 1, 2 * GRAD_VECTORS, r0, r1, c, sums, type);
        return (int)groups;
    }
#define WITH(M, N) \
    accumulate_sixteen(w, grad + m * stride, stride, M, N, r0, r1, c + k * LANES, sums + m * GROUP + k * LANES, type)
#define CALL(M) WITH(M, GRAD_VECTORS)
    for (int k = 0; k < 8 && batch <= GRAD_FEW_INPUTS; k += GRAD_VECTORS)
        IN_PASSES(batch, GRAD_FEW_INPUTS, CALL)
#undef CALL
#define CALL(M) WITH(M, GRAD_VECTORS / 2)
    for (int k = 0; k < 8 && batch > GRAD_FEW_INPUTS; k += GRAD_VECTORS / 2)
        IN_PASSES(batch, 2 * GRAD_FEW_INPUTS, CALL)
#undef CALL
#undef WITH
    return 1;
}

#if ISA_BFLOAT16
#include "gradient_bfloat16.h"
#endif

/* sums (batch, GROUP) += grad @ W for rows r0 to r1 of group g, one of the groups t0 to t1. `grad` is float32, its batch rows
 * `stride` apart, and starts at row r0. `scales` (rows, TILE_SCALES) are those of groups t0 to t1; where no tile is used, the
 * units of the rows lie at ROW_UNITS_AT there. Returns the number of groups that are done: two where they share a vector of
 * scales. */
static int grad_group(const struct job *job, const float *grad, int64_t stride, int64_t r0, int64_t r1, int64_t t0,
                             int64_t t1, int64_t g, const float *scales, float *tile, float *sums)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, rows = r1 - r0;
    const float *units = scales + ROW_UNITS_AT;
    if (job->kernel->few && !w->order && (g + 1) * GROUP <= w->columns)
        return w->encoding == BFLOAT16 ? grad_sixteen(w, grad, stride, batch, r0, r1, t1, g, sums, BFLOAT16)
                                       : grad_sixteen(w, grad, stride, batch, r0, r1, t1, g, sums, FLOAT16);
    if (job->kernel->few && w->order) {
        if (batch == 1) {
            const int both = GRAD_VECTORS == 8 && share_scales(w, g, t1); /* two groups at a time */
            for (int64_t r = r0, to; r < r1; r = to, grad += GRAD_FEW_ROWS, units += GRAD_FEW_ROWS) {
                to = smaller(r + GRAD_FEW_ROWS, r1);
                if (both)
                    accumulate_few(w, grad, stride, 1, 2, 8, r, to, g, 0, units, sums);
                else
                    accumulate_few(w, grad, stride, 1, 1, 8, r, to, g, 0, units, sums);
            }
            return 1 + both;
        }
        for (int k = 0; k < 8; k += GRAD_VECTORS) {
#define CALL(M) accumulate_few(w, grad + m * stride, stride, M, 1, GRAD_VECTORS, r0, r1, g, k, units, sums + m * GROUP + k * LANES)
            IN_PASSES(batch, GRAD_FEW_INPUTS, CALL)
#undef CALL
        }
        return 1;
    }
    const T table = table_load(w->order ? w->levels : tile); /* 16-bit floats have no levels: any 16 floats */
    for (int64_t i = 0; i < rows; i++)
        if (w->order)
            decode_group(w, r0 + i, g, t0, table, scales + i * TILE_SCALES, tile + i * GROUP);
        else {
            for (int64_t c = 0; c < GROUP; c += 32)
                prefetch((const uint16_t *)w->packed + (r0 + i + GRAD_ROWS) * w->columns + g * GROUP + c);
            widen_typed(w, r0 + i, g * GROUP, GROUP, tile + i * GROUP);
        }
    for (int n0 = 0; n0 < 8; n0 += TILE_VECTORS) {
#define CALL(M) \
    accumulate(grad + m * stride, stride, M, tile + n0 * LANES, (int)rows, sums + m * GROUP + n0 * LANES)
        IN_PASSES(batch, GRAD_INPUTS, CALL)
#undef CALL
    }
    return 1;
}

/* out[i] = row scale / row_steps of row r0 + i, for double quantization. */
static void grad_units(const struct weight *w, int64_t r0, int64_t rows, float *out)
{
    uint16_t halves[GRAD_FEW_ROWS];
    if (w->encoding < SCALES_DOUBLE)
        return;
    for (int64_t i = 0; i < rows; i++)
        memcpy(halves + i, row_scale_at(w, r0 + i), sizeof *halves);
    v_from_half(halves, rows, out);
    for (int64_t i = 0; i < rows; i++)
        out[i] /= row_steps(w);
}

/* out (R, TILE_SCALES) = the scales of R rows for groups g0 to g1, from the first block of g0 on, as whole vectors. `units` is
 * what the steps of each row count. */
INLINE void tile_scales(const struct weight *w, int64_t r, const int R, int64_t g0, int64_t g1, const float *units, float *out)
{
    const struct order *order = w->order;
    const int64_t last = order->block[(g1 * 4 - 1) * LANES + LANES - 1]; /* of group g1 - 1 */
    const int64_t first = order->first_block[g0], end = g1 < order->groups ? order->first_block[g1 - 1] + last + 1 : w->blocks;
    V unit[4], scale[4];
    EACH_ROW unit[i] = v_set1(units[i]);
    for (int64_t b = first; b < end; b += LANES, out += LANES) {
        few_scales(w, r, 1, b, R, unit, scale);
        EACH_ROW v_store(out + i * TILE_SCALES, scale[i]);
    }
}

/* The 16-bit gradient of rows r0 to r1, with room for `step` of them per batch row: widened to float32, or as pairs of
 * bfloat16. An odd number of rows is padded with a zero. */
static void grad_rows(const struct job *job, int64_t r0, int64_t r1, int paired, float *out, int64_t step)
{
    const int64_t rows = r1 - r0;
    for (int64_t m = job->m0; m < job->m1; m++, out += paired ? step / 2 : step) {
        const uint16_t *of = (const uint16_t *)job->x + m * job->weight->rows + r0;
        if (paired) {
            memcpy(out, of, (size_t)rows * sizeof *of);
            if (rows % 2)
                ((uint16_t *)out)[rows] = 0;
            continue;
        }
        widen_run_typed(of, rows, out, job->type);
        if (rows % 2)
            out[rows] = 0.0f;
    }
}

/* Write the sums (batch, GROUP) of a group to the output, in the order of the columns. */
INLINE void unpack(const struct job *job, int64_t g, const float *sums, const int type)
{
    const struct weight *w = job->weight;
    const int64_t half = w->half, from = g * LANES * 4, size = type == FLOAT32 ? 4 : 2;
    char *out = (char *)job->out + job->m0 * w->columns * size;
    if (w->order && w->order->whole_words && ((from + LANES * 4 - 1) / half + 1) * 2 * half <= w->columns) {
        int64_t column[LANES]; /* column of the first of a word's four low nibbles; its high nibbles are half a block later */
        for (int64_t i = 0; i < LANES; i++)
            column[i] = (from + 4 * i) + (from + 4 * i) / half * half;
        for (int64_t m = job->m0; m < job->m1; m++, sums += GROUP, out += w->columns * size)
            for (int high = 0; high < 2; high++) {
                float runs[4 * LANES]; /* four columns per word */
                const float *of = sums + high * LANES;
                v_runs(v_load(of), v_load(of + 2 * LANES), v_load(of + 4 * LANES), v_load(of + 6 * LANES), runs);
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
            int64_t i = 0, n = smaller(GROUP, w->columns - g * GROUP);
            for (; i + LANES <= n; i += LANES)
                store_as(out, type, g * GROUP + i, v_load(sums + i));
            for (; i < n; i++)
                write_as(out, type, g * GROUP + i, sums[i]);
        } else {
            for (int64_t i = 0; i < LANES * 4 && from + i < w->row_bytes; i++) {
                const int64_t start = (from + i) / half * 2 * half, j = (from + i) % half;
                const int64_t left = smaller(w->columns - start, 2 * half), lower = (left + 1) / 2;
                const float *of = sums + i % 4 * 2 * LANES + i / 4;
                write_as(out, type, start + j, of[0]);
                if (lower + j < left)
                    write_as(out, type, start + lower + j, of[LANES]);
            }
        }
}

/* grad @ W for a part of the groups of columns. */
INLINE void grad_part(const struct job *job, int64_t part, int64_t parts, int64_t thread, const int bf16)
{
    const struct weight *w = job->weight;
    float *scales = job->own + thread * job->own_floats, *tile = scales + 2 * GRAD_ROWS * TILE_SCALES;
    const int64_t batch = (job->m1 - job->m0) * GROUP, columns = grad_columns(w, job->batch, job->threads);
    const int few = job->kernel->few, no_tile = few && (w->order || w->columns == w->stride);
    const int paired = bf16 && !few;
    const int64_t step = paired ? 2 * GRAD_ROWS
                         : !no_tile ? GRAD_ROWS
                         : !w->order ? GRAD_SIXTEEN_ROWS
                         : GRAD_FEW_ROWS;
    float *rows = no_tile ? scales : tile + GRAD_ROWS * MAX_GROUP;
    int64_t g0, g1;
    share(w->stride / GROUP, MAX_GROUP / GROUP, parts, part, &g0, &g1);
    for (int64_t t0 = g0, t1; t0 < g1; t0 = t1) {
        t1 = smaller(t0 + (few ? columns : smaller(columns, TILE_COLUMNS)) / GROUP, g1);
        /* A thread has room for the sums of `columns` columns. If all threads together have room for all columns, each column
         * has its own place. */
        float *sums = job->packed + (job->threads * columns < w->stride ? thread * columns / GROUP : t0) * batch;
        memset(sums, 0, (size_t)((t1 - t0) * batch) * sizeof(float));
        for (int64_t r0 = 0, r1; r0 < w->rows; r0 = r1) {
            r1 = smaller(r0 + step, w->rows);
            if (w->order)
                grad_units(w, r0, r1 - r0, few ? scales + ROW_UNITS_AT : tile);
            if (w->order && !few) {
                int64_t r = r0; /* their units are in the memory of the tile, which is not needed yet */
                for (; r + 4 <= r1; r += 4)
                    tile_scales(w, r, 4, t0, t1, tile + (r - r0), scales + (r - r0) * TILE_SCALES);
                for (; r < r1; r++)
                    tile_scales(w, r, 1, t0, t1, tile + (r - r0), scales + (r - r0) * TILE_SCALES);
            }
            const float *grad = (const float *)job->x + job->m0 * w->rows + r0;
            if (job->type != FLOAT32) {
                grad_rows(job, r0, r1, paired, rows, step);
                grad = rows;
            }
            const int64_t stride = job->type == FLOAT32 ? w->rows : paired ? step / 2 : step;
            for (int64_t g = t0; g < t1;)
#if ISA_BFLOAT16
                if (bf16)
                    g += grad_group_bf16(job, grad, stride, r0, r1, t0, t1, g, scales, tile, sums + (g - t0) * batch);
                else
#endif
                    g += grad_group(job, grad, stride, r0, r1, t0, t1, g, scales, tile, sums + (g - t0) * batch);
        }
        for (int64_t g = t0; g < t1; g++)
            if (job->out_type == FLOAT32)
                unpack(job, g, sums + (g - t0) * batch, FLOAT32);
            else if (job->out_type == BFLOAT16)
                unpack(job, g, sums + (g - t0) * batch, BFLOAT16);
            else
                unpack(job, g, sums + (g - t0) * batch, FLOAT16);
    }
}

static void grad_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { grad_part(job, part, parts, thread, 0); }
#if ISA_BFLOAT16
static void grad_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { grad_part(job, part, parts, thread, 1); }
#endif
