/* Products in bfloat16: pairs of products are summed in float32 (vdpbf16ps). */

/* Two vectors as bfloat16, lane by lane side by side. */
INLINE W LEVEL(pairs)(V even, V odd)
{
    const W halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                      4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(halves, (W)_mm512_cvtne2ps_pbh(odd, even));
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
INLINE void LEVEL(few_groups_low)(const struct weight *w, int64_t r, int64_t t0, int64_t t1, const int R, const int M,
                                  const float *scales, const float *x, V *sums)
{
    const int64_t row_bytes = w->row_bytes;
    const int32_t *first = w->order->first_block, *block = w->order->block + t0 * 4 * LANES;
    const uint8_t *p = w->packed + r * row_bytes + t0 * LANES * 4;
    const W table = LEVEL(table_low)(w->levels);
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = sums[AT];
    scales -= first[t0];
    for (int64_t g = t0; g < t1; g++, p += LANES * 4, x += M * (GROUP / 2), block += 4 * LANES) {
        const int64_t left = row_bytes - g * (LANES * 4);
        const float *scale_at = scales + first[g];
        EACH_ROW prefetch(p + (i + 8 * R) * row_bytes);
        W words[4];
        V sum[FEW_SUMS];
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
            const V scale = v_spread(scale_at + i * FEW_SCALES, block);
            EACH_INPUT acc[AT] = v_fma(sum[AT], scale, acc[AT]);
        }
    }
    EACH_ROW EACH_INPUT sums[AT] = acc[AT];
}

FEW_PRODUCT(few_low, few_groups_low, GROUP / 2)

/* Turn a panel of float32 into bfloat16: elements s and s + 1 of each input side by side. */
static void LEVEL(lower_panel)(float *panel, int64_t floats)
{
    for (int64_t s = 0; s < floats; s += 2) /* what is written has been read */
        _mm512_storeu_si512(panel + s / 2 * LANES, LEVEL(pairs)(v_load(panel + s * LANES), v_load(panel + (s + 1) * LANES)));
}

/* Groups g0 to g1 of a row as bfloat16, in the order of the words. */
static void LEVEL(decode_low)(const struct weight *w, int64_t row, int64_t g0, int64_t g1, float *scales, float *out)
{
    const struct order *order = w->order;
    const T table = table_load(w->levels);
    LEVEL(group_scales)(w, row, g0, g1, scales);
    for (int64_t g = g0; g < g1; g++, out += GROUP / 2) {
        const W words = LEVEL(words)(w, row, g);
        V scale = LEVEL(spread)(order, scales, g0, g, 0);
#pragma GCC unroll 4
        for (int k = 0; k < 8; k += 2) {
            if (k && !order->whole_words)
                scale = LEVEL(spread)(order, scales, g0, g, k / 2);
            const V low = v_mul(v_lookup(table, words, k), scale), high = v_mul(v_lookup(table, words, k + 1), scale);
            _mm512_storeu_si512(out + k * (LANES / 2), (W)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* R rows of a tile of pairs with N vectors of inputs. */
INLINE void LEVEL(multiply_low)(const float *tile, const int R, int64_t pairs, const float *x, int64_t panel, const int N,
                                float *sums, int64_t batch, const int first)
{
    V acc[TILE_ROWS][3];
    for (int i = 0; i < R; i++)
        for (int n = 0; n < N; n++)
            acc[i][n] = first ? v_zero() : v_load(sums + i * batch + n * LANES);
    for (int64_t s = 0; s < pairs; s++) {
        __m512bh value[3];
        for (int n = 0; n < N; n++)
            value[n] = (__m512bh)_mm512_loadu_si512(x + n * panel + s * LANES);
        for (int i = 0; i < R; i++) {
            const __m512bh weight = (__m512bh)v_set1(tile[i * (TILE_COLUMNS / 2) + s]);
            for (int n = 0; n < N; n++)
                acc[i][n] = _mm512_dpbf16_ps(acc[i][n], weight, value[n]);
        }
    }
    for (int i = 0; i < R; i++)
        for (int n = 0; n < N; n++)
            v_store(sums + i * batch + n * LANES, acc[i][n]);
}

MULTIPLY_TILE(multiply_tile_low, multiply_low, TILE_COLUMNS / 2)
