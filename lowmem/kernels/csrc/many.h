/* x @ W.T with more than a few inputs. Rows lie across the lanes: LANES of them are decoded at a time, and each number
 * of an input is multiplied with all of them at once, so that no sum is taken across lanes, and results lie as the
 * output has them.
 *
 * What is multiplied is a unit: a column in float32, a pair of columns as bfloat16 where products are taken in it. The
 * input comes as pack.h packs it. */

#define UNITS(low) ((low) ? 4 : 8) /* of a word */
#define MANY_ROWS (LANES * MANY_VECTORS) /* of a tile */
#define FETCH_GROUPS 3 /* how far behind what is decoded in registers codes are fetched, */
#define FETCH_PARTS 2  /* and behind what is restored into a tile */
#define MANY_SUMS (MANY_VECTORS * MANY_INPUTS) /* in registers */
_Static_assert(MANY_VECTORS <= MAX_VECTORS && MANY_INPUTS <= 16, "scratch and passes have room for them");
#define EACH_LANE _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
#define EACH_OF_MANY _Pragma("GCC unroll 16") for (int j = 0; j < M; j++)
#define EACH_ROWS for (int v = 0; v < MANY_VECTORS; v++)

/* A number, or a pair of numbers, in every lane. */
INLINE V LEVEL(spread_unit)(const float *p, const int low)
{
#if LEVEL_LOW
    if (low)
        return (V)LEVEL(pair_of)(p);
#endif
    (void)low;
    return v_set1(*p);
}

/* sum + a * b. */
INLINE V LEVEL(multiply_add)(V a, V b, V sum, const int low)
{
#if LEVEL_LOW
    if (low)
        return (V)_mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)low;
    return v_fma(a, b, sum);
}

/* Words of one group of LANES rows: row by row they are read, word by word they are written, `step` floats apart. */
INLINE void LEVEL(words_across)(const struct weight *w, int64_t r, int64_t group, const int step, float *out)
{
    const int64_t start = group * LANES * 4, left = w->row_bytes - start, last = w->rows - 1;
    const uint8_t *p = w->packed + start;
    V v[LANES];
    if (r + LANES <= w->rows && left >= LANES * 4) {
        p += r * w->row_bytes;
        EACH_LANE v[i] = v_of_words(words_load(p + i * w->row_bytes, LANES * 4));
    } else {
        EACH_LANE v[i] = v_of_words(words_load(p + smaller(r + i, last) * w->row_bytes, left));
    }
    v_transpose(v);
    EACH_LANE v_store(out + i * step, v[i]);
}

/* The scales of n blocks of LANES rows: block by block, `step` floats apart, row by row. Blocks beyond the row have zeros. */
INLINE void LEVEL(scales_across)(const struct weight *w, int64_t r, int64_t first, int64_t n, const int step, float *out)
{
    const int64_t stride = scale_bytes(w), last = w->rows - 1;
    const int many = w->encoding >= SCALES_DOUBLE; /* steps of a float16 */
    V unit = v_zero();
    if (many) {
        float units[LANES];
        for (int64_t i = 0; i < LANES; i++)
            units[i] = LEVEL(row_scale)(w, smaller(r + i, last));
        unit = v_load(units);
    }
    for (int64_t b = 0; b < n; b += LANES, out += LANES * step) {
        V v[LANES];
        const int64_t there = smaller(n, w->blocks - first) - b, next = step * stride + (first + b) * stride / w->blocks;
        for (int64_t i = 0; i < LANES; i++) {
            const uint8_t *p = w->scales + smaller(r + i, last) * stride;
            v[i] = v_scales(p, first + b, there, w->encoding);
            prefetch(p + next);
        }
        v_transpose(v);
        for (int64_t i = 0; i < smaller(n - b, LANES); i++) { /* rounded as the scales of a row are */
            if (many)
                v[i] = v_div(v_mul(v[i], unit), v_set1(row_steps(w)));
            v_store(out + i * step, v[i]);
        }
    }
}

/* Unit k of each word: a level, or two levels as bfloat16. */
INLINE V LEVEL(unit_levels)(T table, W words, const int k, const int low)
{
#if LEVEL_LOW
    if (low)
        return (V)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * k), (W)table);
#endif
    (void)low;
    return v_lookup(table, words, k);
}

/* Add to `sums`, LANES an input, what M inputs make with a group of words. A block's products are summed before its
 * scale is applied. `scales` are those of the block of the first word, which has `ahead` words in front of it. */
INLINE void LEVEL(fused)(const struct weight *w, const float *words, const float *scales, int64_t ahead, const float *x,
                         const int M, float *sums, const uint8_t *fetch, const int low)
{
    const int64_t size = w->half / 4;
    const int units = UNITS(low);
#if LEVEL_LOW
    const T table = low ? (T)LEVEL(table_low)(w->levels) : table_load(w->levels);
#else
    const T table = table_load(w->levels);
#endif
    V acc[FUSED_INPUTS];
    EACH_OF_MANY acc[j] = v_zero();
    for (int64_t word = 0, end = smaller(size - ahead, LANES); word < LANES; end = smaller(end + size, LANES), scales += LANES) {
        V sum[FUSED_INPUTS];
        EACH_OF_MANY sum[j] = v_zero();
        for (; word < end; word++, x += units) {
            W codes = words_of_v(v_load(words + word * LANES));
            if (fetch)
                prefetch(fetch + word * w->row_bytes);
#if LEVEL_LOW
            if (low) /* bytes 0 2 1 3: so that the halves of a word hold neighbours */
                codes = _mm512_shuffle_epi8(codes, _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200));
#endif
#pragma GCC unroll 8
            for (int k = 0; k < units; k++) {
                const V level = LEVEL(unit_levels)(table, codes, k, low);
                const int64_t at = k % 2 * (units / 2) + k / 2;
                EACH_OF_MANY sum[j] =
                    LEVEL(multiply_add)(level, LEVEL(spread_unit)(x + j * PART_UNITS(low) + at, low), sum[j], low);
            }
        }
        const V scale = v_load(scales);
        EACH_OF_MANY acc[j] = v_fma(sum[j], scale, acc[j]);
    }
    EACH_OF_MANY v_store(sums + j * LANES, v_add(v_load(sums + j * LANES), acc[j]));
}

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

/* The bias of rows r and on, of which `rows` are there, as float32: where it lies, or in `widened`, which is zeros. */
INLINE const float *LEVEL(bias_of)(const struct job *job, int64_t r, int64_t rows, float *widened)
{
    if (!job->bias || job->g0)
        return widened;
    if (job->bias_type == FLOAT32)
        return (const float *)job->bias + r;
    LEVEL(widen_run_typed)((const uint16_t *)job->bias + r, rows, widened, job->bias_type);
    return widened;
}

/* Sums of `vectors` times LANES rows, of which `rows` are there, to the output. */
INLINE void LEVEL(put_rows_as)(const struct job *job, int64_t r, int64_t rows, const int vectors, const float *sums,
                               const int type)
{
    float widened[MAX_VECTORS * LANES] = {0};
    const float *bias = LEVEL(bias_of)(job, r, rows, widened);
    for (int64_t m = job->m0; m < job->m1; m++, sums += vectors * LANES) {
        const int64_t at = m * job->weight->rows + r, whole = job->g0 ? 0 : rows / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES)
            LEVEL(store_as)(job->out, type, at + i, v_add(v_load(sums + i), v_load(bias + i)));
        for (int64_t i = whole; i < rows; i++)
            write_as(job->out, type, at + i, sums[i] + (job->g0 ? read_as_float(job->out, type, at + i) : bias[i]));
    }
}

static void LEVEL(put_rows)(const struct job *job, int64_t r, int64_t rows, const int vectors, const float *sums)
{
    if (job->out_type == FLOAT32)
        LEVEL(put_rows_as)(job, r, rows, vectors, sums, FLOAT32);
    else if (job->out_type == BFLOAT16)
        LEVEL(put_rows_as)(job, r, rows, vectors, sums, BFLOAT16);
    else
        LEVEL(put_rows_as)(job, r, rows, vectors, sums, FLOAT16);
}

/* Words of MANY_ROWS rows that are being restored into a tile, MANY_ROWS a unit. */
struct LEVEL(restoring) {
    const struct weight *w;
    const float *words, *scales; /* of the block of the next word */
    float *tile;
    int64_t left; /* words until the next block */
    int vectors, count; /* done, and all: those of a word come one after the other */
};

/* Restore the next vector of words. */
INLINE void LEVEL(restore_next)(struct LEVEL(restoring) *to, T table, const int low)
{
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

/* M inputs with n words of restored rows. In between, the next tile is restored up to a vector of words: the pipes that look
 * up and store are idle while those of products are not. `fetch`: what to fetch, or NULL; all at once, it would have to wait. */
INLINE void LEVEL(multiply)(const float *tile, int n, const float *x, const int M, float *sums, struct LEVEL(restoring) *next,
                            int until, const uint8_t *fetch, const int low)
{
    const T table = table_load(next->w->levels ? next->w->levels : tile); /* any sixteen floats */
    const int units = UNITS(low), before = next->vectors, due = until - before;
    const int64_t stride = row_stride(next->w), step = next->w->order ? LANES * 4 : LANES * 16;
    for (int word = 0, end; word < n;) { /* float32 numbers 64 at a time: a longer sum would lose what it adds */
        V acc[MANY_SUMS];
        EACH_ROWS EACH_OF_MANY acc[v * M + j] = v_zero();
        for (end = low || word ? n : (n + 1) / 2; word < end; word++, tile += units * MANY_ROWS, x += units) {
            if ((next->vectors - before) * n < due * (word + 1))
                LEVEL(restore_next)(next, table, low);
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
                    const V value = LEVEL(spread_unit)(x + j * PART_UNITS(low) + k, low);
                    EACH_ROWS acc[v * M + j] = LEVEL(multiply_add)(row[v], value, acc[v * M + j], low);
                }
            }
        }
        EACH_OF_MANY EACH_ROWS {
            float *sum = sums + j * MANY_ROWS + v * LANES;
            v_store(sum, v_add(v_load(sum), acc[v * M + j]));
        }
    }
    while (next->vectors < until)
        LEVEL(restore_next)(next, table, low);
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

/* The input at a column, counted from the first that is packed: the first of a piece. */
INLINE const float *LEVEL(packed_at)(const struct job *job, int64_t c, const int low)
{
    const int64_t batch = job->m1 - job->m0;
    return job->packed + (c / PART * PART * batch + c % PART) / (low ? 2 : 1);
}

/* The codes, or 16-bit floats, so many columns behind column c of a row; after the last one that is packed come the next
 * `rows`. */
INLINE const uint8_t *LEVEL(codes_behind)(const struct job *job, int64_t r, int64_t c, int64_t columns, int64_t rows)
{
    const int64_t begin = job->g0 * GROUP, width = job->g1 * GROUP - begin, behind = c - begin + columns;
    r += behind / width * rows;
    c = begin + behind % width;
    return job->weight->packed + r * row_stride(job->weight) + (job->weight->order ? c / 2 : c * 2);
}

/* The scales of `vectors` times LANES rows, from a column on that a chunk starts at; where that of the first block is
 * counted from. */
INLINE int64_t LEVEL(chunk_scales)(const struct job *job, int64_t r, int64_t start, const int vectors, float *scales)
{
    const struct weight *w = job->weight;
    const int64_t first = start / 2 / w->half, end = smaller(start + chunk_of(w), job->g1 * GROUP) / 2 - 1;
    for (int v = 0; v < vectors; v++)
        LEVEL(scales_across)(w, r + v * LANES, first, end / w->half - first + 1, vectors * LANES, scales + v * LANES);
    return first;
}

/* LANES rows with all inputs of a piece, codes decoded in registers. */
INLINE void LEVEL(fused_rows)(const struct job *job, int64_t r, float *own, float *sums, const int low)
{
    const struct weight *w = job->weight;
    const int64_t begin = job->g0 * GROUP;
    float *scales = own, *words = own + WORDS_AT;
    int64_t first = 0;
    for (int64_t c = begin; c < job->g1 * GROUP; c += GROUP) {
        const int64_t at = c / 2, block = at / w->half, ahead = (at - block * w->half) / 4;
        if ((c - begin) % chunk_of(w) == 0)
            first = LEVEL(chunk_scales)(job, r, c, 1, scales);
        LEVEL(words_across)(w, r, c / GROUP, LANES, words);
        const float *of_block = scales + (block - first) * LANES, *x = LEVEL(packed_at)(job, c - begin, low);
        const uint8_t *fetch = LEVEL(codes_behind)(job, r, c, FETCH_GROUPS * GROUP, LANES);
#define CALL(M) LEVEL(fused)(w, words, of_block, ahead, x + m * PART_UNITS(low), M, sums + m * LANES, m ? NULL : fetch, low)
        IN_PASSES(job->m1 - job->m0, FUSED_INPUTS, CALL)
#undef CALL
    }
}

/* Begin to restore MANY_ROWS rows into a tile, from a column on: what is left to do is in `to`. `first` is the block that
 * the scales start with. */
INLINE void LEVEL(begin_tile)(const struct job *job, int64_t r, int64_t start, int64_t columns, float *own, float *tile,
                              int64_t *first, struct LEVEL(restoring) *to, const int low)
{
    const struct weight *w = job->weight;
    float *scales = own, *words = own + WORDS_AT;
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

/* Rows r to `to` with all inputs of a piece, from tiles of PART columns: while one is multiplied, the next is restored. */
INLINE void LEVEL(tiled_rows)(const struct job *job, int64_t r, int64_t to, float *own, const int low)
{
    const int64_t batch = job->m1 - job->m0, begin = job->g0 * GROUP, end = job->g1 * GROUP;
    float *tile = own + TILES_AT, *other = tile + MANY_ROWS * PART_UNITS(low), *sums = own + SUMS_AT;
    int64_t first = 0, columns = smaller(PART, end - begin);
    struct LEVEL(restoring) next;
    LEVEL(begin_tile)(job, r, begin, columns, own, tile, &first, &next, low);
    const T table = table_load(job->weight->levels ? job->weight->levels : tile); /* any sixteen floats */
    while (next.vectors < next.count)
        LEVEL(restore_next)(&next, table, low);
    for (int64_t c = begin; r < to;) {
        const int64_t this_r = r, this_c = c, n = columns;
        c += columns;
        if (c == end)
            c = begin, r += MANY_ROWS;
        columns = smaller(PART, end - c);
        if (this_c == begin)
            memset(sums, 0, (size_t)(batch * MANY_ROWS) * sizeof(float));
        next.count = next.vectors = 0;
        if (r < to)
            LEVEL(begin_tile)(job, r, c, columns, own, other, &first, &next, low);
        const uint8_t *fetch = LEVEL(codes_behind)(job, r, c, FETCH_PARTS * PART, MANY_ROWS);
        const float *x = LEVEL(packed_at)(job, this_c - begin, low);
#define CALL(M)                                                                             \
    LEVEL(multiply)(tile, (int)n / 8, x + m * PART_UNITS(low), M, sums + m * MANY_ROWS, &next, \
                    (int)(next.count * (m + M) / batch), m ? NULL : fetch, low)
        IN_PASSES(batch, MANY_INPUTS, CALL)
#undef CALL
        float *done = tile;
        tile = other;
        other = done;
        if (r != this_r)
            LEVEL(put_rows)(job, this_r, smaller(MANY_ROWS, to - this_r), MANY_VECTORS, sums);
    }
}

/* Rows r to `to` with all inputs of a piece. */
INLINE void LEVEL(many_rows)(const struct job *job, int64_t r, int64_t to, float *own, const int low)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0;
    if (!w->order || !w->order->whole_words || job->batch > FUSED_BATCH) { /* however large a piece of it is */
        LEVEL(tiled_rows)(job, r, to, own, low);
        return;
    }
    float *sums = own + SUMS_AT;
    for (; r < to; r += LANES) {
        memset(sums, 0, (size_t)(batch * LANES) * sizeof(float));
        LEVEL(fused_rows)(job, r, own, sums, low);
        LEVEL(put_rows)(job, r, smaller(LANES, to - r), 1, sums);
    }
}

static void LEVEL(many_body)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    float *own = job->own + thread * job->own_floats;
    int64_t r, to;
    share(job->weight->rows, MANY_ROWS, parts, part, &r, &to);
    if (r >= to)
        return;
#if LEVEL_LOW
    if (job->low) {
        LEVEL(many_rows)(job, r, to, own, 1);
        return;
    }
#endif
    LEVEL(many_rows)(job, r, to, own, 0);
}
