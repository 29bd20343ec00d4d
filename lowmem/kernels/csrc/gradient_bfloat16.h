/* grad @ W in bfloat16, for gradient.h. Two rows of W make a pair in each lane, so that vdpbf16ps sums over rows, two at a
 * time. */

/* sums (M, GROUP) += grad (M, pairs) @ tile (pairs, GROUP), where elements are pairs of bfloat16, stored as floats. */
INLINE void accumulate_bf16(const float *grad, int64_t grad_stride, const int M, const float *tile, int pairs,
                                  float *sums)
{
    V acc[GRAD_INPUTS * TILE_VECTORS];
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) acc[j * TILE_VECTORS + n] = v_zero();
    for (int r = 0; r < pairs; r++, tile += GROUP) {
        __m512bh row[TILE_VECTORS];
        EACH_VECTOR(TILE_VECTORS) row[n] = (__m512bh)_mm512_loadu_si512(tile + n * LANES);
        EACH_INPUT {
            const __m512bh factor = pair_of(grad + j * grad_stride + r);
            EACH_VECTOR(TILE_VECTORS)
                acc[j * TILE_VECTORS + n] = _mm512_dpbf16_ps(acc[j * TILE_VECTORS + n], row[n], factor);
        }
    }
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) add_to(sums + j * GROUP + n * LANES, acc[j * TILE_VECTORS + n]);
}

/* factor[j] = scale * grad as bfloat16 for row r (the first LANES) and row r + next (the last LANES), for M batch rows. Scales
 * are those from block `first` on. */
INLINE void pair_factors(const struct weight *w, int64_t r, int64_t next, const float *units, int64_t first,
                                const float *grad, const int M, W *factor)
{
    const V unit[2] = {v_set1(units[0]), v_set1(units[next])};
    V scale[2];
    few_scales(w, r, next, first, 2, unit, scale);
    EACH_INPUT {
        const float *of = grad + j * GRAD_FEW_ROWS;
        const V one = v_mul(scale[0], v_set1(of[0])), two = v_mul(scale[1], v_set1(of[1]));
        factor[j] = (W)_mm512_cvtne2ps_pbh(two, one);
    }
}

/* Indices that spread pair_factors over the words of a group: for each word, the factor of the first row and that of the
 * second. */
INLINE W pair_spread(const struct order *order, int64_t g)
{
    const W block = _mm512_loadu_si512(order->block + g * 4 * LANES);
    return _mm512_or_si512(block, _mm512_slli_epi32(_mm512_add_epi32(block, _mm512_set1_epi32(LANES)), 16));
}

/* The low or high 16-bit halves of the words of two rows, interleaved. */
INLINE W pair_halves(W one, W two, const int high)
{
    const __mmask32 odd = 0xaaaaaaaa;
    return high ? _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(one, 16), two)
                : _mm512_mask_blend_epi16(odd, one, _mm512_slli_epi32(two, 16));
}

/* The levels of nibble k (0 to 3) of 16-bit words. */
INLINE __m512bh pair_level(W halves, const int k, W table)
{
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(halves, 4 * k), table);
}

/* As accumulate_few, for one batch row, G groups and pairs of rows. `grad` is padded with a zero where the number of rows is
 * odd. Scales are in the factors, so that levels are looked up as bfloat16. */
INLINE void accumulate_one_bf16(const struct weight *w, const float *grad, const int G, int64_t r0, int64_t r1, int64_t g,
                                      const float *units, float *sums)
{
    const W table = table_bf16(w->levels);
    const int64_t first = w->order->first_block[g], row_bytes = w->row_bytes, left = row_bytes - g * LANES * 4;
    const uint8_t *p = w->packed + r0 * row_bytes + g * LANES * 4;
    V acc[2 * 8];
    W spread[2], both;
    for (int i = 0; i < G; i++) {
        spread[i] = pair_spread(w->order, g + i);
        EACH_VECTOR(8) acc[i * 8 + n] = v_zero();
    }
    pair_factors(w, r0, r0 + 1 < r1, units, first, grad, 1, &both);
    for (int64_t r = r0; r < r1; r += 2, p += 2 * row_bytes) {
        const int64_t next = (r + 1 < r1) * row_bytes, pair = r + 2 < r1 ? r + 2 : r;
        W halves[2 * 2], later; /* a long chain of operations, so it is started a pair ahead */
        __m512bh factor[2];
        pair_factors(w, pair, pair + 1 < r1, units + (pair - r0), first, grad + (pair - r0), 1, &later);
        for (int i = 0; i < G; i++) {
            const uint8_t *at = p + i * LANES * 4;
            const W one = words_load(at, left - i * LANES * 4), two = words_load(at + next, left - i * LANES * 4);
            halves[2 * i] = pair_halves(one, two, 0);
            halves[2 * i + 1] = pair_halves(one, two, 1);
            factor[i] = (__m512bh)_mm512_permutexvar_epi16(spread[i], both);
            prefetch(at + GRAD_ROWS * row_bytes);
            prefetch(at + (GRAD_ROWS + 1) * row_bytes);
        }
        EACH_VECTOR(8)
            for (int i = 0; i < G; i++)
                acc[i * 8 + n] =
                    _mm512_dpbf16_ps(acc[i * 8 + n], pair_level(halves[2 * i + n / 4], n % 4, table), factor[i]);
        both = later;
    }
    for (int i = 0; i < G; i++)
        EACH_VECTOR(8) add_to(sums + i * GROUP + n * LANES, acc[i * 8 + n]);
}

/* The same for M batch rows and one half of every word (H is 1, and `high` says which) or both (H is 2). `factors` are what
 * put_factors makes, `batch` vectors per pair of rows. `whole`: all words of the group are within the row. */
INLINE void accumulate_halves(const struct weight *w, const float *factors, int64_t batch, const int M, const int H,
                                     const int high, int64_t r0, int64_t r1, int64_t g, const int whole, float *sums)
{
    const W table = table_bf16(w->levels), spread = pair_spread(w->order, g);
    const int64_t row_bytes = w->row_bytes, left = whole ? LANES * 4 : row_bytes - g * LANES * 4;
    const uint8_t *p = w->packed + r0 * row_bytes + g * LANES * 4;
    V acc[GRAD_INPUTS * 4];
    EACH_INPUT EACH_VECTOR(4 * H) acc[j * 4 * H + n] = v_zero();
    for (int64_t r = r0; r < r1; r += 2, p += 2 * row_bytes, factors += batch * LANES) {
        const W one = words_load(p, left), two = words_load(p + (r + 1 < r1) * row_bytes, left);
        W halves[2];
        for (int i = 0; i < H; i++) {
            halves[i] = pair_halves(one, two, high + i);
            prefetch(p + (GRAD_ROWS + high + i) * row_bytes);
        }
        __m512bh level[4 * 2];
        EACH_VECTOR(4 * H) level[n] = pair_level(halves[n / 4], n % 4, table);
        EACH_INPUT {
            const __m512bh factor = (__m512bh)_mm512_permutexvar_epi16(spread, _mm512_loadu_si512(factors + j * LANES));
            EACH_VECTOR(4 * H) acc[j * 4 * H + n] = _mm512_dpbf16_ps(acc[j * 4 * H + n], level[n], factor);
        }
    }
    EACH_INPUT EACH_VECTOR(4 * H) add_to(sums + j * GROUP + (high * 4 + n) * LANES, acc[j * 4 * H + n]);
}

#define FACTOR_INPUTS 8 /* batch rows whose factors are made at a time */

/* out (pairs, batch, LANES) = the factors of rows r0 to r1 for M batch rows: see pair_factors. */
INLINE void put_factors(const struct weight *w, const float *grad, int64_t batch, const int M, int64_t r0, int64_t r1,
                               int64_t g, const float *units, float *out)
{
    for (int64_t r = r0; r < r1; r += 2, grad += 2, units += 2, out += batch * LANES) {
        W factor[FACTOR_INPUTS];
        pair_factors(w, r, r + 1 < r1, units, w->order->first_block[g], grad, M, factor);
        EACH_INPUT _mm512_storeu_si512(out + j * LANES, factor[j]);
    }
}

/* Most rows whose factors are stored at a time, in the memory of a tile; fewer with larger batches. */
#define FACTOR_ROWS 64
#define FACTOR_PAIRS (GRAD_ROWS * MAX_GROUP / LANES) /* most factors there: pairs of rows times batch rows */

/* Several batch rows with rows r0 to r1 of one or two groups that share a vector of scales. */
INLINE void accumulate_several_bf16(const struct weight *w, const float *grad, int64_t batch, int64_t r0, int64_t r1,
                                          int64_t g, int64_t groups, const float *units, float *factors, float *sums)
{
#define CALL(M) put_factors(w, grad + m * GRAD_FEW_ROWS, batch, M, r0, r1, g, units, factors + m * LANES)
    IN_PASSES(batch, FACTOR_INPUTS, CALL)
#undef CALL
    for (const int64_t end = g + groups; g < end; g++, sums += batch * GROUP) {
        const int whole = w->row_bytes >= (g + 1) * LANES * 4;
#define HALVES(M, H, high, whole) \
    accumulate_halves(w, factors + m * LANES, batch, M, H, high, r0, r1, g, whole, sums + m * GROUP)
#define CALL(M) (whole ? HALVES(M, 2, 0, 1) : HALVES(M, 2, 0, 0))
        if (batch <= GRAD_INPUTS / 2) {
            IN_PASSES(batch, GRAD_INPUTS / 2, CALL)
            continue;
        }
#undef CALL
#define CALL(M) \
    (whole ? HALVES(M, 1, 0, 1) : HALVES(M, 1, 0, 0)), (whole ? HALVES(M, 1, 1, 1) : HALVES(M, 1, 1, 0))
        IN_PASSES(batch, GRAD_INPUTS, CALL)
#undef CALL
#undef HALVES
    }
}

/* out = group g of rows `row` and, if `both`, row + 1, dequantized and interleaved: GROUP pairs. Without `both` the second is
 * zeros. */
INLINE void decode_pair(const struct weight *w, int64_t row, int both, int64_t g, int64_t t0, T table,
                               const float *scales, float *out)
{
    const W one = words_of_group(w, row, g), two = both ? words_of_group(w, row + 1, g) : _mm512_setzero_si512();
    const int whole = (int)w->order->whole_words;
    prefetch(w->packed + (row + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
    prefetch(w->packed + (row + 1 + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
    V first = spread(w->order, scales, t0, g, 0);
    V second = both ? spread(w->order, scales + TILE_SCALES, t0, g, 0) : v_zero();
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        if (k && k % 2 == 0 && !whole) {
            first = spread(w->order, scales, t0, g, k / 2);
            second = both ? spread(w->order, scales + TILE_SCALES, t0, g, k / 2) : v_zero();
        }
        const V even = v_mul(v_lookup(table, one, k), first), odd = v_mul(v_lookup(table, two, k), second);
        _mm512_storeu_si512(out + k * LANES, pairs(even, odd));
    }
}

/* As grad_group. */
static int grad_group_bf16(const struct job *job, const float *grad, int64_t stride, int64_t r0, int64_t r1, int64_t t0,
                                 int64_t t1, int64_t g, const float *scales, float *tile, float *sums)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0;
    if (job->kernel->few) {
        const int groups = share_scales(w, g, t1) ? 2 : 1;
        const float *units = scales + ROW_UNITS_AT;
        if (job->batch == 1 && groups == 2)
            accumulate_one_bf16(w, grad, 2, r0, r1, g, units, sums);
        else if (job->batch == 1)
            accumulate_one_bf16(w, grad, 1, r0, r1, g, units, sums);
        else
            /* As many rows at a time as for the whole batch, also for one piece of it: this number decides how sums are
             * rounded. */
            for (int64_t r = r0, to; r < r1; r = to) {
                to = smaller(r + smaller(FACTOR_ROWS, FACTOR_PAIRS / job->batch * 2), r1);
                accumulate_several_bf16(w, grad + (r - r0), batch, r, to, g, groups, units + (r - r0), tile, sums);
            }
        return groups;
    }
    const T table = table_load(w->levels);
    for (int64_t r = r0; r < r1; r += 2)
        decode_pair(w, r, r + 1 < r1, g, t0, table, scales + (r - r0) * TILE_SCALES, tile + (r - r0) / 2 * GROUP);
    const int pairs = (int)((r1 - r0 + 1) / 2);
    for (int n0 = 0; n0 < 8; n0 += TILE_VECTORS) {
#define CALL(M) \
    accumulate_bf16(grad + m * stride, stride, M, tile + n0 * LANES, pairs, sums + m * GROUP + n0 * LANES)
        IN_PASSES(batch, GRAD_INPUTS, CALL)
#undef CALL
    }
    return 1;
}
