/* grad @ W by AMX: a thread takes groups of columns, whose sums it keeps, and the gradient is multiplied as it lies, or its terms. */

#include "amx_pairs.h"

/* The sums of a group, tile by tile sixteen inputs, to the output. */
INLINE void put_gradient(const struct job *job, int64_t g, const float *sums, const int type)
{
    const struct weight *w = job->weight;
    const int64_t half = w->half, size = type == FLOAT32 ? 4 : 2;
    /* Low nibbles, then high ones, of eight bytes. */
    const W order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    for (int64_t m = 0; m < job->m1 - job->m0; m++) {
        char *out = (char *)job->out + (job->m0 + m) * w->columns * size;
        const float *of = sums + m / TILED_INPUTS * GROUP_TILES * TILE_FLOATS + m % TILED_INPUTS * LANES;
        if (by_eights(w)) {
            for (int64_t q = 0, byte = g * LANES * 4; q < GROUP_TILES && byte < w->row_bytes; q++, byte += 8) {
                const int64_t start = byte / half * 2 * half, j = byte % half, columns = smaller(w->columns - start, 2 * half);
                const int64_t lower = (columns + 1) / 2, low = smaller(8, lower - j), high = smaller(8, columns - lower - j);
                float row[LANES];
                LEVEL(store_as)(row, type, 0, _mm512_permutexvar_ps(order, v_load(of + q * TILE_FLOATS)));
                if (high == 8) {
                    memcpy(out + (start + j) * size, row, 8 * size);
                    memcpy(out + (start + lower + j) * size, (char *)row + 8 * size, 8 * size);
                } else {
                    memcpy(out + (start + j) * size, row, (size_t)(low * size));
                    memcpy(out + (start + lower + j) * size, (char *)row + 8 * size, (size_t)((high > 0 ? high : 0) * size));
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
        LEVEL(unpack)(&one, g, row, type);
    }
}

/* Inputs m and on of a piece, 32 or as many as are there, for rows r0 to r1: as they lie, or where these are not whole tiles with
 * zeros behind them in `padded`. */
static struct tiles as_it_lies(const struct job *job, int64_t m, int64_t r0, int64_t r1, uint16_t *padded)
{
    const int64_t stride = job->weight->rows, inputs = smaller(job->m1 - job->m0 - m, 2 * TILED_INPUTS), rows = r1 - r0;
    const uint16_t *x = (const uint16_t *)job->x + (job->m0 + m) * stride + r0;
    if (rows % LINE == 0 && inputs % TILED_INPUTS == 0 && stride % 2 == 0) {
        const struct tiles whole = {(const float *)x, TILED_INPUTS * stride / 2, LANES, 0, 2 * stride, 1};
        return whole;
    }
    memset(padded, 0, (size_t)(round_up(inputs, TILED_INPUTS) * TILED_GRAD_ROWS) * sizeof *padded);
    for (int64_t i = 0; i < inputs; i++)
        memcpy(padded + i * TILED_GRAD_ROWS, x + i * stride, (size_t)rows * sizeof *padded);
    const struct tiles copy = {(const float *)padded, TILED_INPUTS * TILED_GRAD_ROWS / 2, LANES, 0, 2 * TILED_GRAD_ROWS, 1};
    return copy;
}

/* Terms of a piece of the gradient behind its sums, for rows r0 to r1: tiles of sixteen inputs and 32 rows, term by term. */
static float *terms_of(const struct job *job)
{
    return job->packed + job->piece * tiled_grad_columns(job->weight, job->threads);
}
static int64_t term_floats(const struct job *job) { return (job->r1 - job->r0 + LINE - 1) / LINE * TILE_FLOATS; }

static void split_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t stride = job->weight->rows, term = term_floats(job);
    const V factor = v_set1(input_factor(job->weight, TERMS));
    int64_t m, to;
    (void)thread;
    share(job->m1 - job->m0, 1, parts, part, &m, &to);
    for (; m < to; m++) {
        const float *x = (const float *)job->x + (job->m0 + m) * stride;
        float *out = terms_of(job) + m / TILED_INPUTS * TERMS * term + m % TILED_INPUTS * LANES;
        W most = _mm512_setzero_si512();
        for (int64_t r = job->r0; r < job->r1; r += LINE, out += TILE_FLOATS) {
            W words[TERMS];
            most = load_terms(x + r, stride - r, factor, words, most);
            for (int t = 0; t < TERMS; t++)
                v_store(out + t * term, v_of_words(words[t]));
        }
        if (!inputs_have_terms(_mm512_set1_epi32(_mm512_reduce_max_epi32(most))))
            refuse(job);
    }
}

/* Group g of rows r0 to r1, with all inputs of a piece; `sums` are those of the group. */
static void add_group(const struct job *job, int64_t g, int64_t r0, int64_t r1, const float *scales, float *restored, uint16_t *padded,
                      float *sums)
{
    const int64_t batch = job->m1 - job->m0, lines = (r1 - r0 + LINE - 1) / LINE;
    restore_strips(job, r0, r1, g, 0, scales, restored);
    for (int64_t m = 0; m < batch; m += 2 * TILED_INPUTS) {
        const struct tiles x = as_it_lies(job, m, r0, r1, padded);
        struct tiles rows = {restored, TILE_FLOATS, 2 * TILE_FLOATS, 0, 64, 1};
        for (int strip = 0; strip < GRADIENT_STRIPS; strip++, rows.at += STRIP, sums += 2 * TILE_FLOATS)
            if (m + TILED_INPUTS < batch)
                multiply_tiles(rows, x, lines, 1, 1, !r0, sums, TILED_INPUTS * GROUP);
            else
                multiply_tiles(rows, x, lines, 1, 0, !r0, sums, 0);
        sums += TILED_INPUTS * GROUP;
    }
}

/* The same of terms, strip by strip. */
static void add_group_terms(const struct job *job, int64_t g, int64_t r0, int64_t r1, const float *scales, float *restored, float *sums)
{
    const int64_t batch = job->m1 - job->m0, lines = (r1 - r0 + LINE - 1) / LINE, term = term_floats(job), sixteen = TERMS * term;
    const struct tiles rows = {restored, TILE_FLOATS, 2 * TILE_FLOATS, STRIP, 64, weight_terms(job->weight, job->tiles)};
    for (int strip = 0; strip < GRADIENT_STRIPS; strip++) {
        struct tiles x = {terms_of(job) + (r0 - job->r0) / LINE * TILE_FLOATS, sixteen, TILE_FLOATS, term, 64, TERMS};
        float *of = sums + strip * 2 * TILE_FLOATS;
        restore_strips(job, r0, r1, g, strip, scales, restored);
        for (int64_t m = 0; m < batch; m += 2 * TILED_INPUTS, x.at += 2 * sixteen, of += 2 * TILED_INPUTS * GROUP)
            if (m + TILED_INPUTS >= batch)
                multiply_terms(rows, x, lines, 1, 0, !r0, of, 0);
            else if (lines < GRADIENT_LINES)
                multiply_terms(rows, x, lines, 1, 1, !r0, of, TILED_INPUTS * GROUP);
            else
                multiply_terms(rows, x, GRADIENT_LINES, 1, 1, !r0, of, TILED_INPUTS * GROUP);
    }
}

static void gradient_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, all = round_up(batch, TILED_INPUTS);
    const int64_t step = job->tiles > 1 || job->batch > 2 * TILED_INPUTS ? TILED_GRAD_ROWS : TILED_GRAD_ROWS / 2; /* more pay where sums are many */
    float *restored = job->own + thread * job->own_floats, *scales = restored + (job->tiles > 1 ? TERMS : GRADIENT_STRIPS) * STRIP;
    uint16_t *padded = (uint16_t *)(scales + TILED_GRAD_ROWS * LANES);
    int64_t g0, g1;
    share(job->g1 - job->g0, 1, parts, part, &g0, &g1);
    if (g0 >= g1)
        return;
    g0 += job->g0;
    g1 += job->g0;
    begin_tiles();
    for (int64_t r0 = job->r0, r1; r0 < job->r1 && !is_refused(job); r0 = r1) {
        int64_t from = -1;
        r1 = smaller(r0 + step, job->r1);
        for (int64_t g = g0; g < g1; g++) {
            float *sums = job->packed + (g - job->g0) * all * GROUP;
            if (w->order && w->order->first_block[g] != from) {
                from = w->order->first_block[g];
                for (int64_t r = r0; r < r1; r += TILED_ROWS)
                    put_scales(job, r, from, scales + (r - r0) * LANES);
            }
            if (job->tiles > 1)
                add_group_terms(job, g, r0, r1, scales, restored, sums);
            else
                add_group(job, g, r0, r1, scales, restored, padded, sums);
        }
    }
    end_tiles();
    for (int64_t g = g0; g < g1 && job->r1 == w->rows && !is_refused(job); g++)
        if (job->out_type == FLOAT32)
            put_gradient(job, g, job->packed + (g - job->g0) * all * GROUP, FLOAT32);
        else
            put_gradient(job, g, job->packed + (g - job->g0) * all * GROUP, BFLOAT16);
}

static void gradient_piece(struct job *job)
{
    const int64_t rows = job->weight->rows, step = job->tiles > 1 ? TILED_GRAD_PART : rows;
    for (job->r0 = 0; job->r0 < rows; job->r0 = job->r1) {
        job->r1 = smaller(job->r0 + step, rows);
        if (job->tiles > 1)
            parallel(job, split_body, PARTS, gradient_body, 1);
        else
            parallel(job, gradient_body, 1, NULL, 0);
    }
}

static void input_grad(struct job *job)
{
    if (job->tiles)
        in_pieces(job, job->weight->stride / GROUP, tiled_grad_columns(job->weight, job->threads) / GROUP, gradient_piece);
    else
        level_avx512bf16.input_grad(job);
}
