/* AVX2. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LEVEL(level_name) avx2_##level_name
#include "avx2.h"

const struct level level_avx2 = {
    "avx2", LANES, NONE_LOW, 0, avx2_linear, NULL, avx2_input_grad, avx2_restore, avx2_update, avx2_quantize,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
