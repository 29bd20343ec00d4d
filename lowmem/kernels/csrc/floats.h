/* The kernels of an ISA whose products are all in float32, and its struct isa; its vector operations are included before. */
#pragma once
#include "attention.h"
#include "body.h"
#include "columns.h"
#include "entropy.h"
#include "gated.h"
#ifdef QUADS
#include "inputs8.h"
#endif
#include "norm.h"
#include "saved8.h"
#include "steps.h"

/* From TORCH_FLOAT_ROWS batch rows on, float32 products are faster in torch, where an ISA defines it. */
#ifdef TORCH_FLOAT_ROWS
#define TILED_TYPES (1 << BFLOAT16 | 1 << FLOAT16)
#else
#define TILED_TYPES ANY_TYPE
#endif

static const struct kernel kernels[] = {
#ifdef QUADS
    INPUTS8_KERNELS,
#endif
#ifdef TORCH_FLOAT_ROWS
    {"torch", LINEAR, WHOLE | WEIGHTS8, 1 << FLOAT32, TORCH_FLOAT_ROWS, ANY_ROWS},
    {"grad_torch", INPUT_GRAD, WHOLE | WEIGHTS8, 1 << FLOAT32, TORCH_FLOAT_ROWS, ANY_ROWS},
    {"tiled", LINEAR, WHOLE, 1 << FLOAT32, FUSED_BATCH + 1, TORCH_FLOAT_ROWS - 1, IN_TILES(4), .pack = pack_many,
     .multiply = tiled_body},
    {"tiled", LINEAR, WEIGHTS8, 1 << FLOAT32, FEW_MORE + 1, TORCH_FLOAT_ROWS - 1, IN_TILES(4), .pack = pack_many, .multiply = tiled_body},
    {"grad_tiled", INPUT_GRAD, WHOLE | WEIGHTS8, 1 << FLOAT32, 1, TORCH_FLOAT_ROWS - 1, OF_GRADIENT, .multiply = grad_body},
#endif
#ifdef FEW_INT16
    {"few_int16", LINEAR, GROUPS | WEIGHTS8, 1 << BFLOAT16, 1, FEW_INT16, IN_REGISTERS(3), .pack = pack_panels_int16, .multiply = int16_body},
    {"int16", LINEAR, GROUPS | WEIGHTS8, 1 << BFLOAT16, FEW_INT16 + 1, ANY_ROWS, .number = 3, .whole = FEW_MORE, .adds_offsets = 1,
     .pack = pack_panels_int16, .multiply = int16_body},
#endif
    {"few", LINEAR, WHOLE, ANY_TYPE, 1, FEW, IN_REGISTERS(4), .pack = pack_few, .multiply = few_body},
    {"few_sixteen", LINEAR, SIXTEEN, ANY_TYPE, 1, FEW_MORE, IN_REGISTERS(4), .pack = pack_few, .multiply = few_sixteen_body},
    {"few_weights8", LINEAR, WEIGHTS8, ANY_TYPE, 1, FEW_MORE, IN_REGISTERS(4), .pack = pack_few, .multiply = few_weights8_body},
#if FUSED_BATCH > FEW
    {"fused", LINEAR, WHOLE, ANY_TYPE, FEW + 1, FUSED_BATCH, IN_TILES(4), .pack = pack_many, .multiply = fused_body},
#endif
    {"tiled", LINEAR, WHOLE, TILED_TYPES, FUSED_BATCH + 1, ANY_ROWS, IN_TILES(4), .pack = pack_many, .multiply = tiled_body},
    {"tiled", LINEAR, WEIGHTS8, TILED_TYPES, FEW_MORE + 1, ANY_ROWS, IN_TILES(4), .pack = pack_many, .multiply = tiled_body},
    {"tiled", LINEAR, SIXTEEN, ANY_TYPE, FEW_MORE + 1, ANY_ROWS, IN_TILES(4), .pack = pack_many, .multiply = tiled_body},
    {"grad_few_sixteen", INPUT_GRAD, SIXTEEN, ANY_TYPE, 1, GRAD_SIXTEEN, OF_GRADIENT, .few = 1, .multiply = grad_body},
    {"grad_tiled", INPUT_GRAD, SIXTEEN, ANY_TYPE, GRAD_SIXTEEN + 1, ANY_ROWS, OF_GRADIENT, .multiply = grad_body},
    {"grad_tiled", INPUT_GRAD, WHOLE | WEIGHTS8, TILED_TYPES, 1, ANY_ROWS, OF_GRADIENT, .multiply = grad_body},
    OTHERS_BY_TORCH,
    {NULL},
};

#define FLOAT_ISA(isa_name)                                                                                         \
    {                                                                                                               \
        .name = isa_name, .lanes = LANES, .kernels = kernels, .dequantize = dequantize_body, .narrow = narrow_body, \
        .widen = wide_body, .quantize = quantize_body,                                                              \
        .inputs8_zero = 0, .inputs8_shifted = INPUTS8_SHIFTED,                                                                              \
        .rows = {norm_body, gated_body, entropy_body, encode8_body, decode8_body, round_columns_body, attention_body, \
                 encode_states_body, add_body, rotate_body, compare_body, dense_product_body},                                              \
    }
