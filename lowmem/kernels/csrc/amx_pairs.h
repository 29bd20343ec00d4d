/* Dequantizes rows of W for amx_gradient.h: pairs of rows are interleaved, in tiles of 16 pairs by 16 columns. */
#pragma once
#include "amx_rows.h"

#define GRADIENT_LINES (TILED_GRAD_ROWS / LINE) /* tiles along the rows, of 16 pairs each */
#define STRIP (GRADIENT_LINES * 2 * TILE_FLOATS) /* floats of a strip: two tiles of 16 columns, for all these rows */
#define GROUP_TILES (GROUP / 16) /* the sixteen columns of each belong to one block: nibbles 0 to 3 of four 16-bit words */
#define GRADIENT_STRIPS (GROUP / LINE)
_Static_assert(TILED_GRAD_OWN == GRADIENT_STRIPS * STRIP + TILED_GRAD_ROWS * LANES + TILED_INPUTS * TILED_GRAD_ROWS,
               "dequantized rows, scales, and inputs that are padded");

/* Dequantize rows r and r + 1 of group g, all strips of 32 columns: two tiles each, STRIP floats apart. r1 ends the rows; if
 * r + 1 is not before it, the second row is zeros. `out` is the pair's line in the first tile. `scales` are those of both rows,
 * a vector each. */
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
