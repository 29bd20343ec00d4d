/* Dequantizes rows of W for amx.h into lines of 32 columns, in the order of the codes. The 16 levels times a block's scale form
 * a table of bfloat16 numbers. The permute selects one of 32 numbers, so a line can have columns of two blocks: the bit above
 * the code selects a table. */
#pragma once
#include "amx_pack.h"

/* out (TILED_ROWS, LANES) = the scales of TILED_ROWS rows from block `first` on. Rows past the last repeat it. */
static void put_scales(const struct job *job, int64_t r, int64_t first, float *out)
{
    const struct weight *w = job->weight;
    const int64_t bytes = scale_bytes(w);
    const uint8_t *soon = w->scales + (r + TILED_ROWS) * bytes + first * bytes / w->blocks;
    V unit[4], scale[4];
    for (const int64_t end = r + TILED_ROWS; r < end; r += 4, soon += 4 * bytes, out += 4 * LANES) {
        if (r + 4 <= w->rows) {
            row_units(w, r, 4, unit);
            few_scales(w, r, first, 4, unit, scale);
        } else
            for (int i = 0; i < 4; i++) {
                const int64_t row = smaller(r + i, w->rows - 1);
                row_units(w, row, 1, unit);
                few_scales(w, row, first, 1, unit, scale + i);
            }
        for (int i = 0; i < 4; i++) {
            prefetch_far(soon + i * bytes);
            v_store(out + i * LANES, scale[i]);
        }
    }
}

/* Levels times two scales, as bfloat16: 16 for the first scale, then 16 for the second. */
INLINE W two_tables(V levels, const float *one, const float *two)
{
    return (W)_mm512_cvtne2ps_pbh(v_mul(levels, v_set1(*two)), v_mul(levels, v_set1(*one)));
}

/* out = the low nibble of each 16-bit word, looked up in one of two tables; a set bit in `second` selects the second one. */
INLINE void look_up(W words, W nibble, W second, W tables, float *out)
{
    const W index = _mm512_ternarylogic_epi32(words, nibble, second, 0xea); /* a & b | c */
    v_store(out, v_of_words(_mm512_permutexvar_epi16(index, tables)));
}

/* Dequantize group g of four rows (the last row instead of missing ones): out has a vector per row, lines two tiles apart. */
INLINE void dequantize_four(const struct weight *w, int64_t r, int64_t g, const enum lines lines, const float *scales, float *out)
{
    const int64_t left = w->row_bytes - g * LANES * 4, last = w->rows - 1 - r;
    const int32_t *block = w->order->block + g * LANES;
    const V levels = v_load(w->levels);
    W nibble = _mm512_set1_epi16(15), shifts = _mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0);
    W second = _mm512_set4_epi32(0x00100010, 0x00100010, 0, 0); /* bit 4 of an index selects the second table */
    if (lines == FOURS) {
        /* Words past the row's end have block 0, which can be less than that of the group's first word; clamp the difference. */
        const W is = _mm512_max_epi32(_mm512_sub_epi32(_mm512_loadu_si512(block), _mm512_set1_epi32(block[0])), _mm512_setzero_si512());
        second = _mm512_or_si512(_mm512_slli_epi32(is, 4), _mm512_slli_epi32(is, 20));
    }
    /* the compiler would compute these again for every row */
    v_keep(nibble);
    v_keep(shifts);
    v_keep(second);
    for (int i = 0; i < 4; i++, scales += LANES, out += LANES) {
        const uint8_t *p = w->packed + (r + smaller(i, last)) * w->row_bytes + g * LANES * 4;
        uint8_t padded[LANES * 4];
        prefetch_far(p + TILED_ROWS * w->row_bytes);
        if (lines == EIGHTS) {
            if (left < LANES * 4) {
                _mm512_storeu_si512(padded, words_load(p, left));
                p = padded;
            }
#pragma GCC unroll 4
            for (int k = 0; k < LINES; k++) { /* sixteen bytes at a time */
                const W codes = _mm512_rorv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p + k)), shifts);
                look_up(codes, nibble, second, two_tables(levels, scales + block[4 * k], scales + block[4 * k + 2]), out + 2 * k * TILE_FLOATS);
            }
            continue;
        }
        const W words = words_load(p, left), tables = two_tables(levels, scales + block[0], scales + block[0] + 1);
#pragma GCC unroll 4
        for (int k = 0; k < LINES; k++)
            look_up(_mm512_srli_epi16(words, 4 * k), nibble, second, tables, out + 2 * k * TILE_FLOATS);
    }
}

/* Dequantize TILED_ROWS rows of groups g to g1: out (groups, lines, 2 tiles). `scales` start at block *from, if not -1. */
static void dequantize_tiles(const struct job *job, int64_t r, int64_t g, int64_t g1, float *scales, int64_t *from, float *out)
{
    const struct weight *w = job->weight;
    const enum lines lines = lines_of(w);
    for (; g < g1; g++, out += GROUP_FLOATS) {
        if (w->order->first_block[g] != *from)
            put_scales(job, r, *from = w->order->first_block[g], scales);
        for (int row = 0; row < TILED_ROWS && r + row < w->rows; row += 4) {
            const float *of = scales + row * LANES;
            float *at = out + row * LANES;
            if (lines == EIGHTS) /* each call is compiled for its constant */
                dequantize_four(w, r + row, g, EIGHTS, of, at);
            else
                dequantize_four(w, r + row, g, FOURS, of, at);
        }
    }
}
