/* float32 by products in bfloat16: a number is the sum of TERMS bfloat16 numbers of eight bits each, and of the products of
 * their terms those count that are not beyond the bits of float32 (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial
 * Intelligence Datatype For Higher-Precision Computations, arXiv 1904.06376). Term i is at most 2^(1 - 8 i) of the number,
 * so that products of terms i and j count where i + j < TERMS. A float16 number is the sum of two.
 *
 * That holds for what is finite, and where subnormal terms, which count as zeros, are small beside others: what is out of these
 * bounds is refused. */

#define LEAST_INPUT 0x1p-60f /* the least that the largest number of an input, in what is packed at a time, may be, unless it is zero, */
#define LEAST_SCALE 0x1p-32f /* a scale that is not zero (float16 steps of 8 bits end there), */
#define LEAST_BFLOAT 0x1p-40f /* and a weight */
#define LARGEST_TILED 0x1p60f

/* Whether weights are whole numbers of five bits times scales of eleven, which makes two terms: the step of the levels is for
 * the input, then. */
static int has_whole_levels(const struct weight *w) { return w->order && w->step && w->encoding == SCALES_FLOAT16; }

/* Terms of a weight, where an input has so many. */
static int weight_terms(const struct weight *w, int terms)
{
    return terms == 1 ? 1 : w->order ? TERMS - has_whole_levels(w) : w->encoding == FLOAT16 ? 2 : 1;
}

/* What weights are looked up in, and what an input is multiplied with for that. */
static V levels_of(const struct weight *w, int terms)
{
    return terms > 1 && has_whole_levels(w) ? v_add(_mm512_cvtepi32_ps(bytes_load(w->steps)), v_set1((float)w->base)) : v_load(w->levels);
}
static float input_factor(const struct weight *w, int terms) { return terms > 1 && has_whole_levels(w) ? w->step : 1.0f; }

INLINE V widened_words(__m256i words) { return v_of_words(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)); }

/* 32 numbers as terms, in their order. Each but the last is rounded, so that what it leaves has either sign. */
INLINE void split_line(V front, V back, const int terms, W *out)
{
    for (int t = 0; t < terms; t++) {
        const W words = (W)_mm512_cvtne2ps_pbh(back, front);
        out[t] = words;
        front = v_sub(front, widened_words(_mm512_castsi512_si256(words)));
        back = v_sub(back, widened_words(_mm512_extracti64x4_epi64(words, 1)));
    }
}

/* 32 numbers as terms, in pairs of one of `even` and one of `odd`. Each but the last is cut off, which takes half as long. */
INLINE void split_pairs(V even, V odd, const int terms, W *out)
{
    const W upper = _mm512_set1_epi32((int)0xffff0000);
    for (int t = 0; t < terms; t++) {
        const W low = words_of_v(even), high = words_of_v(odd);
        out[t] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, upper, 0xf8); /* a | b & c */
        even = v_sub(even, v_of_words(_mm512_and_si512(low, upper)));
        odd = v_sub(odd, v_of_words(_mm512_and_si512(high, upper)));
    }
}

/* Store such pairs, rounded to bfloat16 or as terms, `step` floats apart. */
INLINE void put_pairs(V even, V odd, const int terms, float *out, int64_t step)
{
    W words[TERMS];
    if (terms == 1)
        words[0] = LEVEL(pairs)(even, odd);
    else
        split_pairs(even, odd, terms, words);
    for (int t = 0; t < terms; t++)
        v_store(out + t * step, v_of_words(words[t]));
}

/* The largest bits of a magnitude so far. */
INLINE W larger(W most, V a)
{
    return _mm512_max_epi32(most, _mm512_and_si512(words_of_v(a), _mm512_set1_epi32(0x7fffffff)));
}

/* 32 numbers of an input from p on, of which `left` are there, times a factor, as terms; the largest bits of a magnitude so far. */
INLINE W load_terms(const float *p, int64_t left, V factor, W *out, W most)
{
    const uint8_t *bytes = (const uint8_t *)p;
    const V front = v_of_words(words_load(bytes, 4 * left)), back = v_of_words(words_load(bytes + 4 * LANES, 4 * (left - LANES)));
    split_line(v_mul(front, factor), v_mul(back, factor), TERMS, out);
    return larger(larger(most, front), back); /* the factor may make the least of them zeros */
}

/* Whether bits of magnitudes are zeros, or those of `least` to LARGEST_TILED. */
INLINE int are_within(W magnitude, float least)
{
    const W from = _mm512_set1_epi32((int)bits_of(least)), room = _mm512_set1_epi32((int)(bits_of(LARGEST_TILED) - bits_of(least)));
    return !_mm512_mask_cmpgt_epu32_mask(_mm512_test_epi32_mask(magnitude, magnitude), _mm512_sub_epi32(magnitude, from), room);
}

/* Whether inputs whose largest magnitudes have these bits may have terms, */
static int inputs_have_terms(W most) { return are_within(most, LEAST_INPUT); }

/* scales may, and 16-bit weights. */
INLINE int scales_have_terms(V a) { return are_within(larger(_mm512_setzero_si512(), a), LEAST_SCALE); }
INLINE int weights_have_terms(W words, const int type)
{
    const W magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7fff));
    if (type == FLOAT16)
        return !_mm512_cmpge_epi16_mask(magnitude, _mm512_set1_epi16(0x7c00));
    const int least = (int)(bits_of(LEAST_BFLOAT) >> 16), room = (int)(bits_of(LARGEST_TILED) >> 16) - least;
    return !_mm512_mask_cmpgt_epu16_mask(_mm512_test_epi16_mask(magnitude, magnitude),
                                         _mm512_sub_epi16(magnitude, _mm512_set1_epi16((short)least)), _mm512_set1_epi16((short)room));
}
