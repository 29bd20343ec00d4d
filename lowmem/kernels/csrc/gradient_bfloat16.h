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

/* As accumulate_few: `grad` holds bfloat16, a zero after the last row. The scales are those of the pairs of factors, for
 * levels are looked up as bfloat16: halves of a word of each row lie side by side. */
INLINE void LEVEL(accumulate_few_low)(const struct weight *w, const float *grad, int64_t grad_stride, const int M,
                                      int64_t r0, int64_t r1, int64_t g, float *sums)
{
    const W table = LEVEL(table_low)(w->levels);
    const int32_t *block = w->order->block + g * 4 * LANES;
    const int64_t first = w->order->first_block[g];
    const __mmask32 odd = 0xaaaaaaaa;
    V acc[GRAD_FEW_INPUTS * 8];
    EACH_INPUT EACH_VECTOR(8) acc[j * 8 + n] = v_zero();
    for (int64_t r = r0; r < r1; r += 2) {
        const int64_t next = smaller(r + 1, r1 - 1); /* of one row, the factor is zero */
        const W one = LEVEL(words)(w, r, g), two = LEVEL(words)(w, next, g);
        prefetch(w->packed + (r + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
        prefetch(w->packed + (r + 1 + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
        V unit, scale[2];
        LEVEL(row_units)(w, r, 1, &unit);
        LEVEL(few_scales)(w, r, first, 1, &unit, &scale[0]);
        LEVEL(row_units)(w, next, 1, &unit);
        LEVEL(few_scales)(w, next, first, 1, &unit, &scale[1]);
        const V even = v_spread(scale[0], block), other = v_spread(scale[1], block);
        W factor[GRAD_FEW_INPUTS];
        EACH_INPUT {
            const uint16_t *pair = (const uint16_t *)(grad + j * grad_stride) + (r - r0);
            factor[j] = LEVEL(pairs)(v_mul(even, v_set1(bfloat_to_float(pair[0]))), v_mul(other, v_set1(bfloat_to_float(pair[1]))));
        }
        W halves[2] = {_mm512_mask_blend_epi16(odd, one, _mm512_slli_epi32(two, 16)),
                       _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(one, 16), two)};
        EACH_VECTOR(8) {
            const __m512bh level = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(halves[n / 4], 4 * (n % 4)), table);
            EACH_INPUT acc[j * 8 + n] = _mm512_dpbf16_ps(acc[j * 8 + n], level, (__m512bh)factor[j]);
        }
    }
    EACH_INPUT EACH_VECTOR(8) LEVEL(add_to)(sums + j * GROUP + n * LANES, acc[j * 8 + n]);
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
static void LEVEL(grad_group_low)(const struct job *job, const float *grad, int64_t stride, int64_t r0, int64_t r1, int64_t t0,
                                  int64_t g, const float *scales, float *tile, float *sums)
{
    const struct weight *w = job->weight;
    if (LEVEL(grad_few)(w, job->m1 - job->m0, 1)) {
#define CALL(M) LEVEL(accumulate_few_low)(w, grad + m * stride, stride, M, r0, r1, g, sums + m * GROUP)
        IN_PASSES(job->m1 - job->m0, GRAD_FEW_INPUTS, CALL)
#undef CALL
        return;
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
}
