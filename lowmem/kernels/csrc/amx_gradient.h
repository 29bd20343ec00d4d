/* grad @ W in bfloat16 by AMX: a thread takes groups of columns, and pairs of rows of the weight are restored side by side, in
 * tiles of 16 pairs by 16 columns. The gradient is multiplied as it lies. */

#define GRADIENT_LINES (TILED_GRAD_ROWS / LINE) /* of a part of the gradient */
#define STRIP (GRADIENT_LINES * 2 * TILE_FLOATS) /* floats of two tiles' columns, for all rows of a part */
#define GROUP_TILES (GROUP / 16)
_Static_assert(TILED_GRAD_OWN >= (GROUP_TILES / 2) * STRIP + TILED_GRAD_ROWS * LANES + 2 * TILED_INPUTS * TILED_GRAD_ROWS / 2,
               "restored rows, scales, and inputs that are padded");

/* Blocks of which eight bytes are a part: sixteen columns of one block, nibble 0 to 3 of four 16-bit words. Others: nibble k of
 * all words of a group. */
static int by_eights(const struct weight *w) { return w->order && w->half % 8 == 0; }

/* A row and the next, which may be missing (`both`), of group g; `scales` are those of both, a vector each. `out` is where the
 * pair lies in the first tile. */
INLINE void restore_pair(const struct weight *w, int64_t r, int both, int64_t g, const float *scales, float *out)
{
    float *const at[GROUP_TILES] = {
        out, out + TILE_FLOATS, out + STRIP, out + STRIP + TILE_FLOATS,
        out + 2 * STRIP, out + 2 * STRIP + TILE_FLOATS, out + 3 * STRIP, out + 3 * STRIP + TILE_FLOATS,
    };
    if (!w->order) {
        const W front = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
        const W back = _mm512_add_epi16(front, _mm512_set1_epi16(16));
        for (int64_t k = 0, c = g * GROUP; k < LINES; k++, c += LINE) {
            const uint16_t *p = (const uint16_t *)w->packed + r * w->columns + c;
            const W one = words_load((const uint8_t *)p, 2 * (w->columns - c));
            const W two = words_load((const uint8_t *)(p + w->columns), both ? 2 * (w->columns - c) : 0);
            prefetch_far(p + TILED_ROWS * w->columns);
            prefetch_far(p + (TILED_ROWS + 1) * w->columns);
            v_store(at[2 * k], v_of_words(_mm512_permutex2var_epi16(one, front, two)));
            v_store(at[2 * k + 1], v_of_words(_mm512_permutex2var_epi16(one, back, two)));
        }
        return;
    }
    const int64_t left = w->row_bytes - g * LANES * 4;
    const uint8_t *p = w->packed + r * w->row_bytes + g * LANES * 4;
    const int32_t *block = w->order->block + g * 4 * LANES;
    const V levels = v_load(w->levels);
    const W one = words_load(p, left), two = words_load(p + w->row_bytes, both ? left : 0);
    prefetch_far(p + TILED_ROWS * w->row_bytes);
    prefetch_far(p + (TILED_ROWS + 1) * w->row_bytes);
    if (by_eights(w)) {
        W nibble = _mm512_set1_epi16(15), shifts = _mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0), second = _mm512_set1_epi32(0x00100000);
        v_keep(nibble);
        v_keep(shifts);
        v_keep(second);
        __m128i words[2][4]; /* of eight bytes of either row side by side: those of even eights, those of odd ones */
        _mm512_storeu_si512(words[0], _mm512_unpacklo_epi16(one, two));
        _mm512_storeu_si512(words[1], _mm512_unpackhi_epi16(one, two));
        W tables = nibble;
#pragma GCC unroll 8
        for (int q = 0; q < GROUP_TILES; q++) {
            if (!q || block[2 * q] != block[2 * q - 2])
                tables = two_tables(levels, scales + block[2 * q], scales + LANES + block[2 * q]);
            const W codes = _mm512_srlv_epi64(_mm512_broadcast_i32x4(words[q % 2][q / 2]), shifts);
            v_store(at[q], look_up(codes, nibble, second, tables));
        }
        return;
    }
    const V scale = v_load(scales), next = v_load(scales + LANES);
#pragma GCC unroll 8
    for (int k = 0; k < GROUP_TILES; k++) {
        const int32_t *of = block + (w->order->whole_words ? 0 : k / 2 * LANES);
        const V even = v_mul(v_lookup(levels, one, k), v_spread(scale, of)), odd = v_mul(v_lookup(levels, two, k), v_spread(next, of));
        v_store(at[k], (V)LEVEL(pairs)(even, odd));
    }
}

/* Restore rows r0 to r1 of group g. Pairs behind the last are zeros, up to a whole tile. */
static void restore_pairs(const struct weight *w, int64_t r0, int64_t r1, int64_t g, const float *scales, float *out)
{
    for (int64_t r = r0, end = r0 + round_up(r1 - r0, LINE), pair = 0; r < end; r += 2, pair++, scales += 2 * LANES) {
        float *at = out + pair / LANES * 2 * TILE_FLOATS + pair % LANES * LANES;
        if (r + 1 < r1)
            restore_pair(w, r, 1, g, scales, at);
        else if (r < r1)
            restore_pair(w, r, 0, g, scales, at);
        else
            for (int64_t i = 0; i < GROUP_TILES; i++)
                v_store(at + i / 2 * STRIP + i % 2 * TILE_FLOATS, v_zero());
    }
}

/* The sums of a group, tile by tile sixteen inputs, to the output. */
static void put_gradient(const struct job *job, int64_t g, const float *sums)
{
    const struct weight *w = job->weight;
    const int64_t half = w->half;
    /* Low nibbles, then high ones, of eight bytes. */
    const W order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    for (int64_t m = 0; m < job->m1 - job->m0; m++) {
        uint16_t *out = (uint16_t *)job->out + (job->m0 + m) * w->columns;
        const float *of = sums + m / TILED_INPUTS * GROUP_TILES * TILE_FLOATS + m % TILED_INPUTS * LANES;
        if (by_eights(w)) {
            for (int64_t q = 0, byte = g * LANES * 4; q < GROUP_TILES && byte < w->row_bytes; q++, byte += 8) {
                const int64_t start = byte / half * 2 * half, j = byte % half, columns = smaller(w->columns - start, 2 * half);
                const int64_t lower = (columns + 1) / 2;
                uint16_t row[LANES];
                v_to_bfloat(row, _mm512_permutexvar_ps(order, v_load(of + q * TILE_FLOATS)));
                if (j + 8 <= columns - lower) {
                    memcpy(out + start + j, row, 16);
                    memcpy(out + start + lower + j, row + 8, 16);
                } else
                    for (int64_t i = 0; i < 8 && j + i < lower; i++) {
                        out[start + j + i] = row[i];
                        if (lower + j + i < columns)
                            out[start + lower + j + i] = row[8 + i];
                    }
            }
            continue;
        }
        float row[GROUP];
        for (int k = 0; k < GROUP_TILES; k++)
            v_store(row + k * LANES, v_load(of + k * TILE_FLOATS));
        struct job one = *job;
        one.m0 = job->m0 + m;
        one.m1 = one.m0 + 1;
        LEVEL(unpack)(&one, g, row, BFLOAT16);
    }
}

/* Inputs m and on of a piece, 32 or as many as are there, for rows r0 to r1: as they lie, or where these are not whole tiles with
 * zeros behind them in `padded`. */
static struct tiles gradient_tiles(const struct job *job, int64_t m, int64_t r0, int64_t r1, uint16_t *padded)
{
    const int64_t stride = job->weight->rows, inputs = smaller(job->m1 - job->m0 - m, 2 * TILED_INPUTS), rows = r1 - r0;
    const uint16_t *x = (const uint16_t *)job->x + (job->m0 + m) * stride + r0;
    if (rows % LINE == 0 && inputs % TILED_INPUTS == 0 && stride % 2 == 0) {
        const struct tiles as_it_lies = {(const float *)x, TILED_INPUTS * stride / 2, LANES, 2 * stride};
        return as_it_lies;
    }
    memset(padded, 0, (size_t)(round_up(inputs, TILED_INPUTS) * TILED_GRAD_ROWS) * sizeof *padded);
    for (int64_t i = 0; i < inputs; i++)
        memcpy(padded + i * TILED_GRAD_ROWS, x + i * stride, (size_t)rows * sizeof *padded);
    const struct tiles copy = {(const float *)padded, TILED_INPUTS * TILED_GRAD_ROWS / 2, LANES, 2 * TILED_GRAD_ROWS};
    return copy;
}

static void gradient_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, all = round_up(batch, TILED_INPUTS);
    const int64_t step = batch > 2 * TILED_INPUTS ? TILED_GRAD_ROWS : TILED_GRAD_ROWS / 2; /* more pay where sums are many */
    float *restored = job->own + thread * job->own_floats, *scales = restored + GROUP_TILES / 2 * STRIP;
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
            if (w->order && w->order->first_block[g] != from) {
                from = w->order->first_block[g];
                for (int64_t r = r0; r < r1; r += TILED_ROWS)
                    put_scales(w, r, from, scales + (r - r0) * LANES);
            }
            restore_pairs(w, r0, r1, g, scales, restored);
            for (int64_t m = 0; m < batch; m += 2 * TILED_INPUTS) {
                const struct tiles x = gradient_tiles(job, m, r0, r1, padded);
                struct tiles rows = {restored, TILE_FLOATS, 2 * TILE_FLOATS, 64};
                float *sums = job->packed + ((g - job->g0) * all + m) * GROUP;
                for (int strip = 0; strip < GROUP_TILES / 2; strip++, rows.at += STRIP, sums += 2 * TILE_FLOATS)
                    if (m + TILED_INPUTS < batch)
                        multiply_tiles(rows, x, (r1 - r0 + LINE - 1) / LINE, 1, 1, !r0, sums, TILED_INPUTS * GROUP);
                    else
                        multiply_tiles(rows, x, (r1 - r0 + LINE - 1) / LINE, 1, 0, !r0, sums, 0);
            }
        }
    }
    for (int64_t g = g0; g < g1; g++)
        put_gradient(job, g, job->packed + (g - job->g0) * all * GROUP);
    end_tiles();
}

static void input_grad(struct job *job)
{
    if (!job->tiles) {
        level_avx512bf16.input_grad(job);
        return;
    }
    const int64_t groups = job->weight->stride / GROUP, part = tiled_grad_columns(job->weight, job->threads) / GROUP;
    for (job->m0 = 0; job->m0 < job->batch; job->m0 = job->m1) {
        job->m1 = smaller(job->m0 + job->piece, job->batch);
        for (job->g0 = 0; job->g0 < groups; job->g0 = job->g1) {
            job->g1 = smaller(job->g0 + part, groups);
            parallel(job, gradient_body, 1, NULL, 0);
        }
    }
}
