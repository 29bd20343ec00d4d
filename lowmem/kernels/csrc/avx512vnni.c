/* The ISA avx512vnni: AVX-512 with products in 8-bit integers (vpdpbusd). */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX512,avx512vnni)
#include "avx512.h"

/* Products in 8-bit integers (inputs8.h): vpdpbusd adds four products of unsigned and signed bytes to each lane. */
#define INPUTS8_SHIFTS_CODES 1
#define IS_SHIFTED(w) 1
#define QUADS(is_shifted) 2
#define INPUTS8_INPUTS 12
struct steps {
    W bytes;
};
static inline struct steps steps_of(W bytes, const int is_shifted) { return (struct steps){bytes}; }
static inline __attribute__((always_inline)) W add_products(W sum, const struct steps *w, const W *x, const int n, const int is_shifted)
{
#pragma GCC unroll 4
    for (int k = 0; k < n; k++)
        sum = _mm512_dpbusd_epi32(sum, w[k].bytes, x[k]);
    return sum;
}
/* In assembly: in long loops GCC copies each sum around the intrinsic, which takes half of the time. */
#define OWN_SPREAD
static inline __attribute__((always_inline)) W add_spread(W sum, const struct steps *w, const float *x, int64_t next, const int n, const int is_shifted)
{
#pragma GCC unroll 4
    for (int k = 0; k < n; k++)
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w[k].bytes), "m"(x[k % 2 + k / 2 * next]));
    return sum;
}

#include "body.h"
#include "inputs8.h"

static const struct kernel kernels[] = {
    INPUTS8_KERNELS,
    {NULL},
};

const struct isa isa_avx512vnni = {.name = "avx512vnni", .lanes = LANES, .extends = &isa_avx512, .kernels = kernels, .inputs8_zero = 128};
END_TARGET
#endif
