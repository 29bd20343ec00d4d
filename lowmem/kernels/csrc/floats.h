/* The table of kernels and the struct isa of an ISA whose products are all in float32. The file that includes this
 * has included the ISA's vector operations and defined ISA_NAME. */
#include "body.h"
#include "rowwise.h"

#define ISA_OF(name) isa_##name
#define THIS_ISA(name) ISA_OF(name)

static const struct kernel kernels[] = {
    {"few", LINEAR, WHOLE, ANY_TYPE, 1, FEW, IN_REGISTERS(4), .pack = pack_few, .multiply = few_body},
    {"few_sixteen", LINEAR, SIXTEEN, ANY_TYPE, 1, FEW_MORE, IN_REGISTERS(4), .pack = pack_few, .multiply = few_sixteen_body},
    {"few_eight", LINEAR, BYTES, ANY_TYPE, 1, FEW_MORE, IN_REGISTERS(4), .pack = pack_few, .multiply = few_eight_body},
    {"fused", LINEAR, WHOLE, ANY_TYPE, FEW + 1, FUSED_BATCH, IN_TILES(4), .pack = pack_many, .multiply = fused_body},
    {"tiled", LINEAR, WHOLE | SIXTEEN, ANY_TYPE, FEW + 1, ANY_ROWS, IN_TILES(4), .pack = pack_many, .multiply = tiled_body},
    {"grad_few_sixteen", INPUT_GRAD, SIXTEEN, ANY_TYPE, 1, GRAD_SIXTEEN, OF_GRADIENT, .few = 1, .multiply = grad_body},
    {"grad_tiled", INPUT_GRAD, WHOLE | SIXTEEN, ANY_TYPE, 1, ANY_ROWS, OF_GRADIENT, .multiply = grad_body},
    OTHERS_BY_TORCH,
    {NULL},
};

const struct isa THIS_ISA(ISA_NAME) = {
    TEXT(ISA_NAME), LANES, NULL, kernels, dequantize_body, narrow_body, wide_body, quantize, rowwise_body,
};
