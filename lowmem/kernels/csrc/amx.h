/* x @ W.T by AMX, in bfloat16. The lines of tiles are rows of W, dequantized in the order of their codes: only x and the
 * results are transposed. */

#pragma once
#include "amx_rows.h"

/* Transpose the sums (TILED_ROWS, 16) of `rows` rows from r on with 16 batch rows from m on, and write them to the output. */
static void put_tiles(const struct job *job, int64_t r, int64_t rows, int64_t m, const float *sums)
{
    struct job of = *job;
    float turned[TILED_INPUTS * TILED_ROWS];
    of.m0 = job->m0 + m;
    of.m1 = smaller(of.m0 + TILED_INPUTS, job->m1);
    turn(sums, TILED_ROWS, turned);
    if (job->out_type != BFLOAT16 || rows < TILED_ROWS || job->g0 || job->g1 * GROUP < job->weight->columns) {
        put_rows(&of, r, rows, MANY_VECTORS, turned);
        return;
    }
    float widened[TILED_ROWS] = {0};
    const float *bias = bias_of(job, r, rows, widened);
    uint16_t *out = (uint16_t *)job->out + of.m0 * job->out_step + r;
    for (const float *sum = turned; of.m0 < of.m1; of.m0++, sum += TILED_ROWS, out += job->out_step) {
        const V front = v_add(v_load(sum), v_load(bias)), back = v_add(v_load(sum + LANES), v_load(bias + LANES));
        enum { SUBNORMAL = 0x20 };
        if (_mm512_fpclass_ps_mask(front, SUBNORMAL) | _mm512_fpclass_ps_mask(back, SUBNORMAL)) {
            v_to_bfloat(out, front);
            v_to_bfloat(out + LANES, back);
        } else {
            _mm512_storeu_si512(out, (W)_mm512_cvtne2ps_pbh(back, front)); /* flushes subnormal numbers to zero */
        }
    }
}

/* x @ W.T for a part of the rows: TILED_ROWS rows and TILED_GROUPS groups at a time, times all batch rows of a piece. */
static void tiles_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    float *scales = job->own + thread * job->own_floats, *dequantized = scales + TILED_ROWS * LANES;
    float *sums = job->own + thread * job->own_floats + TILED_OWN;
    const int64_t batch = job->m1 - job->m0, sixteen = (job->g1 - job->g0) * LINES * TILE_FLOATS;
    int64_t r, to;
    share(w->rows, TILED_ROWS, parts, part, &r, &to);
    if (r >= to)
        return;
    begin_tiles();
    for (; r < to; r += TILED_ROWS) {
        int64_t from = -1;
        for (int64_t g = job->g0, end; g < job->g1; g = end) {
            end = smaller(g + TILED_GROUPS, job->g1);
            dequantize_tiles(job, r, g, end, scales, &from, dequantized);
            const struct tiles rows = {dequantized, TILE_FLOATS, 2 * TILE_FLOATS, 64};
            struct tiles x = {job->packed + (g - job->g0) * LINES * TILE_FLOATS, sixteen, TILE_FLOATS, 64};
            for (int64_t m = 0; m < batch; m += 2 * TILED_INPUTS, x.at += 2 * sixteen) {
                const int both = m + TILED_INPUTS < batch, first = g == job->g0;
                float *of = sums + m * TILED_ROWS;
                if (both)
                    multiply_tiles(rows, x, (end - g) * LINES, 0, 1, first, of, 2 * TILE_FLOATS);
                else
                    multiply_tiles(rows, x, (end - g) * LINES, 0, 0, first, of, 0);
            }
        }
        for (int64_t m = 0; m < batch; m += TILED_INPUTS)
            put_tiles(job, r, smaller(TILED_ROWS, to - r), m, sums + m * TILED_ROWS);
    }
    end_tiles();
}
