/* A few inputs with levels on a grid: level[c] = step * (steps[c] + base), as int4's and fp4's are. Sums are taken in
 * integers (vpdpbusd), four products a lane, and are exact:
 *
 *   sum of level[c] x = step * unit * (sum of steps[c] v + base * sum of v),        x ~ unit * v
 *
 * where v is an integer of DIGITS signed bytes, and unit the largest magnitude of the GROUP columns over the most that v
 * can be: x is off by about 2^-24 of that magnitude, less than a sum in float32 loses. The sum of v is the input's alone,
 * and is taken once for all rows.
 *
 * A group of an input: DIGITS times the bytes of the low and of the high nibbles (64 and 64), base * sum of v for each
 * lane, and step * unit. It is as long as the GROUP floats that it is made from. */

#define DIGITS 3
#define GRID_SUMS (DIGITS * 2 * 16) /* in floats */
#define GRID_UNIT (GRID_SUMS + LANES)

/* Bytes of both halves of R rows, the highest digit first: sum = sum * 256 + products of the next digit. The rows take
 * turns: a row's sum is one long chain, and chains behind each other would fill what waits for operands. */
INLINE void LEVEL(digit_sums)(const W *lows, const W *highs, const float *group, const int R, W *sum)
{
    EACH_ROW sum[i] = _mm512_setzero_si512();
#pragma GCC unroll 3
    for (int d = DIGITS - 1; d >= 0; d--) {
        if (d < DIGITS - 1)
            EACH_ROW sum[i] = _mm512_slli_epi32(sum[i], 8);
        const W low = _mm512_loadu_si512(group + d * 32), high = _mm512_loadu_si512(group + d * 32 + 16);
        EACH_ROW sum[i] = _mm512_dpbusd_epi32(sum[i], lows[i], low);
        EACH_ROW sum[i] = _mm512_dpbusd_epi32(sum[i], highs[i], high);
    }
}

/* As few_groups. */
INLINE void LEVEL(few_groups_grid)(const struct weight *w, int64_t r, int64_t g, int64_t g1, const int R, const int M,
                                   const float *x, V *sums)
{
    const int64_t row_bytes = w->row_bytes, g0 = g;
    const int32_t *first = w->order->first_block, *block = w->order->block + g * 4 * LANES;
    const uint8_t *p = w->packed + r * row_bytes + g * LANES * 4;
    const uint8_t *soon = LEVEL(codes_soon)(w, r, g, R);
    V unit[4], stored[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int32_t from = -1;
    LEVEL(row_units)(w, r, R, unit);
    const W table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)w->steps)), nibble = _mm512_set1_epi8(15);
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (; g < g1; g++, p += LANES * 4, block += 4 * LANES, soon += LANES * 4 * R) {
        const int64_t left = row_bytes - g * (LANES * 4);
        const float *group = x + (g - g0) * M * GROUP; /* a part is a group */
        W words[4], lows[4], highs[4];
        V scale[4];
        if (first[g] != from)
            LEVEL(few_scales)(w, r, 1, from = first[g], R, unit, stored);
        EACH_ROW prefetch(soon + i * LANES * 4);
        if (left >= LANES * 4)
            EACH_ROW words[i] = words_load(p + i * row_bytes, LANES * 4);
        else
            EACH_ROW words[i] = words_load(p + i * row_bytes, left);
        EACH_ROW {
            lows[i] = _mm512_shuffle_epi8(table, _mm512_and_si512(words[i], nibble));
            highs[i] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(words[i], 4), nibble));
            scale[i] = v_spread(stored[i], block);
        }
        EACH_INPUT {
            const float *of = group + j * GROUP;
            W sum[4];
            LEVEL(digit_sums)(lows, highs, of, R, sum);
            const W based = _mm512_loadu_si512(of + GRID_SUMS);
            const V steps = v_set1(of[GRID_UNIT]);
            EACH_ROW {
                const V whole = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[i], based));
                acc[AT] = v_fma(v_mul(whole, steps), scale[i], acc[AT]);
            }
        }
    }
    EACH_ROW EACH_INPUT sums[AT] = acc[AT];
}

FEW_PRODUCT(few_grid, few_groups_grid, )

/* Turn a group of packed floats into digits, in place; 0 where they are so large, so small or so undefined that they stay. */
INLINE int LEVEL(to_digits)(const struct weight *w, float *group)
{
    const W magnitude = _mm512_set1_epi32(0x7fffffff);
    V x[8];
    W most = _mm512_setzero_si512(), value[8];
    for (int i = 0; i < 8; i++) {
        x[i] = v_load(group + i * LANES);
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude));
    }
    const float largest = float_of((uint32_t)_mm512_reduce_max_epi32(most));
    if (!(largest <= 0x1p100f && (largest >= 0x1p-90f || largest == 0.0f)))
        return 0;
    const float range = 0x7f7f00; /* below 127 in every digit, whatever rounds up */
    const V factor = v_set1(largest > 0.0f ? range / largest : 0.0f);
    for (int i = 0; i < 8; i++)
        value[i] = _mm512_cvtps_epi32(v_mul(x[i], factor));
    const W low_words = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const W high_words = _mm512_add_epi32(low_words, _mm512_set1_epi32(1));
    for (int d = 0; d < DIGITS; d++) {
        uint8_t bytes[GROUP];
        for (int i = 0; i < 8; i++) {
            codes_store(bytes + i * LANES, value[i]);
            const W digit = _mm512_srai_epi32(_mm512_slli_epi32(value[i], 24), 24);
            value[i] = _mm512_srai_epi32(_mm512_sub_epi32(value[i], digit), 8);
        }
        const W front = _mm512_loadu_si512(bytes), back = _mm512_loadu_si512(bytes + 64);
        _mm512_storeu_si512(group + d * 32, _mm512_permutex2var_epi32(front, low_words, back));
        _mm512_storeu_si512(group + d * 32 + 16, _mm512_permutex2var_epi32(front, high_words, back));
    }
    const W one = _mm512_set1_epi8(1);
    W sum;
    LEVEL(digit_sums)(&one, &one, group, 1, &sum);
    _mm512_storeu_si512(group + GRID_SUMS, _mm512_mullo_epi32(sum, _mm512_set1_epi32(w->base)));
    group[GRID_UNIT] = largest / range * w->step;
    return 1;
}

/* Pack a few inputs as digits, if they can be. */
static int LEVEL(pack_grid)(struct job *job)
{
    const int64_t batch = job->m1 - job->m0, floats = (job->g1 - job->g0) * GROUP;
    float scratch[LARGEST_BLOCK];
    if (job->low || !job->weight->step || !job->weight->order->whole_words)
        return 0; /* in bfloat16, decoding is as fast */
    for (int64_t m = job->m0; m < job->m1; m++)
        if (job->type == FLOAT32)
            LEVEL(pack_input)(job, m, scratch, FLOAT32, 0);
        else
            LEVEL(pack_input)(job, m, scratch, FLOAT16, 0);
    for (int64_t s = 0; s < floats; s += GROUP)
        for (int64_t m = 0; m < batch; m++) {
            float *group = job->packed + s * batch + m * GROUP;
            if (!LEVEL(to_digits)(job->weight, group))
                return 0;
        }
    return 1;
}
