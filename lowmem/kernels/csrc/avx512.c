/* The ISA avx512: kernels in float32. */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX512)
#include "avx512.h"
/* Products in 8-bit integers (inputs8.h), as avx2.c has them. */
#define INPUTS8_SHIFTED 16
#define INPUTS8_SHIFTS_CODES 0
#define IS_SHIFTED(w) ((w)->inputs8_zero != 0)
#define QUADS(is_shifted) ((is_shifted) ? 4 : 2)
#define INPUTS8_INPUTS 10
struct steps {
    W bytes, magnitude;
};
static inline struct steps steps_of(W bytes, const int is_shifted)
{
    return (struct steps){bytes, is_shifted ? bytes : _mm512_abs_epi8(bytes)};
}
static inline __attribute__((always_inline)) W add_products(W sum, const struct steps *w, const W *x, const int n, const int is_shifted)
{
    const W one = _mm512_set1_epi16(1);
    if (is_shifted) {
        W pairs = _mm512_maddubs_epi16(w[0].bytes, x[0]);
#pragma GCC unroll 4
        for (int k = 1; k < n; k++)
            pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(w[k].bytes, x[k]));
        return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, one));
    }
#pragma GCC unroll 4
    for (int k = 0; k < n; k++) {
        const W with_sign = _mm512_mask_sub_epi8(x[k], _mm512_movepi8_mask(w[k].bytes), _mm512_setzero_si512(), x[k]);
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w[k].magnitude, with_sign), one));
    }
    return sum;
}

#include "floats.h"

const struct isa isa_avx512 = FLOAT_ISA("avx512");
END_TARGET
#endif
