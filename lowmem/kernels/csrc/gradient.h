/* grad @ W: a thread takes groups of columns, and for each of them all rows in order. Columns lie across the lanes. */

#define GRAD_INPUTS 6     /* of the gradient at a time with a tile, */
#define GRAD_FEW_INPUTS 3 /* and with codes decoded in registers, */
#define GRAD_FEW_BATCH 8  /* up to this batch (in bfloat16: of GRAD_FEW_INPUTS) */
#define EACH_VECTOR(most) _Pragma("GCC unroll 8") for (int n = 0; n < most; n++)

INLINE void LEVEL(add_to)(float *p, V a) { v_store(p, v_add(v_load(p), a)); }

/* M rows of the gradient with restored rows: sums, a GROUP an input, += grad @ tile. */
INLINE void LEVEL(accumulate)(const float *grad, int64_t grad_stride, const int M, const float *tile, int rows, float *sums)
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
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) LEVEL(add_to)(sums + j * GROUP + n * LANES, acc[j * TILE_VECTORS + n]);
}

/* The same with codes of group g decoded in registers, vectors k0 and on: rows r0 to r1. */
INLINE void LEVEL(accumulate_few)(const struct weight *w, const float *grad, int64_t grad_stride, const int M,
                                  int64_t r0, int64_t r1, int64_t g, const int k0, float *sums)
{
    const T table = table_load(w->levels);
    const int32_t *block = w->order->block + g * 4 * LANES;
    const int64_t first = w->order->first_block[g];
    V acc[GRAD_FEW_INPUTS * GRAD_VECTORS];
    EACH_INPUT EACH_VECTOR(GRAD_VECTORS) acc[j * GRAD_VECTORS + n] = v_zero();
    for (int64_t r = r0; r < r1; r++) {
        const W words = LEVEL(words)(w, r, g);
        prefetch(w->packed + (r + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
        V unit, stored;
        LEVEL(row_units)(w, r, 1, &unit);
        LEVEL(few_scales)(w, r, first, 1, &unit, &stored);
        const V scale = v_spread(stored, block);
        V factor[GRAD_FEW_INPUTS];
        EACH_INPUT factor[j] = v_mul(scale, v_set1(grad[j * grad_stride + r - r0]));
        EACH_VECTOR(GRAD_VECTORS) {
            const V level = v_lookup(table, words, k0 + n);
            EACH_INPUT acc[j * GRAD_VECTORS + n] = v_fma(level, factor[j], acc[j * GRAD_VECTORS + n]);
        }
    }
    EACH_INPUT EACH_VECTOR(GRAD_VECTORS) LEVEL(add_to)(sums + j * GROUP + (k0 + n) * LANES, acc[j * GRAD_VECTORS + n]);
}

/* The same with 16-bit weights, from column c on, of which there is a whole GROUP. */
INLINE void LEVEL(accumulate_sixteen)(const struct weight *w, const float *grad, int64_t grad_stride, const int M,
                                      int64_t r0, int64_t r1, int64_t c, float *sums, const int type)
{
    const int64_t stride = w->columns;
    const uint16_t *p = (const uint16_t *)w->packed + r0 * stride + c;
    V acc[GRAD_FEW_INPUTS * GRAD_VECTORS];
    EACH_INPUT EACH_VECTOR(GRAD_VECTORS) acc[j * GRAD_VECTORS + n] = v_zero();
    for (int64_t r = r0; r < r1; r++, p += stride) {
        V factor[GRAD_FEW_INPUTS];
        EACH_INPUT factor[j] = v_set1(grad[j * grad_stride + r - r0]);
        EACH_VECTOR(GRAD_VECTORS) {
            const V row = LEVEL(sixteen)(p + n * LANES, type);
            if (n % 2 == 0)
                prefetch(p + GRAD_ROWS * stride + n * LANES);
            EACH_INPUT acc[j * GRAD_VECTORS + n] = v_fma(row, factor[j], acc[j * GRAD_VECTORS + n]);
        }
    }
    EACH_INPUT EACH_VECTOR(GRAD_VECTORS) LEVEL(add_to)(sums + j * GROUP + n * LANES, acc[j * GRAD_VECTORS + n]);
}

/* Whether the gradient of a batch needs no tile: its codes are decoded in registers. */
INLINE int LEVEL(grad_few)(const struct weight *w, int64_t batch, int low)
{
    return w->order && w->order->whole_words && batch <= (low ? GRAD_FEW_INPUTS : GRAD_FEW_BATCH);
}

#if LEVEL_LOW
#include "gradient_bfloat16.h"
#endif

/* Rows r0 to r1 of group g, of the chunk that starts at group t0; `scales` holds those of the chunk, row by row, and
 * `grad` what the inputs have for the rows. */
static void LEVEL(grad_group)(const struct job *job, const float *grad, int64_t stride, int64_t r0, int64_t r1, int64_t t0,
                              int64_t g, const float *scales, float *tile, float *sums)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, rows = r1 - r0;
    if (LEVEL(grad_few)(w, batch, 0)) {
        for (int k = 0; k < 8; k += GRAD_VECTORS) {
#define CALL(M) LEVEL(accumulate_few)(w, grad + m * stride, stride, M, r0, r1, g, k, sums + m * GROUP)
            IN_PASSES(batch, GRAD_FEW_INPUTS, CALL)
#undef CALL
        }
        return;
    }
    if (!w->order && (g + 1) * GROUP <= w->columns && batch <= GRAD_FEW_BATCH) {
        for (int k = 0; k < 8; k += GRAD_VECTORS) {
            const int64_t c = g * GROUP + k * LANES;
            float *to = sums + k * LANES;
#define CALL(M) LEVEL(accumulate_sixteen)(w, grad + m * stride, stride, M, r0, r1, c, to + m * GROUP, FLOAT16)
#define CALL_BFLOAT(M) LEVEL(accumulate_sixteen)(w, grad + m * stride, stride, M, r0, r1, c, to + m * GROUP, BFLOAT16)
            if (w->encoding == BFLOAT16)
                IN_PASSES(batch, GRAD_FEW_INPUTS, CALL_BFLOAT)
            else
                IN_PASSES(batch, GRAD_FEW_INPUTS, CALL)
#undef CALL
#undef CALL_BFLOAT
        }
        return;
    }
    const T table = table_load(w->order ? w->levels : tile); /* any sixteen floats */
    for (int64_t i = 0; i < rows; i++)
        if (w->order)
            LEVEL(decode_group)(w, r0 + i, g, t0, table, scales + i * TILE_SCALES, tile + i * GROUP);
        else
            LEVEL(widen_typed)(w, r0 + i, g * GROUP, GROUP, tile + i * GROUP);
    for (int n0 = 0; n0 < 8; n0 += TILE_VECTORS) {
#define CALL(M) \
    LEVEL(accumulate)(grad + m * stride, stride, M, tile + n0 * LANES, (int)rows, sums + m * GROUP + n0 * LANES)
        IN_PASSES(batch, GRAD_INPUTS, CALL)
#undef CALL
    }
}

/* What the inputs have for rows r0 to r1, GRAD_ROWS apart: as float32, or as pairs of bfloat16, a zero after the last. */
static void LEVEL(grad_rows)(const struct job *job, int64_t r0, int64_t r1, int low, float *out)
{
    for (int64_t m = job->m0; m < job->m1; m++, out += GRAD_ROWS) {
        const int64_t from = m * job->weight->rows;
        if (low) {
            uint16_t *pairs = (uint16_t *)out;
            for (int64_t r = r0; r < r1; r++)
                pairs[r - r0] = ((const uint16_t *)job->x)[from + r];
            pairs[r1 - r0] = 0;
        } else if (job->type == BFLOAT16) {
            for (int64_t r = r0; r < r1; r++)
                out[r - r0] = read_as_float(job->x, BFLOAT16, from + r);
        } else {
            for (int64_t r = r0; r < r1; r++)
                out[r - r0] = read_as_float(job->x, FLOAT16, from + r);
        }
    }
}

/* The sums of a group, GROUP an input, out of the order of the words and into the output. */
INLINE void LEVEL(unpack)(const struct job *job, int64_t g, const float *sums, const int type)
{
    const struct weight *w = job->weight;
    const int64_t half = w->half, from = g * LANES * 4, size = type == FLOAT32 ? 4 : 2;
    char *out = (char *)job->out + job->m0 * w->columns * size;
    if (w->order && w->order->whole_words && ((from + LANES * 4 - 1) / half + 1) * 2 * half <= w->columns) {
        int64_t column[LANES]; /* of the first of the four low nibbles of a word; the high ones come half a block later */
        for (int64_t i = 0; i < LANES; i++)
            column[i] = (from + 4 * i) + (from + 4 * i) / half * half;
        for (int64_t m = job->m0; m < job->m1; m++, sums += GROUP, out += w->columns * size)
            for (int high = 0; high < 2; high++) {
                float runs[4 * LANES]; /* four columns a word */
                const float *of = sums + high * LANES;
                v_runs(v_load(of), v_load(of + 2 * LANES), v_load(of + 4 * LANES), v_load(of + 6 * LANES), runs);
                char typed[4 * LANES * sizeof(float)];
                for (int i = 0; i < 4 && type != FLOAT32; i++)
                    LEVEL(store_as)(typed, type, i * LANES, v_load(runs + i * LANES));
                for (int i = 0; i < LANES; i++)
                    memcpy(out + (column[i] + high * half) * size,
                           type == FLOAT32 ? (const char *)(runs + 4 * i) : typed + 8 * i, (size_t)(4 * size));
            }
        return;
    }
    for (int64_t m = job->m0; m < job->m1; m++, sums += GROUP, out += w->columns * size)
        if (!w->order) {
            for (int64_t i = 0; i < GROUP && g * GROUP + i < w->columns; i++)
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

static void LEVEL(grad_body)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    float *scales = job->own + thread * job->own_floats, *tile = scales + GRAD_ROWS * TILE_SCALES;
    float *rows = tile + GRAD_ROWS * MAX_GROUP;
    const int low = job->low;
    const int64_t batch = (job->m1 - job->m0) * GROUP;
    const int few = LEVEL(grad_few)(w, job->m1 - job->m0, low);
    const int64_t step = few && job->type == FLOAT32 ? 2 * GRAD_ROWS : GRAD_ROWS; /* which need no scratch */
    int64_t g0, g1;
    share(w->stride / GROUP, MAX_GROUP / GROUP, parts, part, &g0, &g1);
    for (int64_t t0 = g0; t0 < g1; t0 += TILE_GROUPS) {
        const int64_t t1 = smaller(t0 + TILE_GROUPS, g1);
        memset(job->packed + t0 * batch, 0, (size_t)((t1 - t0) * batch) * sizeof(float));
        for (int64_t r0 = 0, r1; r0 < w->rows; r0 = r1) {
            r1 = smaller(r0 + step, w->rows);
            for (int64_t r = r0; r < r1 && w->order && !few; r++)
                LEVEL(group_scales)(w, r, t0, t1, scales + (r - r0) * TILE_SCALES);
            const float *grad = (const float *)job->x + job->m0 * w->rows + r0;
            if (job->type != FLOAT32) {
                LEVEL(grad_rows)(job, r0, r1, low, rows);
                grad = rows;
            }
            for (int64_t g = t0; g < t1; g++)
#if LEVEL_LOW
                if (low)
                    LEVEL(grad_group_low)(job, grad, GRAD_ROWS, r0, r1, t0, g, scales, tile, job->packed + g * batch);
                else
#endif
                    LEVEL(grad_group)(job, grad, job->type == FLOAT32 ? w->rows : GRAD_ROWS, r0, r1, t0, g, scales, tile,
                                      job->packed + g * batch);
        }
        for (int64_t g = t0; g < t1; g++)
            if (job->out_type == FLOAT32)
                LEVEL(unpack)(job, g, job->packed + g * batch, FLOAT32);
            else if (job->out_type == BFLOAT16)
                LEVEL(unpack)(job, g, job->packed + g * batch, BFLOAT16);
            else
                LEVEL(unpack)(job, g, job->packed + g * batch, FLOAT16);
    }
}

static void LEVEL(input_grad)(struct job *job)
{
    const int64_t piece = piece_of(job->batch, job->weight->stride * (int64_t)sizeof(float));
    for (job->m0 = 0; job->m0 < job->batch; job->m0 = job->m1) {
        job->m1 = smaller(job->m0 + piece, job->batch);
        parallel(job, LEVEL(grad_body), 1, NULL, 0);
    }
}
