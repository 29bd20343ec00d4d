/* The ISA avx512bf16: AVX-512 with bfloat16 products (vdpbf16ps), in addition to the 8-bit ones of avx512vnni. */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX512,avx512vnni,avx512bf16)
#define ISA_BFLOAT16
#include "avx512.h"

#include "body.h"
#include "few_bf16.h"

static const struct kernel kernels[] = {
    BY_TORCH,
    {"few_bf16", LINEAR, WHOLE, 1 << BFLOAT16, 1, FEW_MORE, IN_REGISTERS(2), .pack = pack_few_bf16, .multiply = few_bf16_body},
    {"fused_bf16", LINEAR, WHOLE, 1 << BFLOAT16, FEW_MORE + 1, FUSED_BATCH, IN_TILES(2), .pack = pack_many_bf16,
     .multiply = fused_bf16_body},
    {"tiled_bf16", LINEAR, WHOLE, 1 << BFLOAT16, FUSED_BATCH + 1, TORCH_ROWS - 1, IN_TILES(2), .pack = pack_many_bf16,
     .multiply = tiled_bf16_body},
    {"grad_tiled_bf16", INPUT_GRAD, GROUPS, 1 << BFLOAT16, 1, TORCH_GRAD_ROWS - 1, OF_GRADIENT, .multiply = grad_bf16_body},
    {"grad_tiled_bf16", INPUT_GRAD, WORDS, 1 << BFLOAT16, 1, ANY_ROWS, OF_GRADIENT, .multiply = grad_bf16_body},
    {NULL},
};

const struct isa isa_avx512bf16 = {.name = "avx512bf16", .lanes = LANES, .extends = &isa_avx512vnni, .kernels = kernels, .inputs8_zero = 128};
END_TARGET
#endif
