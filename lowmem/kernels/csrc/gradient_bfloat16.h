/* The input gradient in bfloat16: pairs of rows side by side, so that vdpbf16ps sums over the two. */

/* M rows of the gradient with pairs of restored rows: `grad` holds bfloat16, of which a pair is one float here. */
INLINE void LEVEL(accumulate_low)(const float *grad, int64_t grad_stride, const int M, const float *tile, int pairs,
                                  float *sums)
{
    V acc[GRAD_INPUTS * TILE_VECTORS];
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) acc[j * TILE_VECTORS + n] = v_zero();
    for (int r = 0; r < pairs; r++, tile += GROUP) {
        __m512bh row[TILE_VECTORS];
        EACH_VECTOR(TILE_VECTORS) row[n] = (__m512bh)_mm512_loadu_si512(tile + n * LANES);
        EACH_INPUT {
            const __m512bh factor = LEVEL(pair_of)(grad + j * grad_stride + r);
            EACH_VECTOR(TILE_VECTORS)
                acc[j * TILE_VECTORS + n] = _mm512_dpbf16_ps(acc[j * TILE_VECTORS + n], row[n], factor);
        }
    }
    EACH_INPUT EACH_VECTOR(TILE_VECTORS) LEVEL(add_to)(sums + j * GROUP + n * LANES, acc[j * TILE_VECTORS + n]);
}

/* What a pair of rows is multiplied with: the scales from block `first` on times two numbers of `grad`, side by side, spread
 * over the words. */
INLINE void LEVEL(pair_factors)(const struct weight *w, int64_t r, int64_t next, int64_t first, const W *spread,
                                const float *grad, int64_t grad_stride, const int M, const int G, W *factor)
{
    V unit[2], scale[2];
    LEVEL(row_units)(w, r, next, 2, unit);
    LEVEL(few_scales)(w, r, next, first, 2, unit, scale);
    EACH_INPUT {
        const V one = v_mul(scale[0], v_set1(grad[j * grad_stride])), two = v_mul(scale[1], v_set1(grad[j * grad_stride + 1]));
        const W both = (W)_mm512_cvtne2ps_pbh(two, one);
        for (int i = 0; i < G; i++)
            factor[j + i] = _mm512_permutexvar_epi16(spread[i], both);
    }
}

/* As accumulate_few, for pairs of rows: `grad` has a zero after the last of an odd number. Halves of a word of each row lie
 * side by side, and so do their factors, which hold the scales: levels are looked up as bfloat16. */
INLINE void LEVEL(accumulate_few_low)(const struct weight *w, const float *grad, int64_t grad_stride, const int M, const int G,
                                      int64_t r0, int64_t r1, int64_t g, float *sums)
{
    const W table = LEVEL(table_low)(w->levels);
    const int64_t first = w->order->first_block[g], row_bytes = w->row_bytes, left = row_bytes - g * LANES * 4;
    const uint8_t *p = w->packed + r0 * row_bytes + g * LANES * 4;
    const __mmask32 odd = 0xaaaaaaaa;
    W spread[2]; /* of two vectors of scales, one behind the other, that of the first row's block and that of the second's */
    for (int i = 0; i < G; i++) {
        const W block = _mm512_loadu_si512(w->order->block + (g + i) * 4 * LANES);
        spread[i] = _mm512_or_si512(block, _mm512_slli_epi32(_mm512_add_epi32(block, _mm512_set1_epi32(LANES)), 16));
    }
    V acc[GRAD_FEW_INPUTS * 8];
    W factor[GRAD_FEW_INPUTS];
    EACH_SUM EACH_VECTOR(8) acc[j * 8 + n] = v_zero();
    LEVEL(pair_factors)(w, r0, r0 + 1 < r1, first, spread, grad, grad_stride, M, G, factor);
    for (int64_t r = r0; r < r1; r += 2, p += 2 * row_bytes) {
        const int64_t next = (r + 1 < r1) * row_bytes, pair = r + 2 < r1 ? r + 2 : r;
        W halves[2 * 2], later[GRAD_FEW_INPUTS]; /* factors take so long that they are begun a pair ahead */
        LEVEL(pair_factors)(w, pair, pair + 1 < r1, first, spread, grad + (pair - r0), grad_stride, M, G, later);
        for (int i = 0; i < G; i++) {
            const uint8_t *at = p + i * LANES * 4;
            const W one = words_load(at, left - i * LANES * 4), two = words_load(at + next, left - i * LANES * 4);
            halves[2 * i] = _mm512_mask_blend_epi16(odd, one, _mm512_slli_epi32(two, 16));
            halves[2 * i + 1] = _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(one, 16), two);
            prefetch(at + GRAD_ROWS * row_bytes);
            prefetch(at + (GRAD_ROWS + 1) * row_bytes);
        }
        EACH_VECTOR(8) {
            __m512bh level[2];
            for (int i = 0; i < G; i++)
                level[i] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(halves[2 * i + n / 4], 4 * (n % 4)), table);
            EACH_SUM acc[j * 8 + n] = _mm512_dpbf16_ps(acc[j * 8 + n], level[G == 2 ? j : 0], (__m512bh)factor[j]);
        }
        EACH_SUM factor[j] = later[j];
    }
    EACH_SUM EACH_VECTOR(8) LEVEL(add_to)(sums + j * GROUP + n * LANES, acc[j * 8 + n]);
}

/* Two rows of group g, lane by lane side by side: GROUP pairs. */
INLINE void LEVEL(decode_pair)(const struct weight *w, int64_t row, int both, int64_t g, int64_t t0, T table,
                               const float *scales, float *out)
{
    const W one = LEVEL(words)(w, row, g), two = both ? LEVEL(words)(w, row + 1, g) : _mm512_setzero_si512();
    const int whole = (int)w->order->whole_words;
    prefetch(w->packed + (row + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
    prefetch(w->packed + (row + 1 + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
    V first = LEVEL(spread)(w->order, scales, t0, g, 0);
    V second = both ? LEVEL(spread)(w->order, scales + TILE_SCALES, t0, g, 0) : v_zero();
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        if (k && k % 2 == 0 && !whole) {
            first = LEVEL(spread)(w->order, scales, t0, g, k / 2);
            second = both ? LEVEL(spread)(w->order, scales + TILE_SCALES, t0, g, k / 2) : v_zero();
        }
        const V even = v_mul(v_lookup(table, one, k), first), odd = v_mul(v_lookup(table, two, k), second);
        _mm512_storeu_si512(out + k * LANES, LEVEL(pairs)(even, odd));
    }
}

/* As grad_group. */
static int LEVEL(grad_group_low)(const struct job *job, const float *grad, int64_t stride, int64_t r0, int64_t r1, int64_t t0,
                                 int64_t t1, int64_t g, const float *scales, float *tile, float *sums)
{
    const struct weight *w = job->weight;
    if (LEVEL(grad_few)(w, job->m1 - job->m0, 1)) {
        if (LEVEL(two_groups)(w, job->m1 - job->m0, g, t1)) {
            LEVEL(accumulate_few_low)(w, grad, stride, 1, 2, r0, r1, g, sums);
            return 2;
        }
#define CALL(M) LEVEL(accumulate_few_low)(w, grad + m * stride, stride, M, 1, r0, r1, g, sums + m * GROUP)
        IN_PASSES(job->m1 - job->m0, GRAD_FEW_INPUTS, CALL)
#undef CALL
        return 1;
    }
    const T table = table_load(w->levels);
    for (int64_t r = r0; r < r1; r += 2)
        LEVEL(decode_pair)(w, r, r + 1 < r1, g, t0, table, scales + (r - r0) * TILE_SCALES, tile + (r - r0) / 2 * GROUP);
    const int pairs = (int)((r1 - r0 + 1) / 2);
    for (int n0 = 0; n0 < 8; n0 += TILE_VECTORS) {
#define CALL(M) \
    LEVEL(accumulate_low)(grad + m * stride, stride, M, tile + n0 * LANES, pairs, sums + m * GROUP + n0 * LANES)
        IN_PASSES(job->m1 - job->m0, GRAD_INPUTS, CALL)
#undef CALL
    }
    return 1;
}
