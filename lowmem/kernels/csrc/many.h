/* x @ W.T with more than a few inputs. Rows lie across the lanes: LANES of them are decoded at a time, and each number
 * of an input is multiplied with all of them at once, so that no sum is taken across lanes, and results lie as the
 * output has them.
 *
 * What is multiplied is a unit: a column in float32, a pair of columns as bfloat16 where products are taken in it. The
 * input comes as pack.h packs it. */

#define UNITS(low) ((low) ? 4 : 8) /* of a word */
#define STRIDE(low) (CHUNK / ((low) ? 2 : 1)) /* units from an input to the next: constant, so that addresses are, too */
#define EACH_LANE _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
#define EACH_OF_MANY _Pragma("GCC unroll 16") for (int j = 0; j < M; j++)

/* sum + a * the number, or the pair of numbers, at b. */
INLINE V LEVEL(multiply_add)(V a, const float *b, V sum, const int low)
{
#if LEVEL_LOW
    if (low)
        return (V)_mm512_dpbf16_ps(sum, (__m512bh)a, LEVEL(pair_of)(b));
#endif
    (void)low;
    return v_fma(a, v_set1(*b), sum);
}

/* Words of one group of LANES rows: row by row they are read, word by word they are written. */
INLINE void LEVEL(words_across)(const struct weight *w, int64_t r, int64_t group, float *out)
{
    const int64_t start = group * LANES * 4, left = w->row_bytes - start, last = w->rows - 1;
    const uint8_t *p = w->packed + start;
    V v[LANES];
    if (r + LANES <= w->rows && left >= LANES * 4) {
        p += r * w->row_bytes;
        EACH_LANE {
            v[i] = v_of_words(words_load(p + i * w->row_bytes, LANES * 4));
            prefetch(p + (i + LANES) * w->row_bytes);
        }
    } else {
        EACH_LANE v[i] = v_of_words(words_load(p + smaller(r + i, last) * w->row_bytes, left));
    }
    v_transpose(v);
    EACH_LANE v_store(out + i * LANES, v[i]);
}

/* The scales of n blocks of LANES rows: block by block, row by row. Blocks beyond the row have zeros. */
INLINE void LEVEL(scales_across)(const struct weight *w, int64_t r, int64_t first, int64_t n, float *out)
{
    const int64_t stride = scale_bytes(w), last = w->rows - 1;
    const int many = w->encoding >= SCALES_DOUBLE; /* steps of a float16 */
    V unit = v_zero();
    if (many) {
        float units[LANES];
        for (int64_t i = 0; i < LANES; i++)
            units[i] = row_scale(w, smaller(r + i, last));
        unit = v_load(units);
    }
    for (int64_t b = 0; b < n; b += LANES, out += LANES * LANES) {
        V v[LANES];
        const int64_t there = smaller(n, w->blocks - first) - b, next = LANES * stride + (first + b) * stride / w->blocks;
        for (int64_t i = 0; i < LANES; i++) {
            const uint8_t *p = w->scales + smaller(r + i, last) * stride;
            v[i] = v_scales(p, first + b, there, w->encoding);
            prefetch(p + next);
        }
        v_transpose(v);
        for (int64_t i = 0; i < LANES; i++) { /* rounded as the scales of a row are */
            if (many)
                v[i] = v_div(v_mul(v[i], unit), v_set1(row_steps(w)));
            v_store(out + i * LANES, v[i]);
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
                         const int M, float *sums, const int low)
{
    const int64_t size = w->half / 4;
    const int units = UNITS(low), stride = STRIDE(low);
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
#if LEVEL_LOW
            if (low) /* bytes 0 2 1 3: so that the halves of a word hold neighbours */
                codes = _mm512_shuffle_epi8(codes, _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200));
#endif
#pragma GCC unroll 8
            for (int k = 0; k < units; k++) {
                const V level = LEVEL(unit_levels)(table, codes, k, low);
                const int64_t at = k % 2 * (units / 2) + k / 2;
                EACH_OF_MANY sum[j] = LEVEL(multiply_add)(level, x + j * stride + at, sum[j], low);
            }
        }
        const V scale = v_load(scales);
        EACH_OF_MANY acc[j] = v_fma(sum[j], scale, acc[j]);
    }
    EACH_OF_MANY v_store(sums + j * LANES, v_add(v_load(sums + j * LANES), acc[j]));
}

/* M inputs with restored rows, a part at a time: a long sum loses what it adds. */
INLINE void LEVEL(multiply)(const float *tile, int64_t units, const float *x, const int M, float *sums, const int low)
{
    const int stride = STRIDE(low);
    for (int64_t from = 0; from < units; from += PART) {
        const int64_t to = smaller(from + PART, units);
        V acc[MANY_INPUTS];
        EACH_OF_MANY acc[j] = v_zero();
        for (int64_t u = from; u < to; u++) {
            const V row = v_load(tile + u * LANES);
            EACH_OF_MANY acc[j] = LEVEL(multiply_add)(row, x + j * stride + u, acc[j], low);
        }
        EACH_OF_MANY v_store(sums + j * LANES, v_add(v_load(sums + j * LANES), acc[j]));
    }
}

/* Restore a group of words into a tile, LANES a unit. */
INLINE void LEVEL(restore_across)(const struct weight *w, const float *words, const float *scales, int64_t byte, float *tile,
                                  const int low)
{
    const T table = table_load(w->levels);
    const int64_t half = w->half, first = byte / half;
    const int whole = (int)w->order->whole_words;
    int64_t block = first, end = (block + 1) * half;
    for (int64_t word = 0; word < LANES; word++, tile += UNITS(low) * LANES) {
        const W codes = words_of_v(v_load(words + word * LANES));
        V scale[4];
        for (int b = 0; b < 4; b++, byte++) {
            if (byte == end)
                block++, end += half;
            if (!b || !whole)
                scale[b] = v_load(scales + (block - first) * LANES);
            else
                scale[b] = scale[0];
        }
        V value[8];
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++)
            value[k % 2 * 4 + k / 2] = v_mul(v_lookup(table, codes, k), scale[k / 2]);
#if LEVEL_LOW
        if (low) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
                v_store(tile + k * LANES, (V)LEVEL(pairs)(value[2 * k], value[2 * k + 1]));
            continue;
        }
#endif
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++)
            v_store(tile + k * LANES, value[k]);
    }
}

/* Columns from c on of LANES rows of 16-bit floats into a tile: LANES columns, of which those beyond a row are zeros. */
INLINE void LEVEL(widen_across)(const struct weight *w, int64_t r, int64_t c, float *tile, const int type)
{
    const int64_t stride = w->columns, last = w->rows - 1, left = w->columns - c;
    const uint16_t *p = (const uint16_t *)w->packed + c;
    V v[LANES];
    if (left >= LANES && r + LANES <= w->rows) {
        p += r * stride;
        EACH_LANE {
            v[i] = LEVEL(sixteen)(p + i * stride, type);
            prefetch(p + (i + LANES) * stride);
        }
    } else {
        for (int i = 0; i < LANES; i++) {
            float row[LANES] = {0};
            for (int64_t k = 0; k < smaller(left, LANES); k++)
                row[k] = read_as_float(p + smaller(r + i, last) * stride, type, k);
            v[i] = v_load(row);
        }
    }
    v_transpose(v);
    EACH_LANE v_store(tile + i * LANES, v[i]);
}

/* One chunk of LANES rows with all inputs of a piece: columns from `start` on, `columns` of them. */
INLINE void LEVEL(chunk)(const struct job *job, int64_t r, int64_t start, int64_t columns, const float *x, float *own,
                         float *sums, const int low)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, units = columns / (low ? 2 : 1);
    float *scales = own, *words = scales + CHUNK_SCALES * MAX_LANES, *tile = words + MAX_LANES * MAX_LANES;
    if (!w->order) {
        for (int64_t c = 0; c < columns; c += LANES)
            if (w->encoding == BFLOAT16)
                LEVEL(widen_across)(w, r, start + c, tile + c * LANES, BFLOAT16);
            else
                LEVEL(widen_across)(w, r, start + c, tile + c * LANES, FLOAT16);
    } else {
        const int64_t first = start / 2 / w->half, end = (start + columns) / 2 - 1;
        const int fused = w->order->whole_words && batch <= FUSED_BATCH;
        LEVEL(scales_across)(w, r, first, end / w->half - first + 1, scales);
        for (int64_t c = 0; c < columns; c += GROUP) {
            const int64_t at = (start + c) / 2, block = at / w->half;
            LEVEL(words_across)(w, r, (start + c) / GROUP, words);
            const float *of_block = scales + (block - first) * LANES;
            if (!fused) {
                LEVEL(restore_across)(w, words, of_block, at, tile + c / (low ? 2 : 1) * LANES, low);
                continue;
            }
            const float *of_group = x + c / (low ? 2 : 1);
            const int64_t ahead = (at - block * w->half) / 4;
#define CALL(M) LEVEL(fused)(w, words, of_block, ahead, of_group + m * STRIDE(low), M, sums + m * LANES, low)
            IN_PASSES(batch, FUSED_INPUTS, CALL)
#undef CALL
        }
        if (fused)
            return;
    }
#define CALL(M) LEVEL(multiply)(tile, units, x + m * STRIDE(low), M, sums + m * LANES, low)
    IN_PASSES(batch, MANY_INPUTS, CALL)
#undef CALL
}

/* Sums of LANES rows, of which `rows` are there, to the output. */
INLINE void LEVEL(put_rows)(const struct job *job, int64_t r, int64_t rows, const float *sums, const int type)
{
    float bias[LANES] = {0};
    for (int64_t i = 0; i < rows && job->bias && !job->g0; i++)
        bias[i] = read_as_float(job->bias, job->bias_type, r + i);
    const V added = v_load(bias);
    for (int64_t m = job->m0; m < job->m1; m++, sums += LANES) {
        const int64_t at = m * job->weight->rows + r;
        if (rows == LANES && !job->g0) {
            LEVEL(store_as)(job->out, type, at, v_add(v_load(sums), added));
            continue;
        }
        for (int64_t i = 0; i < rows; i++)
            write_as(job->out, type, at + i, sums[i] + (job->g0 ? read_as_float(job->out, type, at + i) : bias[i]));
    }
}

static void LEVEL(many_body)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    float *own = job->own + thread * job->own_floats, *sums = own + SUMS_AT;
    const int64_t batch = job->m1 - job->m0, begin = job->g0 * GROUP, columns = (job->g1 - job->g0) * GROUP;
    int64_t r, to;
    share(job->weight->rows, LANES, parts, part, &r, &to);
    for (; r < to; r += LANES) {
        memset(sums, 0, (size_t)(batch * LANES) * sizeof(float));
        for (int64_t c = 0; c < columns; c += CHUNK) {
            const int64_t width = smaller(CHUNK, columns - c);
#if LEVEL_LOW
            if (job->low) {
                LEVEL(chunk)(job, r, begin + c, width, job->packed + c / 2 * batch, own, sums, 1);
                continue;
            }
#endif
            LEVEL(chunk)(job, r, begin + c, width, job->packed + c * batch, own, sums, 0);
        }
        const int64_t rows = smaller(LANES, to - r);
        if (job->out_type == FLOAT32)
            LEVEL(put_rows)(job, r, rows, sums, FLOAT32);
        else if (job->out_type == BFLOAT16)
            LEVEL(put_rows)(job, r, rows, sums, BFLOAT16);
        else
            LEVEL(put_rows)(job, r, rows, sums, FLOAT16);
    }
}
