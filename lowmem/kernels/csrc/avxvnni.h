/* The ISA avxvnni: AVX2 with products in 8-bit integers of 256 bits (vpdpbusd). The file that includes this names the ISA's features
 * and its struct isa, and defines add_bytes(sum, unsigned bytes, signed bytes) in their encoding. */
#pragma once
#include "avx2.h"
#ifndef add_bytes /* where this header is read on its own */
#define add_bytes _mm256_dpbusd_epi32
#endif
#define INPUTS8_SHIFTS_CODES 1
#define IS_SHIFTED(w) 1
#define QUADS(is_shifted) 2
#define INPUTS8_INPUTS 6
struct steps {
    W bytes;
};
static inline struct steps steps_of(W bytes, const int is_shifted) { return (struct steps){bytes}; }
static inline __attribute__((always_inline)) W add_products(W sum, const struct steps *w, const W *x, const int n, const int is_shifted)
{
#pragma GCC unroll 4
    for (int k = 0; k < n; k++)
        sum = add_bytes(sum, w[k].bytes, x[k]);
    return sum;
}

#include "body.h"
#include "inputs8.h"

static const struct kernel kernels[] = {
    INPUTS8_KERNELS,
    {NULL},
};
