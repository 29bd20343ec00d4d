/* Large batches (many.h): rows are dequantized into a tile (units, MANY_ROWS) that stays in L1 and is multiplied with all batch
 * rows. Meanwhile the next tile is dequantized. */
#pragma once
#include "pack.h"
#include "weights8.h"

#define FETCH_PARTS 2 /* codes are prefetched this many parts before they are dequantized */
#define MANY_SUMS (MANY_VECTORS * MANY_INPUTS) /* sums in registers */

/* Words of MANY_ROWS rows that are being dequantized into a tile: MANY_VECTORS vectors of each word in turn. */
struct dequantizing {
    const struct weight *w;
    /* Transposed words, and the scales from the block of the next word on. */
    const float *words, *scales;
    float *tile;
    int64_t left; /* vectors of words until the next block */
    int vectors, count; /* vectors done, and vectors in all */
};

/* Dequantize the next vector of words: its units are MANY_ROWS floats apart. */
INLINE void dequantize_next(struct dequantizing *to, T table, const int bf16)
{
    const int word = to->vectors / MANY_VECTORS, v = to->vectors % MANY_VECTORS, units = UNITS(bf16);
    const W codes = words_of_v(v_load(to->words + to->vectors * LANES));
    float *tile = to->tile + word * units * MANY_ROWS + v * LANES;
    if (!to->left)
        to->scales += MANY_ROWS, to->left = to->w->half / 4 * MANY_VECTORS;
    const V scale = v_load(to->scales + v * LANES);
    to->left--, to->vectors++;
    V value[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        value[k % 2 * 4 + k / 2] = v_mul(v_lookup(table, codes, k), scale);
#pragma GCC unroll 8
    for (int k = 0; k < units; k++)
        v_store(tile + k * MANY_ROWS, bf16 ? pairs(value[2 * k], value[2 * k + 1]) : value[k]);
}

/* sums (M, MANY_ROWS) += n words of a tile times M batch rows, in chains of `chain` words. Meanwhile the next tile is dequantized up
 * to vector `until`, on idle ports, and `fetch` (or NULL) is prefetched. */
INLINE void multiply(const float *tile, int n, const float *x, const int M, float *sums, struct dequantizing *next,
                            int until, const uint8_t *fetch, int chain, const int bf16)
{
    const T table = table_load(next->w->levels ? next->w->levels : tile); /* not used for 16-bit floats */
    const int units = UNITS(bf16), before = next->vectors, due = until - before;
    const int64_t stride = next->w->row_bytes, step = code_bytes(next->w, GROUP);
    for (int word = 0; word < n;) {
        V acc[MANY_SUMS];
        EACH_ROWS EACH_OF_MANY acc[v * M + j] = v_zero();
        for (const int end = (int)smaller(word + chain, n); word < end; word++, tile += units * MANY_ROWS, x += units) {
            if ((next->vectors - before) * n < due * (word + 1))
                dequantize_next(next, table, bf16);
            for (int64_t i = 0; fetch && i < step; i += 64)
                EACH_ROWS prefetch(fetch + (v * LANES + word % LANES) * stride + word / LANES * step + i);
#pragma GCC unroll 8
            for (int k = 0; k < units; k++) {
                V row[MAX_VECTORS];
                EACH_ROWS {
                    row[v] = v_load(tile + k * MANY_ROWS + v * LANES);
                    v_keep(row[v]);
                }
                EACH_OF_MANY {
                    const V value = spread_unit(x + j * PART_FLOATS + k, bf16);
                    EACH_ROWS acc[v * M + j] = multiply_add(row[v], value, acc[v * M + j], bf16);
                }
            }
        }
        EACH_OF_MANY EACH_ROWS {
            float *sum = sums + j * MANY_ROWS + v * LANES;
            v_store(sum, v_add(v_load(sum), acc[v * M + j]));
        }
    }
    while (next->vectors < until)
        dequantize_next(next, table, bf16);
}

/* Widen and transpose LANES columns from c on of LANES rows of 16-bit floats: tile[i * step + lane] = column c + i of row r +
 * lane. Columns past the end are zeros; rows past the last repeat it. */
INLINE void widen_across(const struct weight *w, int64_t r, int64_t c, const int step, float *tile, const int type)
{
    const int64_t stride = w->columns, last = w->rows - 1, left = w->columns - c;
    const uint16_t *p = (const uint16_t *)w->packed + c;
    V v[LANES];
    if (left >= LANES && r + LANES <= w->rows) {
        p += r * stride;
        EACH_LANE v[i] = sixteen(p + i * stride, type);
    } else {
        EACH_LANE v[i] = load_some(p + smaller(r + i, last) * stride, type, 0, left);
    }
    v_transpose(v);
    EACH_LANE v_store(tile + i * step, v[i]);
}

/* Begin to dequantize MANY_ROWS rows into a tile, from column `start` on. `own` holds the scales from block *first on. */
INLINE void begin_tile(const struct job *job, int64_t r, int64_t start, int64_t columns, float *own, float *tile,
                              int64_t *first, struct dequantizing *to, const int bf16)
{
    const struct weight *w = job->weight;
    /* The transposed words are stored at the end of the tile itself: each is read before it is overwritten. */
    float *scales = own, *words = tile + (columns / (bf16 ? 2 : 1) - columns / 8) * MANY_ROWS;
    *to = (struct dequantizing){.w = w, .tile = tile};
    if (w->half && (start - job->g0 * GROUP) % chunk_of(w) == 0)
        *first = chunk_scales(job, r, start, MANY_VECTORS, scales);
    if (!w->order && w->half) {
        for (int64_t c = 0; c < columns; c += LANES)
            EACH_ROWS {
                const float *of_block = scales + ((start + c) / (2 * w->half) - *first) * MANY_ROWS + v * LANES;
                dequantize_across8(w, r + v * LANES, start + c, MANY_ROWS, of_block, tile + c * MANY_ROWS + v * LANES);
            }
        return;
    }
    if (!w->order) {
        for (int64_t c = 0; c < columns; c += LANES)
            EACH_ROWS {
                float *at = tile + c * MANY_ROWS + v * LANES;
                OF_SIXTEEN(w->encoding, widen_across, w, r + v * LANES, start + c, MANY_ROWS, at);
            }
        return;
    }
    for (int64_t c = 0; c < columns; c += GROUP)
        EACH_ROWS {
            float *at = words + c / 8 * MANY_ROWS + v * LANES;
            words_across(w, r + v * LANES, (start + c) / GROUP, MANY_ROWS, at);
        }
    const int64_t byte = start / 2, block = byte / w->half;
    to->words = words;
    to->scales = scales + (block - *first) * MANY_ROWS;
    to->left = ((block + 1) * w->half - byte) / 4 * MANY_VECTORS;
    to->count = (int)(columns / 8) * MANY_VECTORS;
}

/* Multiply rows r to `to` with all batch rows of a piece, and write the results. */
INLINE void tiled_rows(const struct job *job, int64_t r, int64_t to, float *own, const int bf16)
{
    const int64_t batch = job->m1 - job->m0, begin = job->g0 * GROUP, end = job->g1 * GROUP;
    float *tile = own + TILES_AT, *other = tile + MANY_ROWS * PART_FLOATS, *sums = own + SUMS_AT;
    int64_t first = 0, columns = smaller(PART(bf16), end - begin);
    struct dequantizing next;
    begin_tile(job, r, begin, columns, own, tile, &first, &next, bf16);
    const T table = table_load(job->weight->levels ? job->weight->levels : tile); /* not used for 16-bit floats */
    while (next.vectors < next.count)
        dequantize_next(&next, table, bf16);
    for (int64_t c = begin; r < to;) {
        const int64_t this_r = r, this_c = c, n = columns;
        c += columns;
        if (c == end)
            c = begin, r += MANY_ROWS;
        columns = smaller(PART(bf16), end - c);
        if (this_c == begin)
            memset(sums, 0, (size_t)(batch * MANY_ROWS) * sizeof(float));
        next.count = next.vectors = 0;
        if (r < to)
            begin_tile(job, r, c, columns, own, other, &first, &next, bf16);
        const uint8_t *fetch = codes_behind(job, r, c, FETCH_PARTS * PART(bf16), MANY_ROWS);
        const float *x = packed_at(job, this_c - begin, bf16);
        const int words = (int)n / 8, chain = bf16 ? words : job->batch <= FEWER ? FEWER_CHAIN : (words + 1) / 2;
#define CALL(M)                                                                    \
    multiply(tile, words, x + m * PART_FLOATS, M, sums + m * MANY_ROWS, &next,     \
             (int)(next.count * (m + M) / batch), m ? NULL : fetch, chain, bf16)
        IN_PASSES(batch, MANY_INPUTS, CALL)
#undef CALL
        float *done = tile;
        tile = other;
        other = done;
        if (r != this_r)
            put_rows(job, this_r, smaller(MANY_ROWS, to - this_r), MANY_VECTORS, sums);
    }
}

/* Multiply the rows of a part with all batch rows of a piece, from tiles. */
INLINE void tiled_part(const struct job *job, int64_t part, int64_t parts, int64_t thread, const int bf16)
{
    int64_t r, to;
    share(job->weight->rows, MANY_ROWS, parts, part, &r, &to);
    if (r < to)
        tiled_rows(job, r, to, job->own + thread * job->own_floats, bf16);
}

static void tiled_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { tiled_part(job, part, parts, thread, 0); }
static void tiled_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { tiled_part(job, part, parts, thread, 1); }
