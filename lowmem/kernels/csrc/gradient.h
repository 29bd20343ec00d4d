/* grad @ W: a thread takes groups of columns, and for each of them all rows in order. Columns lie across the lanes. */

/* M rows of the gradient with `rows` restored rows of N vectors of columns: sums += grad @ tile. */
INLINE void LEVEL(accumulate)(const float *grad, int64_t grad_stride, const int M, const float *tile, int rows, const int N,
                              float *sums, int64_t stride)
{
    V acc[3][8];
    for (int j = 0; j < M; j++)
        for (int n = 0; n < N; n++)
            acc[j][n] = v_load(sums + j * stride + n * LANES);
    for (int r = 0; r < rows; r++) {
        V row[8];
        for (int n = 0; n < N; n++)
            row[n] = v_load(tile + r * GROUP + n * LANES);
        for (int j = 0; j < M; j++) {
            const V factor = v_set1(grad[j * grad_stride + r]);
            for (int n = 0; n < N; n++)
                acc[j][n] = v_fma(row[n], factor, acc[j][n]);
        }
    }
    for (int j = 0; j < M; j++)
        for (int n = 0; n < N; n++)
            v_store(sums + j * stride + n * LANES, acc[j][n]);
}

/* The same with codes decoded in registers, for a batch of at most 3: r0 to r1 of group g. */
INLINE void LEVEL(accumulate_few)(const struct job *job, const float *grad, const int M, int64_t r0, int64_t r1, int64_t g,
                                  const float *scales, float *sums)
{
    const struct weight *w = job->weight;
    const T table = table_load(w->levels);
    for (int k0 = 0; k0 < 8; k0 += GRAD_VECTORS) {
        V acc[3][8];
        for (int j = 0; j < M; j++)
            for (int n = 0; n < GRAD_VECTORS; n++)
                acc[j][n] = v_load(sums + j * w->stride + (k0 + n) * LANES);
        for (int64_t r = r0; r < r1; r++) {
            const W words = LEVEL(words)(w, r, g);
            const V scale = LEVEL(spread)(w->order, scales + (r - r0) * TILE_SCALES, g, g, 0);
            V factor[3];
            for (int j = 0; j < M; j++)
                factor[j] = v_mul(scale, v_set1(grad[j * w->rows + r]));
#pragma GCC unroll 8
            for (int n = 0; n < GRAD_VECTORS; n++) {
                const V level = v_lookup(table, words, k0 + n);
                for (int j = 0; j < M; j++)
                    acc[j][n] = v_fma(level, factor[j], acc[j][n]);
            }
        }
        for (int j = 0; j < M; j++)
            for (int n = 0; n < GRAD_VECTORS; n++)
                v_store(sums + j * w->stride + (k0 + n) * LANES, acc[j][n]);
    }
}

static void LEVEL(grad_tile)(const float *grad, int64_t grad_stride, int64_t batch, const float *tile, int rows, float *sums,
                             int64_t stride)
{
    for (int n = 0; n < 8; n += GRAD_VECTORS) {
        int64_t m = 0;
        for (; m + 3 <= batch; m += 3)
            LEVEL(accumulate)(grad + m * grad_stride, grad_stride, 3, tile + n * LANES, rows, GRAD_VECTORS,
                              sums + m * stride + n * LANES, stride);
        for (; m < batch; m++)
            LEVEL(accumulate)(grad + m * grad_stride, grad_stride, 1, tile + n * LANES, rows, GRAD_VECTORS,
                              sums + m * stride + n * LANES, stride);
    }
}

#if LEVEL_LOW
#include "gradient_bfloat16.h"
#endif

/* The sums of a group of columns: out of the order of the words, and into the type of the output. */
static void LEVEL(unpack)(const struct job *job, int64_t m, int64_t c0, int64_t c1)
{
    const struct weight *w = job->weight;
    const float *sums = job->packed + (m - job->m0) * w->stride;
    const int32_t *place = w->order ? w->order->place : NULL;
    for (int64_t c = c0; c < c1; c++)
        write_as(job->out, job->type, m * w->columns + c, sums[place ? place[c] : c]);
}

static void LEVEL(grad_body)(const struct job *job, int64_t thread)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0;
    float *scales = job->own + thread * job->own_floats, *tile = scales + GRAD_ROWS * TILE_SCALES;
    const float *grad = (const float *)job->x + job->m0 * w->rows; /* float32: the binding has seen to it */
    const int few = w->order && w->order->whole_words && batch <= 3 && !job->low;
    int64_t g0, g1;
    share(w->stride / GROUP, MAX_GROUP / GROUP, job->threads, thread, &g0, &g1);
    for (int64_t g = g0; g < g1; g++) {
        float *sums = job->packed + g * GROUP;
        for (int64_t m = 0; m < batch; m++)
            memset(sums + m * w->stride, 0, GROUP * sizeof(float));
        for (int64_t r0 = 0; r0 < w->rows; r0 += GRAD_ROWS) {
            const int64_t r1 = smaller(r0 + GRAD_ROWS, w->rows);
            if (few) {
                for (int64_t r = r0; r < r1; r++)
                    LEVEL(group_scales)(w, r, g, g + 1, scales + (r - r0) * TILE_SCALES);
                if (batch == 1)
                    LEVEL(accumulate_few)(job, grad, 1, r0, r1, g, scales, sums);
                else if (batch == 2)
                    LEVEL(accumulate_few)(job, grad, 2, r0, r1, g, scales, sums);
                else
                    LEVEL(accumulate_few)(job, grad, 3, r0, r1, g, scales, sums);
#if LEVEL_LOW
            } else if (job->low) {
                LEVEL(grad_tile_low)(job, r0, r1, g, scales, tile, sums);
#endif
            } else {
                for (int64_t r = r0; r < r1; r++)
                    LEVEL(decode)(w, r, g, g + 1, scales, tile + (r - r0) * GROUP);
                LEVEL(grad_tile)(grad + r0, w->rows, batch, tile, (int)(r1 - r0), sums, w->stride);
            }
        }
    }
}

static void LEVEL(unpack_body)(const struct job *job, int64_t thread)
{
    int64_t c0, c1;
    share(job->weight->columns, MAX_LANES, job->threads, thread, &c0, &c1);
    for (int64_t m = job->m0; m < job->m1; m++)
        LEVEL(unpack)(job, m, c0, c1);
}

static void LEVEL(input_grad)(struct job *job)
{
    const int64_t piece = piece_of(job->batch, job->weight->stride);
    for (job->m0 = 0; job->m0 < job->batch; job->m0 = job->m1) {
        job->m1 = smaller(job->m0 + piece, job->batch);
        parallel(job, LEVEL(grad_body));
        parallel(job, LEVEL(unpack_body));
    }
}
