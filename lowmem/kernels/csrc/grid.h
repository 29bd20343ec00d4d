/* A few inputs with levels on a grid: level[c] = step * (steps[c] + base), as int4's and fp4's are. Sums are taken in
 * integers (vpdpbusd), four products a lane, and are exact:
 *
 *   sum of level[c] x = step * unit * (sum of steps[c] v + base * sum of v),        x ~ unit * v
 *
 * where v is an integer of DIGITS signed bytes, and unit the largest magnitude of the GROUP columns over the most that v
 * can be: x is off by about 2^-24 of that magnitude, less than a sum in float32 loses. The sum of v is the input's alone,
 * and is taken once for all rows. Where levels are evenly spaced, steps are the codes, or twice the codes: these are
 * multiplied as they are then, and half of base * sum of v is rounded. With one such input the units are part of the scales. Its
 * bfloat16 numbers have two digits: they are off by 2^-16 of the largest of them, and those that share a vector, and so a block's
 * scale, in sum by at most 2^-9 of their sum, which is what rounding to bfloat16 may have lost. An input of which the largest is
 * more than eight times such a sum takes the other path. So does one of 16-bit floats that would have three digits, if it is 256
 * times that; and all of them, unless no level is zero and such vectors have one scale: what is large may meet weights that are zero.
 *
 * A group of an input: for each digit, the lowest first, the bytes of the low and of the high nibbles (64 and 64); base * sum of v
 * for each lane; and step * unit, or those of each of LANES blocks. It is as long as the GROUP floats that it is made from. */

enum grid { NO_GRID, STEPS, CODES, CODES_OF_ONE };

#define DIGITS 3
#define LOW_DIGITS 2
#define INT8_DIGITS 1 /* of int8.h */
#define GRID_SUMS (DIGITS * 2 * 16) /* in floats */
#define GRID_UNIT (GRID_SUMS + LANES)

/* sum + bytes * digits, for long loops: around the intrinsic GCC copies each sum there, and half of the time is lost. (In
 * digit_sums it does not, and assembly is slower.) */
INLINE W LEVEL(add_bytes)(W sum, W bytes, W digits)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(digits));
    return sum;
}

/* based + bytes of both halves of R rows with n digits: those of the lowest one for themselves, so that no chain is long. The
 * rows take turns: chains behind each other would fill what waits for operands. */
INLINE void LEVEL(digit_sums)(const W *lows, const W *highs, const float *group, W based, const int n, const int R, W *sum)
{
    W last[4];
    EACH_ROW sum[i] = _mm512_setzero_si512();
#pragma GCC unroll 3
    for (int d = n - 1; d >= 0; d--) {
        const W low = _mm512_loadu_si512(group + d * 32), high = _mm512_loadu_si512(group + d * 32 + 16);
        if (d && d < n - 1)
            EACH_ROW sum[i] = _mm512_slli_epi32(sum[i], 8);
        if (d) {
            EACH_ROW sum[i] = _mm512_dpbusd_epi32(sum[i], lows[i], low);
            EACH_ROW sum[i] = _mm512_dpbusd_epi32(sum[i], highs[i], high);
        } else {
            EACH_ROW last[i] = _mm512_dpbusd_epi32(based, lows[i], low);
            EACH_ROW last[i] = _mm512_dpbusd_epi32(last[i], highs[i], high);
        }
    }
    EACH_ROW sum[i] = _mm512_add_epi32(_mm512_slli_epi32(sum[i], 8), last[i]);
}

/* As few_groups. */
INLINE void LEVEL(few_groups_grid)(const struct weight *w, int64_t r, int64_t g, int64_t g1, const int R, const int M,
                                   const int grid, const int digits, const float *x, V *sums)
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
        const float *group = x + (g - g0) * M * GROUP;
        W words[4], lows[4], highs[4];
        V scale[4];
        if (first[g] != from) {
            LEVEL(few_scales)(w, r, 1, from = first[g], R, unit, stored);
            if (grid == CODES_OF_ONE)
                EACH_ROW stored[i] = v_mul(stored[i], v_load(group + GRID_UNIT));
        }
        EACH_ROW prefetch(soon + i * LANES * 4);
        LEVEL(few_words)(p, row_bytes, left, R, words);
        EACH_ROW {
            lows[i] = _mm512_and_si512(words[i], nibble);
            highs[i] = _mm512_and_si512(_mm512_srli_epi16(words[i], 4), nibble);
            if (grid == STEPS) {
                lows[i] = _mm512_shuffle_epi8(table, lows[i]);
                highs[i] = _mm512_shuffle_epi8(table, highs[i]);
            }
            scale[i] = v_spread(stored[i], block);
        }
        EACH_INPUT {
            const float *of = group + j * GROUP;
            W sum[4];
            LEVEL(digit_sums)(lows, highs, of, _mm512_loadu_si512(of + GRID_SUMS), digits, R, sum);
            const V steps = v_set1(of[GRID_UNIT]);
            EACH_ROW {
                const V whole = _mm512_cvtepi32_ps(sum[i]);
                acc[AT] = v_fma(grid == CODES_OF_ONE ? whole : v_mul(whole, steps), scale[i], acc[AT]);
            }
        }
    }
    EACH_ROW EACH_INPUT sums[AT] = acc[AT];
}

FEW_PRODUCT(few_steps, few_groups_grid, STEPS, DIGITS, )
FEW_PRODUCT(few_codes, few_groups_grid, CODES, DIGITS, )
FEW_PRODUCT(few_codes_of_one, few_groups_grid, CODES_OF_ONE, DIGITS, )
FEW_PRODUCT(few_codes_low, few_groups_grid, CODES_OF_ONE, LOW_DIGITS, )

/* Where to_digits has four columns of a group. */
INLINE W LEVEL(four_at)(W four)
{
    const W three = _mm512_set1_epi32(3);
    const W quarter = _mm512_and_si512(_mm512_srli_epi32(four, 2), three), in_quarter = _mm512_and_si512(four, three);
    return _mm512_or_si512(_mm512_and_si512(four, _mm512_set1_epi32(16)), _mm512_or_si512(_mm512_slli_epi32(in_quarter, 2), quarter));
}

/* Turn a group of an input into n digits; 0 where it stays: the largest is below `least`, too large or undefined, or more than
 * `beside` times what sixteen others are in sum, which would lose much (0: they may). `run` times four columns of low nibbles
 * come together, and then those of the high ones. */
INLINE int LEVEL(to_digits)(const struct weight *w, const V *x, const int run, float *group, const int n, const float least,
                            const float beside)
{
    const W magnitude = _mm512_set1_epi32(0x7fffffff);
    W most = _mm512_setzero_si512(), value[8];
    V size[8];
    for (int i = 0; i < 8; i++) {
        const W one = _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude);
        most = _mm512_max_epi32(most, one);
        size[i] = _mm512_castsi512_ps(one);
    }
    const float largest = float_of((uint32_t)_mm512_reduce_max_epi32(most));
    if (!(largest <= 0x1p100f && (largest >= least || largest == 0.0f)))
        return 0;
    if (beside > 0.0f) {
        float sums[8];
        v_sum4(size[0], size[1], size[2], size[3], sums);
        v_sum4(size[4], size[5], size[6], size[7], sums + 4);
        for (int i = 0; i < 8; i++)
            if (sums[i] > 0.0f && largest > beside * sums[i])
                return 0;
    }
    const float range = n == DIGITS ? 0x7f7f00 : n == LOW_DIGITS ? 0x7f00 : 0x7f; /* below 127 in every digit, whatever rounds up */
    const V factor = v_set1(largest > 0.0f ? range / largest : 0.0f);
    /* Bytes of a sum with `half` are digits, but for the sign; four columns, which are a quarter of a vector, come together. */
    const W half = _mm512_set1_epi32(n == DIGITS ? 0x808080 : n == LOW_DIGITS ? 0x8080 : 0x80);
    const W by_digits = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const W word = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const W fours = _mm512_add_epi32(word, _mm512_andnot_si512(_mm512_set1_epi32(run - 1), word)); /* of columns, of low nibbles */
    const W lows = LEVEL(four_at)(fours), highs = LEVEL(four_at)(_mm512_add_epi32(fours, _mm512_set1_epi32(run)));
    for (int i = 0; i < 8; i++) {
        const W v = _mm512_cvtps_epi32(v_mul(x[i], factor));
        value[i] = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(v, half), half), by_digits);
    }
    for (int d = 0; d < n; d++) {
        W of[2]; /* the digits of 64 columns, four of them together: of each quarter of these, the first, and so on */
        for (int i = 0; i < 2; i++) {
            const W *v = value + 4 * i;
            const W front = d < 2 ? _mm512_unpacklo_epi32(v[0], v[1]) : _mm512_unpackhi_epi32(v[0], v[1]);
            const W back = d < 2 ? _mm512_unpacklo_epi32(v[2], v[3]) : _mm512_unpackhi_epi32(v[2], v[3]);
            of[i] = d % 2 ? _mm512_unpackhi_epi64(front, back) : _mm512_unpacklo_epi64(front, back);
        }
        _mm512_storeu_si512(group + d * 32, _mm512_permutex2var_epi32(of[0], lows, of[1]));
        _mm512_storeu_si512(group + d * 32 + 16, _mm512_permutex2var_epi32(of[0], highs, of[1]));
    }
    const W one = _mm512_set1_epi8(1);
    W sum;
    LEVEL(digit_sums)(&one, &one, group, _mm512_setzero_si512(), n, 1, &sum);
    sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(w->base));
    _mm512_storeu_si512(group + GRID_SUMS, w->codes == 2 ? _mm512_srai_epi32(sum, 1) : sum);
    group[GRID_UNIT] = largest / range * w->step * (w->codes ? (float)w->codes : 1.0f);
    return 1;
}

/* The units of the one input that is packed, for each of the blocks whose scales are read with those of a group. */
static void LEVEL(spread_units)(const struct job *job)
{
    const int64_t blocks = GROUP / 2 / job->weight->half, groups = job->g1 - job->g0; /* blocks of a group */
    float units[WIDE / GROUP];
    for (int64_t g = 0; g < groups; g++)
        units[g] = job->packed[g * GROUP + GRID_UNIT];
    const int32_t *first = job->weight->order->first_block + job->g0;
    for (int64_t g = 0; g < groups; g++) {
        if (g && first[g] == first[g - 1])
            continue; /* no scales are read with it */
        int64_t of = first[g] / blocks - job->g0;
        for (int64_t i = 0; i < LANES; i += blocks, of++) {
            const V unit = v_set1(of >= 0 && of < groups ? units[of] : 0.0f);
            _mm512_mask_storeu_ps(job->packed + g * GROUP + GRID_UNIT, (__mmask16)(((1u << blocks) - 1) << i), unit);
        }
    }
}

/* Pack a few inputs as digits, if they can be; say how. */
static int LEVEL(pack_grid)(struct job *job)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, floats = (job->g1 - job->g0) * GROUP;
    const int one = job->batch == 1 && has_plain_codes(w, job->low);
    float scratch[LARGEST_BLOCK];
    if (!w->step || !w->order->whole_words || (job->low && !one) || (job->type != FLOAT32 && !has_plain_codes(w, 1)))
        return NO_GRID;
    const int whole = has_whole_groups(w) && w->columns % GROUP == 0; /* read where they lie */
    for (int64_t m = job->m0; m < job->m1 && !whole; m++)
        LEVEL(pack_typed)(job, m, scratch);
    for (int64_t s = 0; s < floats; s += GROUP)
        for (int64_t m = 0; m < batch; m++) {
            float *group = job->packed + s * batch + m * GROUP;
            const int64_t from = (job->m0 + m) * w->columns + job->g0 * GROUP + s;
            V x[8];
            EACH_VECTOR(8) x[n] = whole ? LEVEL(load_as)(job->x, job->type, from + n * LANES) : v_load(group + n * LANES);
            const int run = whole ? (int)w->half / 4 : 1;
            if (!(job->low ? LEVEL(to_digits)(w, x, run, group, LOW_DIGITS, 0x1p-60f, 8.0f)
                           : LEVEL(to_digits)(w, x, run, group, DIGITS, one ? 0x1p-60f : 0x1p-90f, job->type == FLOAT32 ? 0.0f : 256.0f)))
                return NO_GRID;
        }
    if (one)
        LEVEL(spread_units)(job);
    return one ? CODES_OF_ONE : w->codes ? CODES : STEPS;
}
