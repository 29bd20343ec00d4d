/* Exponentials, and sums and maxima of a vector, for row-wise functions. */
#pragma once
#include "rows.h"

/* Loop over the vectors of a row of `columns` numbers: column c, of which n are left. */
#define EACH_VECTOR_OF_ROW(columns) for (int64_t c = 0, n; (n = (columns) - c) > 0; c += LANES)

/* Call a function with FLOAT32 or BFLOAT16 as its last argument, as a constant. */
#define OF_WIDE(type, f, ...) ((type) == FLOAT32 ? f(__VA_ARGS__, FLOAT32) : f(__VA_ARGS__, BFLOAT16))

/* Clamp to -88 and 88, between which e^x does not overflow; a NaN stays a NaN. */
INLINE V v_within(V x)
{
    const V most = v_set1(88.0f), least = v_set1(-88.0f);
    return v_where((I)(x > most), most, v_where((I)(x < least), least, x));
}

/* e^x = 2^n e^s with |s| <= log(2) / 2, by the polynomial of the Cephes library. x must be within -88 and 88. */
INLINE V v_exp(V x)
{
    static const float of[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f};
    const V shift = v_set1(0x1.8p23f + 127), t = v_fma(x, v_set1(1.44269504f), shift), n = v_sub(t, shift); /* t's low bits: n + 127 */
    const V s = v_fma(n, v_set1(2.12194440e-4f), v_fma(n, v_set1(-0.693359375f), x));
    V sum = v_set1(of[0]);
    for (int i = 1; i < 6; i++)
        sum = v_fma(sum, s, v_set1(of[i]));
    return v_mul(v_fma(sum, v_mul(s, s), v_add(s, v_set1(1.0f))), (V)((I)t << 23));
}

/* The larger one of each pair; a NaN in `a` is skipped. */
INLINE V v_larger(V a, V than) { return v_where((I)(a > than), a, than); }

INLINE float largest_of(V v)
{
    float some[LANES], top;
    v_store(some, v);
    top = some[0];
    for (int i = 1; i < LANES; i++)
        top = some[i] > top ? some[i] : top;
    return top;
}

/* e^x for x <= 0; zero below -87, so that no product has a subnormal factor. */
INLINE V v_exp_below(V x)
{
    return (V)((I)v_exp(v_within(x)) & ~(I)(x < v_set1(-87.0f)));
}
