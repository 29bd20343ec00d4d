/* The ISA avx512amx: AVX-512 with bfloat16 products by AMX, for all but small batches. */
#include "kernel.h"
#if HAS_AMX
TARGET(AVX512,avx512vnni,avx512bf16,amx-tile,amx-bf16)
#define ISA_BFLOAT16
#include "avx512.h"

#include "body.h"
#include "amx.h"
#include "amx_gradient.h"

#define BY_AMX .amx = 1, .number = 2, .whole = TILED_INPUTS, .own = TILED_OWN, .own_of_input = TILED_ROWS, .pack = pack_tiles, .multiply = tiles_body
#define GRADIENT_BY_AMX .amx = 1, .number = 2, .whole = TILED_INPUTS, .own = TILED_GRAD_OWN, .multiply = gradient_body

static const struct kernel kernels[] = {
    BY_TORCH,
    {"amx", LINEAR, GROUPS, 1 << BFLOAT16, TILED_FEW + 1, TORCH_ROWS - 1, BY_AMX},
    {"grad_amx", INPUT_GRAD, GROUPS, 1 << BFLOAT16, TILED_FEW + 1, TORCH_GRAD_ROWS - 1, GRADIENT_BY_AMX},
    {NULL},
};

/* This does not extend avx512bf16: with AMX, processors take two cycles for a vdpbf16ps, as long as for four FMA. */
const struct isa isa_avx512amx = {.name = "avx512amx", .lanes = LANES, .extends = &isa_avx512vnni, .kernels = kernels, .inputs8_zero = 128};
END_TARGET
#endif
