/* Products in bfloat16: pairs of products are summed in float32 (vdpbf16ps). */

/* Two vectors as bfloat16, lane by lane side by side. */
INLINE W LEVEL(pairs)(V even, V odd)
{
    const W halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                      4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(halves, (W)_mm512_cvtne2ps_pbh(odd, even));
}

/* One pair in every lane. By an instruction for integers: that for floats slows vdpbf16ps down by a quarter on Zen 4. */
INLINE __m512bh LEVEL(pair_of)(const float *p)
{
    int32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* Turn packed float32 into bfloat16 in the order in which 16-bit words bring codes up: for a group, nibble 0 to 3 of
 * every 16-bit word, of which word 2 i + h is half h of the 32-bit word i. */
static void LEVEL(lower)(float *x, int64_t floats, int64_t batch)
{
    uint16_t *out = (uint16_t *)x; /* what is written has been read */
    for (int64_t g = 0; g < floats; g += GROUP, x += batch * GROUP, out += batch * GROUP) {
        W low[FEW][4];
        for (int64_t m = 0; m < batch; m++)
            for (int k = 0; k < 4; k++) {
                const V even = v_load(x + (k * batch + m) * LANES), odd = v_load(x + ((k + 4) * batch + m) * LANES);
                low[m][k] = LEVEL(pairs)(even, odd);
            }
        for (int64_t m = 0; m < batch; m++)
            for (int k = 0; k < 4; k++)
                _mm512_storeu_si512(out + (k * batch + m) * 32, low[m][k]);
    }
}

INLINE W LEVEL(table_low)(const float *levels)
{
    const V table = v_load(levels);
    return (W)_mm512_cvtne2ps_pbh(table, table); /* twice: the permute reads a bit above the nibble */
}

/* As few_groups: 32 levels are looked up at once. */
INLINE void LEVEL(few_groups_low)(const struct weight *w, int64_t r, int64_t g, int64_t g1, const int R, const int M,
                                  const float *x, V *sums)
{
    const int64_t row_bytes = w->row_bytes, ahead = 8 * R * w->row_bytes;
    const int32_t *first = w->order->first_block, *block = w->order->block + g * 4 * LANES;
    const uint8_t *p = w->packed + r * row_bytes + g * LANES * 4;
    const W table = LEVEL(table_low)(w->levels);
    V unit[4], stored[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int32_t from = -1;
    LEVEL(row_units)(w, r, 1, R, unit);
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (; g < g1; g++, p += LANES * 4, x += M * (GROUP / 2), block += 4 * LANES) {
        const int64_t left = row_bytes - g * (LANES * 4);
        EACH_ROW prefetch(p + ahead + i * row_bytes);
        W words[4];
        V sum[FEW_SUMS];
        if (first[g] != from)
            LEVEL(few_scales)(w, r, 1, from = first[g], R, unit, stored);
        if (left >= LANES * 4)
            EACH_ROW words[i] = words_load(p + i * row_bytes, LANES * 4);
        else
            EACH_ROW words[i] = words_load(p + i * row_bytes, left);
        EACH_ROW EACH_INPUT sum[AT] = v_zero();
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            W level[4];
            EACH_ROW level[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 4 * k), table);
            EACH_INPUT {
                const __m512bh value = (__m512bh)_mm512_loadu_si512(x + (k * M + j) * LANES);
                EACH_ROW sum[AT] = _mm512_dpbf16_ps(sum[AT], (__m512bh)level[i], value);
            }
        }
        EACH_ROW {
            const V scale = v_spread(stored[i], block);
            EACH_INPUT acc[AT] = v_fma(sum[AT], scale, acc[AT]);
        }
    }
    EACH_ROW EACH_INPUT sums[AT] = acc[AT];
}

FEW_PRODUCT(few_low, few_groups_low, )
