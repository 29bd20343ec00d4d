/* Packs rows of x for amx.h, in the order of the codes in their lines: pairs of columns, each with sixteen batch rows. */
#pragma once
#include "tiles.h"

/* How codes are dequantized into lines of 32 columns; x is packed in the same order. */
enum lines {
    EIGHTS,  /* blocks of 16 and 32: a line is nibbles 0 to 3 of the eight 16-bit words of 16 bytes */
    FOURS    /* blocks of 64 and 128, at most two in a group: a line is nibble k of all 32 16-bit words */
};

/* How the codes of a weight are dequantized into lines. */
static enum lines lines_of(const struct weight *w) { return w->half <= 16 ? EIGHTS : FOURS; }

/* For a column, its line and its index in the line. `place` is struct order's place of the column. */
INLINE int64_t line_of(int64_t place, enum lines lines)
{
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return place / GROUP * LINES + (lines == EIGHTS ? word / 4 : nibble % 4);
}
INLINE int64_t at_in_line(int64_t place, enum lines lines)
{
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return 2 * (lines == EIGHTS ? nibble % 4 * 4 + word % 4 : word) + nibble / 4;
}

/* The offset in floats of the column's pair in the packed lines of sixteen batch rows. */
INLINE int64_t pair_at(int64_t place, enum lines lines)
{
    return line_of(place, lines) * TILE_FLOATS + at_in_line(place, lines) / 2 * LANES;
}

/* Pack `inputs` (at most 16) batch rows from m on, padded with zeros to 16: out (lines, 16 pairs of columns, 16 batch rows). */
static void pack_sixteen(const struct job *job, int64_t m, int64_t inputs, float *out)
{
    const struct weight *w = job->weight;
    const enum lines lines = lines_of(w);
    const int64_t columns = w->columns, before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP;
    const uint16_t *x = (const uint16_t *)job->x + m * columns;
    /* Four columns of a word are two pairs: those of its even bytes, and those of its odd bytes. */
    const W pairs = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
    const int64_t odd = lines == EIGHTS ? 8 * LANES : 2 * TILE_FLOATS; /* floats from the pair of even bytes to that of odd bytes */
    const int64_t size = 2 * w->half, left = columns % size, end = smaller(columns, before + floats + size);
    const int64_t by_fours = left % 8 ? columns - left : columns, whole = smaller(end, by_fours) / LINE * LINE;
    int64_t c = before > size ? (before - size) / LINE * LINE : 0;
    if (whole < before + floats)
        memset(out, 0, (size_t)(floats / LINE * TILE_FLOATS) * sizeof *out);
    for (; c < whole; c += LINE) {
        V v[LANES];
        for (int i = 0; i < LANES; i++) {
            const W of = i < inputs ? _mm512_loadu_si512(x + i * columns + c) : _mm512_setzero_si512();
            v[i] = v_of_words(_mm512_shuffle_epi8(of, pairs));
        }
        v_transpose(v);
        for (int i = 0; i < 8; i++) {
            const int64_t place = w->order->place[c + 4 * i] - before;
            if (place < 0 || place >= floats)
                continue;
            float *at = out + pair_at(place, lines);
            v_store(at, v[2 * i]);
            v_store(at + odd, v[2 * i + 1]);
        }
    }
    for (; c < end; c++) {
        const int64_t place = w->order->place[c] - before;
        if (place < 0 || place >= floats)
            continue;
        uint16_t *pair = (uint16_t *)(out + pair_at(place, lines)) + at_in_line(place, lines) % 2;
        for (int64_t i = 0; i < inputs; i++)
            pair[2 * i] = x[i * columns + c];
    }
}

/* Pack the batch rows of a piece. */
static void pack_tiles(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t batch = job->m1 - job->m0, floats = (job->g1 - job->g0) * LINES * TILE_FLOATS;
    int64_t m, to;
    share(batch, TILED_INPUTS, parts, part, &m, &to);
    for (; m < to; m += TILED_INPUTS) {
        const int64_t inputs = smaller(TILED_INPUTS, batch - m);
        pack_sixteen(job, job->m0 + m, inputs, job->packed + m / TILED_INPUTS * floats);
    }
}
