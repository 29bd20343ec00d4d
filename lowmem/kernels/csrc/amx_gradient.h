/* grad @ W by AMX, in bfloat16. A thread takes groups of columns and keeps their sums; grad is multiplied in place. Rows of W are
 * dequantized into tiles of 16 interleaved pairs by 16 columns. */
#pragma once
#include "amx_rows.h"

#define GRADIENT_LINES (TILED_GRAD_ROWS / LINE) /* tiles along the rows, of 16 pairs each */
#define STRIP (GRADIENT_LINES * 2 * TILE_FLOATS) /* floats of a strip: two tiles of 16 columns, for all these rows */
#define GROUP_TILES (GROUP / 16) /* the sixteen columns of each belong to one block: nibbles 0 to 3 of four 16-bit words */
#define GRADIENT_STRIPS (GROUP / LINE)
_Static_assert(TILED_GRAD_OWN == GRADIENT_STRIPS * STRIP + TILED_GRAD_ROWS * LANES + TILED_INPUTS * TILED_GRAD_ROWS,
               "dequantized rows, scales, and inputs that are padded");

/* Dequantize rows r and r + 1 (zeros from r1 on) of group g, all strips of 32 columns: two tiles each, STRIP floats apart. `out` is
 * the pair's line in the first tile. `scales` are those of both rows, a vector each. */
INLINE void dequantize_eights(const struct weight *w, int64_t r, int64_t r1, int64_t g, const float *scales, float *out)
{
    const int64_t from = g * LANES * 4, left = w->row_bytes - from;
    const uint8_t *p = w->packed + r * w->row_bytes + from;
    const int32_t *block = w->order->block + g * LANES;
    const V levels = v_load(w->levels);
    W nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi32(1 << 20), tables = _mm512_setzero_si512();
    W shifts = _mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0);
    /* the compiler would compute these again for every pair */
    v_keep(nibble);
    v_keep(shifts);
    v_keep(second);
    /* Eight bytes of both rows, with 16-bit words interleaved: the even ones of the group's eights, and the odd ones. */
    __m128i words[2][4];
    const W one = words_load(p, left), two = words_load(p + w->row_bytes, r + 1 < r1 ? left : 0);
    _mm512_storeu_si512(words[0], _mm512_unpacklo_epi16(one, two));
    _mm512_storeu_si512(words[1], _mm512_unpackhi_epi16(one, two));
    prefetch_far(p + TILED_ROWS * w->row_bytes);
    prefetch_far(p + (TILED_ROWS + 1) * w->row_bytes);
#pragma GCC unroll 8
    for (int q = 0; q < GROUP_TILES; q++) {
        if (!q || block[2 * q] != block[2 * q - 2])
            tables = two_tables(levels, scales + block[2 * q], scales + LANES + block[2 * q]);
        look_up(_mm512_rorv_epi64(_mm512_broadcast_i32x4(words[q % 2][q / 2]), shifts), nibble, second, tables,
                out + q / 2 * STRIP + q % 2 * TILE_FLOATS);
    }
}

/* out = all strips of rows r0 to r1 of group g. The last tile is padded with zeros. */
static void dequantize_strips(const struct weight *w, int64_t r0, int64_t r1, int64_t g, const float *scales, float *out)
{
    int64_t r = r0, pair = 0;
#define AT_PAIR (out + pair / LANES * 2 * TILE_FLOATS + pair % LANES * LANES)
    for (; r < r1; r += 2, pair++, scales += 2 * LANES)
        dequantize_eights(w, r, r1, g, scales, AT_PAIR);
    for (const int64_t end = r0 + round_up(r1 - r0, LINE); r < end; r += 2, pair++)
        for (int k = 0; k < GRADIENT_STRIPS; k++) {
            v_store(AT_PAIR + k * STRIP, v_zero());
            v_store(AT_PAIR + k * STRIP + TILE_FLOATS, v_zero());
        }
}

/* Write the sums of a group to the output: tiles of 16 columns and 16 batch rows, in the order of the columns. */
static void put_gradient(const struct job *job, int64_t g, const float *sums)
{
    const struct weight *w = job->weight;
    const int64_t half = w->half, size = 2;
    /* A tile has two columns for each of eight bytes: put those of the low nibbles first. */
    const W order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    for (int64_t m = 0; m < job->m1 - job->m0; m++) {
        char *out = (char *)job->out + (job->m0 + m) * w->columns * size;
        const float *of = sums + m / TILED_INPUTS * GROUP_TILES * TILE_FLOATS + m % TILED_INPUTS * LANES;
        for (int64_t q = 0, byte = g * LANES * 4; q < GROUP_TILES && byte < w->row_bytes; q++, byte += 8) {
            const int64_t start = byte / half * 2 * half, j = byte % half, columns = smaller(w->columns - start, 2 * half);
            const int64_t lower = (columns + 1) / 2, low = smaller(8, lower - j), high = smaller(8, columns - lower - j);
            float row[LANES];
            store_as(row, BFLOAT16, 0, _mm512_permutexvar_ps(order, v_load(of + q * TILE_FLOATS)));
            if (high == 8) {
                memcpy(out + (start + j) * size, row, 8 * size);
                memcpy(out + (start + lower + j) * size, (char *)row + 8 * size, 8 * size);
            } else {
                memcpy(out + (start + j) * size, row, (size_t)(low * size));
                memcpy(out + (start + lower + j) * size, (char *)row + 8 * size, (size_t)((high > 0 ? high : 0) * size));
            }
        }
    }
}

/* The tiles of grad for up to 32 batch rows from m on and rows r0 to r1: in place, or, if not whole, copied to `padded`. */
static struct tiles as_it_lies(const struct job *job, int64_t m, int64_t r0, int64_t r1, uint16_t *padded)
{
    const int64_t stride = job->weight->rows, inputs = smaller(job->m1 - job->m0 - m, 2 * TILED_INPUTS), rows = r1 - r0;
    const uint16_t *x = (const uint16_t *)job->x + (job->m0 + m) * stride + r0;
    if (rows % LINE == 0 && inputs % TILED_INPUTS == 0 && stride % 2 == 0)
        return (struct tiles){(const float *)x, TILED_INPUTS * stride / 2, LANES, 2 * stride};
    memset(padded, 0, (size_t)(round_up(inputs, TILED_INPUTS) * TILED_GRAD_ROWS) * sizeof *padded);
    for (int64_t i = 0; i < inputs; i++)
        memcpy(padded + i * TILED_GRAD_ROWS, x + i * stride, (size_t)rows * sizeof *padded);
    return (struct tiles){(const float *)padded, TILED_INPUTS * TILED_GRAD_ROWS / 2, LANES, 2 * TILED_GRAD_ROWS};
}

/* sums += grad @ W for group g and rows r0 to r1, for all batch rows of a piece. */
static void add_group(const struct job *job, int64_t g, int64_t r0, int64_t r1, const float *scales, float *dequantized, uint16_t *padded,
                      float *sums)
{
    const int64_t batch = job->m1 - job->m0, lines = (r1 - r0 + LINE - 1) / LINE;
    dequantize_strips(job->weight, r0, r1, g, scales, dequantized);
    for (int64_t m = 0; m < batch; m += 2 * TILED_INPUTS) {
        const struct tiles x = as_it_lies(job, m, r0, r1, padded);
        struct tiles rows = {dequantized, TILE_FLOATS, 2 * TILE_FLOATS, 64};
        for (int strip = 0; strip < GRADIENT_STRIPS; strip++, rows.at += STRIP, sums += 2 * TILE_FLOATS)
            if (m + TILED_INPUTS < batch)
                multiply_tiles(rows, x, lines, 1, 1, !r0, sums, TILED_INPUTS * GROUP);
            else
                multiply_tiles(rows, x, lines, 1, 0, !r0, sums, 0);
        sums += TILED_INPUTS * GROUP;
    }
}

/* grad @ W for a part of the groups. */
static void gradient_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, all = round_up(batch, TILED_INPUTS);
    /* more rows at a time for larger batches: their sums are loaded and stored less often */
    const int64_t step = job->batch > 2 * TILED_INPUTS ? TILED_GRAD_ROWS : TILED_GRAD_ROWS / 2;
    float *dequantized = job->own + thread * job->own_floats, *scales = dequantized + GRADIENT_STRIPS * STRIP;
    uint16_t *padded = (uint16_t *)(scales + TILED_GRAD_ROWS * LANES);
    int64_t g0, g1;
    share(job->g1 - job->g0, 1, parts, part, &g0, &g1);
    if (g0 >= g1)
        return;
    g0 += job->g0;
    g1 += job->g0;
    begin_tiles();
    for (int64_t r0 = 0, r1; r0 < w->rows; r0 = r1) {
        int64_t from = -1;
        r1 = smaller(r0 + step, w->rows);
        for (int64_t g = g0; g < g1; g++) {
            float *sums = job->packed + (g - job->g0) * all * GROUP;
            if (w->order->first_block[g] != from) {
                from = w->order->first_block[g];
                for (int64_t r = r0; r < r1; r += TILED_ROWS)
                    put_scales(job, r, from, scales + (r - r0) * LANES);
            }
            add_group(job, g, r0, r1, scales, dequantized, padded, sums);
        }
    }
    end_tiles();
    for (int64_t g = g0; g < g1; g++)
        put_gradient(job, g, job->packed + (g - job->g0) * all * GROUP);
}
