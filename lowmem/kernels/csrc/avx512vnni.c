/* AVX-512 with products in 8-bit integers. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni")
#endif
#define LEVEL(level_name) avx512vnni_##level_name
#define LEVEL_GRID 1
#include "avx512.h"

LEVEL_OF(avx512vnni, CODES_LOW, avx512vnni_linear_int8);
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
