/* AVX-512 with products in bfloat16 by AMX, of all but a few inputs: those vectors multiply in float32 or in integers,
 * since vdpbf16ps takes two cycles where there is AMX. avx512bf16.c has the rest. */
#include "kernel.h"
#if HAS_AMX
#pragma GCC diagnostic ignored "-Wunused-function" /* what is included and serves other levels */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,avx512vnni,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,avx512vnni,amx-tile,amx-bf16")
#endif
#define LEVEL(level_name) avx512amx_##level_name
#define LEVEL_LOW 1
#define LEVEL_GRID 1
#include "avx512.h"

static void linear_int8(struct job *job) { level_avx512bf16.linear_int8(job); }
static void restore(struct job *job) { level_avx512bf16.restore(job); }
static void update(struct job *job) { level_avx512bf16.update(job); }
static int quantize(const struct quantizing *q, int64_t from, int64_t to, uint8_t *own)
{
    return level_avx512bf16.quantize(q, from, to, own);
}

#include "amx.h"
#include "amx_gradient.h"

const struct level level_avx512amx = {"avx512amx", LANES, CODES_LOW, 1, linear, linear_int8, input_grad, restore, update, quantize};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
