/* Pairs of bfloat16 numbers: vdpbf16ps adds two products per lane to a float32 sum. */
#pragma once
#include "rows.h"

#if defined(ISA_BFLOAT16)
/* Two vectors rounded to bfloat16 and interleaved: even[0], odd[0], even[1], ... */
INLINE V pairs(V even, V odd)
{
    const W halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                      4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (V)_mm512_permutexvar_epi16(halves, (W)_mm512_cvtne2ps_pbh(odd, even));
}

/* spread_pair broadcasts a pair; multiply_pairs adds both products of each lane's pairs to a sum. */
#define spread_pair(p) ((V)word_of(p))
#define multiply_pairs(a, b, sum) ((V)_mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b)))

/* The levels as bfloat16, and the levels of nibbles k and k + 4 of each word. */
INLINE T table_bf16(const float *levels)
{
    const V table = v_load(levels);
    return (T)_mm512_cvtne2ps_pbh(table, table); /* repeated, since the permute reads five bits of an index */
}
#define pair_levels(table, words, k) ((V)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * (k)), (W)(table)))

/* Swap bytes 1 and 2 of each word: nibble k of its two 16-bit halves is then a pair of adjacent columns. */
#define adjacent(words) _mm512_shuffle_epi8(words, _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200))
#else /* substitutes, in code that no kernel of this ISA runs */
#define table_bf16 table_load
#define pair_levels v_lookup
#define spread_pair(p) v_set1(*(p))
#define multiply_pairs v_fma
#define pairs(even, odd) ((void)(odd), (even))
#define adjacent(words) (words)
#endif
