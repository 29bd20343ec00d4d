/* The ISA avx512vnni: AVX-512 with products in 8-bit integers (vpdpbusd). */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX512,avx512vnni)
#include "avx512.h"

#include "body.h"
#include "inputs8.h"

static const struct kernel kernels[] = {
    {"few_inputs8", LINEAR_INPUTS8, GROUPS, ANY_TYPE, 1, FEW_MORE, IN_REGISTERS(4), .pack = pack_few_inputs8, .multiply = few_inputs8_body},
    {"panels_inputs8", LINEAR_INPUTS8, GROUPS, ANY_TYPE, FEW_MORE + 1, ANY_ROWS, .number = 2, .whole = PANEL, .own = SUMS_AT,
     .own_of_input = INPUTS8_ROWS, .pack = pack_panels_inputs8, .multiply = panels_inputs8_body},
    {NULL},
};

const struct isa isa_avx512vnni = {.name = "avx512vnni", .lanes = LANES, .extends = &isa_avx512, .kernels = kernels};
END_TARGET
#endif
