/* Many inputs: rows are restored into a tile that stays in the first cache, and it is multiplied with all of them (many.h). */

#define FETCH_PARTS 2 /* how far behind what is restored codes are fetched */
#define MANY_SUMS (MANY_VECTORS * MANY_INPUTS) /* in registers */

/* Levels times the scales of each byte of a word, MANY_ROWS a unit. */
INLINE void LEVEL(put_word)(W codes, V scale0, V scale1, V scale2, V scale3, T table, float *tile, const int low)
{
    const V scale[4] = {scale0, scale1, scale2, scale3};
    V value[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        value[k % 2 * 4 + k / 2] = v_mul(v_lookup(table, codes, k), scale[k / 2]);
#if LEVEL_LOW
    if (low) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            v_store(tile + k * MANY_ROWS, (V)LEVEL(pairs)(value[2 * k], value[2 * k + 1]));
        return;
    }
#endif
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        v_store(tile + k * MANY_ROWS, value[k]);
}

/* Words of MANY_ROWS rows that are being restored into a tile, MANY_ROWS a unit. */
struct LEVEL(restoring) {
    const struct weight *w;
    const float *words, *scales; /* of the block of the next word */
    float *tile;
    int64_t left; /* words until the next block */
    int64_t r, g; /* or, as rows lie: the first row, the first group of columns; `scales` are what steps of the rows' scales count */
    int vectors, count; /* done, and all: those of a word come one after the other */
};

/* Restore the next group of a row: as it lies, PART_FLOATS a row. */
INLINE void LEVEL(restore_row)(struct LEVEL(restoring) *to, T table, const int low)
{
    const struct weight *w = to->w;
    const int i = to->vectors % PANEL_ROWS, n = to->vectors / PANEL_ROWS;
    const int64_t r = smaller(to->r + i, w->rows - 1), g = to->g + n;
    float *tile = to->tile + i * PART_FLOATS + n * (GROUP / (low ? 2 : 1));
    to->vectors++;
    if (!w->order) {
        LEVEL(widen_typed)(w, r, g * GROUP, GROUP, tile);
        return;
    }
    const int32_t *block = w->order->block + g * 4 * LANES;
    const W words = LEVEL(words)(w, r, g);
    const V unit = v_set1(to->scales[i]);
    V stored, scale, value[8];
    const int64_t first = w->order->first_block[g];
    LEVEL(few_scales)(w, r, 1, first, 1, &unit, &stored);
    prefetch(w->scales + (r + PANEL_ROWS) * scale_bytes(w) + first * scale_bytes(w) / w->blocks);
    scale = v_spread(stored, block);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        if (k && k % 2 == 0 && !w->order->whole_words)
            scale = v_spread(stored, block + k / 2 * LANES);
        value[k] = v_mul(v_lookup(table, words, k), scale);
    }
#if LEVEL_LOW
    if (low) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            v_store(tile + k * LANES, (V)_mm512_cvtne2ps_pbh(value[2 * k + 1], value[2 * k]));
        return;
    }
#endif
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        v_store(tile + k * LANES, value[k]);
}

/* Restore the next vector of words. */
INLINE void LEVEL(restore_next)(struct LEVEL(restoring) *to, T table, const int low, const int panel)
{
    if (panel) {
        LEVEL(restore_row)(to, table, low);
        return;
    }
    const int word = to->vectors / MANY_VECTORS, v = to->vectors % MANY_VECTORS;
    const W codes = words_of_v(v_load(to->words + to->vectors * LANES));
    float *tile = to->tile + word * UNITS(low) * MANY_ROWS + v * LANES;
    if (!to->left)
        to->scales += MANY_ROWS, to->left = to->w->half / 4 * MANY_VECTORS;
    const V scale = v_load(to->scales + v * LANES);
    LEVEL(put_word)(codes, scale, scale, scale, scale, table, tile, low);
    to->left--, to->vectors++;
}

/* The same where blocks are not whole words: n words, from a byte of the row on. */
INLINE void LEVEL(restore_apart)(const struct weight *w, const float *words, const float *scales, int64_t byte, int64_t n,
                                 float *tile, const int low)
{
    const T table = table_load(w->levels);
    const int64_t first = byte / w->half;
    for (int64_t i = 0; i < n; i++, byte += 4, tile += UNITS(low) * MANY_ROWS, words += MANY_ROWS)
        EACH_ROWS {
            V scale[4];
            for (int b = 0; b < 4; b++)
                scale[b] = v_load(scales + ((byte + b) / w->half - first) * MANY_ROWS + v * LANES);
            const W codes = words_of_v(v_load(words + v * LANES));
            LEVEL(put_word)(codes, scale[0], scale[1], scale[2], scale[3], table, tile + v * LANES, low);
        }
}

#define EACH_OF_VECTORS for (int v = 0; v < vectors; v++)

/* M inputs with n words of restored rows. In between, the next tile is restored up to a vector of words: the pipes that look
 * up and store are idle while those of products are not. `fetch`: what to fetch, or NULL; all at once, it would have to wait.
 * In float32, 64 products are summed in one chain, or 16 (`fewer`). */
INLINE void LEVEL(multiply)(const float *tile, int n, const float *x, const int M, float *sums, struct LEVEL(restoring) *next,
                            int until, const uint8_t *fetch, const int low, const int panel, const int fewer)
{
    const T table = table_load(next->w->levels ? next->w->levels : tile); /* any sixteen floats */
    const int units = UNITS(low), vectors = panel ? 1 : MANY_VECTORS, before = next->vectors, due = until - before;
    const int64_t stride = row_stride(next->w), step = next->w->order ? LANES * 4 : LANES * 16;
    for (int word = 0, end; word < n;) { /* a longer sum would lose what it adds */
        V acc[MANY_SUMS > PANEL_ROWS ? MANY_SUMS : PANEL_ROWS];
        EACH_OF_VECTORS EACH_OF_MANY acc[v * M + j] = v_zero();
        for (end = fewer ? (int)smaller(word + FEWER_CHAIN, n) : low || word ? n : (n + 1) / 2; word < end; word++, tile += units * vectors * LANES, x += units) {
            if ((next->vectors - before) * n < due * (word + 1))
                LEVEL(restore_next)(next, table, low, panel);
            for (int64_t i = 0; fetch && i < step; i += 64)
                EACH_OF_VECTORS prefetch(fetch + (v * LANES + word % LANES) * stride + word / LANES * step + i);
#pragma GCC unroll 8
            for (int k = 0; k < units; k++) {
                V row[MAX_VECTORS];
                EACH_OF_VECTORS {
                    row[v] = v_load(tile + k * vectors * LANES + v * LANES);
                    v_keep(row[v]);
                }
                EACH_OF_MANY {
                    const V value = LEVEL(spread_unit)(x + j * PART_FLOATS + k, low);
                    EACH_OF_VECTORS acc[v * M + j] = LEVEL(multiply_add)(row[v], value, acc[v * M + j], low);
                }
            }
        }
        EACH_OF_MANY EACH_OF_VECTORS {
            float *sum = sums + j * vectors * LANES + v * LANES;
            v_store(sum, v_add(v_load(sum), acc[v * M + j]));
        }
    }
    while (next->vectors < until)
        LEVEL(restore_next)(next, table, low, panel);
}

/* Columns from c on of LANES rows of 16-bit floats into a tile: LANES columns, `step` floats apart, of which those beyond a
 * row are zeros. */
INLINE void LEVEL(widen_across)(const struct weight *w, int64_t r, int64_t c, const int step, float *tile, const int type)
{
    const int64_t stride = w->columns, last = w->rows - 1, left = w->columns - c;
    const uint16_t *p = (const uint16_t *)w->packed + c;
    V v[LANES];
    if (left >= LANES && r + LANES <= w->rows) {
        p += r * stride;
        EACH_LANE v[i] = LEVEL(sixteen)(p + i * stride, type);
    } else {
        for (int i = 0; i < LANES; i++) {
            float row[LANES] = {0};
            for (int64_t k = 0; k < smaller(left, LANES); k++)
                row[k] = read_as_float(p + smaller(r + i, last) * stride, type, k);
            v[i] = v_load(row);
        }
    }
    v_transpose(v);
    EACH_LANE v_store(tile + i * step, v[i]);
}

/* Begin to restore MANY_ROWS rows into a tile, from a column on: what is left to do is in `to`. `first` is the block that
 * the scales start with. */
INLINE void LEVEL(begin_tile)(const struct job *job, int64_t r, int64_t start, int64_t columns, float *own, float *tile,
                              int64_t *first, struct LEVEL(restoring) *to, const int low)
{
    const struct weight *w = job->weight;
    /* Words lie in the end of what they are restored to, which comes to each of them after it is read. */
    float *scales = own, *words = tile + (columns / (low ? 2 : 1) - columns / 8) * MANY_ROWS;
    const struct LEVEL(restoring) nothing = {.w = w, .tile = tile};
    *to = nothing;
    if (!w->order) {
        for (int64_t c = 0; c < columns; c += LANES)
            EACH_ROWS {
                float *at = tile + c * MANY_ROWS + v * LANES;
                if (w->encoding == BFLOAT16)
                    LEVEL(widen_across)(w, r + v * LANES, start + c, MANY_ROWS, at, BFLOAT16);
                else
                    LEVEL(widen_across)(w, r + v * LANES, start + c, MANY_ROWS, at, FLOAT16);
            }
        return;
    }
    if ((start - job->g0 * GROUP) % chunk_of(w) == 0)
        *first = LEVEL(chunk_scales)(job, r, start, MANY_VECTORS, scales);
    for (int64_t c = 0; c < columns; c += GROUP)
        EACH_ROWS {
            float *at = words + c / 8 * MANY_ROWS + v * LANES;
            LEVEL(words_across)(w, r + v * LANES, (start + c) / GROUP, MANY_ROWS, at);
        }
    const int64_t byte = start / 2, block = byte / w->half;
    to->words = words;
    to->scales = scales + (block - *first) * MANY_ROWS;
    if (w->order->whole_words) {
        to->left = ((block + 1) * w->half - byte) / 4 * MANY_VECTORS;
        to->count = (int)(columns / 8) * MANY_VECTORS;
    } else {
        LEVEL(restore_apart)(w, words, to->scales, byte, columns / 8, tile, low);
    }
}

/* Rows r to `to` with all inputs of a piece, from tiles: while one is multiplied, the next is restored. */
INLINE void LEVEL(tiled_rows)(const struct job *job, int64_t r, int64_t to, float *own, const int low, const int fewer)
{
    const int64_t batch = job->m1 - job->m0, begin = job->g0 * GROUP, end = job->g1 * GROUP;
    float *tile = own + TILES_AT, *other = tile + MANY_ROWS * PART_FLOATS, *sums = own + SUMS_AT;
    int64_t first = 0, columns = smaller(PART(low), end - begin);
    struct LEVEL(restoring) next;
    LEVEL(begin_tile)(job, r, begin, columns, own, tile, &first, &next, low);
    const T table = table_load(job->weight->levels ? job->weight->levels : tile); /* any sixteen floats */
    while (next.vectors < next.count)
        LEVEL(restore_next)(&next, table, low, 0);
    for (int64_t c = begin; r < to;) {
        const int64_t this_r = r, this_c = c, n = columns;
        c += columns;
        if (c == end)
            c = begin, r += MANY_ROWS;
        columns = smaller(PART(low), end - c);
        if (this_c == begin)
            memset(sums, 0, (size_t)(batch * MANY_ROWS) * sizeof(float));
        next.count = next.vectors = 0;
        if (r < to)
            LEVEL(begin_tile)(job, r, c, columns, own, other, &first, &next, low);
        const uint8_t *fetch = LEVEL(codes_behind)(job, r, c, FETCH_PARTS * PART(low), MANY_ROWS);
        const float *x = LEVEL(packed_at)(job, this_c - begin, low);
#define CALL(M)                                                                             \
    LEVEL(multiply)(tile, (int)n / 8, x + m * PART_FLOATS, M, sums + m * MANY_ROWS, &next, \
                    (int)(next.count * (m + M) / batch), m ? NULL : fetch, low, 0, fewer)
        IN_PASSES(batch, MANY_INPUTS, CALL)
#undef CALL
        float *done = tile;
        tile = other;
        other = done;
        if (r != this_r)
            LEVEL(put_rows)(job, this_r, smaller(MANY_ROWS, to - this_r), MANY_VECTORS, sums);
    }
}
