/* The ISA avx512amx: AVX-512 with bfloat16 products by AMX, for all but small batches. */
#include "kernel.h"
#if HAS_AMX
#pragma GCC diagnostic ignored "-Wunused-function" /* functions of included files that only other ISAs use */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,avx512vnni,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,avx512vnni,amx-tile,amx-bf16")
#endif
#define ISA_BFLOAT16 1
#include "avx512.h"

#include "body.h"
#include "amx.h"
#include "amx_gradient.h"

#define BY_AMX .amx = 1, .number = 2, .whole = TILED_INPUTS, .own = TILED_OWN, .own_of_input = TILED_ROWS, .pack = pack_tiles, .multiply = tiles_body
#define GRADIENT_BY_AMX .amx = 1, .number = 2, .whole = TILED_INPUTS, .own = TILED_GRAD_OWN, .multiply = gradient_body

static const struct kernel kernels[] = {
    BY_TORCH,
    {"amx", LINEAR, WHOLE, 1 << BFLOAT16, TILED_FEW + 1, ANY_ROWS, BY_AMX},
    {"grad_amx", INPUT_GRAD, WHOLE, 1 << BFLOAT16, TILED_FEW + 1, ANY_ROWS, GRADIENT_BY_AMX},
    {NULL},
};

/* Small batches in bfloat16 are multiplied in float32, so this does not extend avx512bf16: processors with AMX take two cycles
 * for a vdpbf16ps, as long as for four FMA. */
const struct isa isa_avx512amx = {"avx512amx", LANES, &isa_avx512vnni, kernels, NULL, NULL, NULL, NULL};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_here;
#endif
