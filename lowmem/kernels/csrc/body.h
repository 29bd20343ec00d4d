/* The kernels of one ISA. The file that includes this has defined the ISA's vector operations, which rows.h lists, and these
 * parameters:
 *
 *   FEW_ROWS(M)    rows that are multiplied at a time with M batch rows in linear.h: at most 4, and at most 16 / M
 *   FUSED_BATCH    largest batch of fused.h, which decodes codes in registers for
 *   FUSED_INPUTS   batch rows at a time (FUSED_BATCH of FEW or less: not used)
 *   MANY_VECTORS   vectors of rows in a tile of tiled.h, at most MAX_VECTORS, which is multiplied with
 *   MANY_INPUTS    batch rows at a time, at most 16
 *   GRAD_SIXTEEN   largest batch of grad @ W for which 16-bit weights are widened in registers
 *   TILE_VECTORS   vectors of columns at a time in grad @ W: a divisor of 8
 *   ISA_BFLOAT16   whether the ISA multiplies bfloat16 vectors (vdpbf16ps) */
#pragma GCC diagnostic ignored "-Wunused-function" /* functions that only other ISAs use */
#ifndef ISA_BFLOAT16
#define ISA_BFLOAT16 0
#endif

#include "plan.h"
#include "rows.h"
#include "linear.h"
#include "gradient.h"
#include "quantize.h"

/* Scratch fields of struct kernel, for kernels of linear.h, of many.h and of gradient.h. */
#define IN_REGISTERS(bytes) .number = bytes, .whole = 1, .few = 1
#define IN_TILES(bytes) .number = bytes, .whole = 1, .own = SUMS_AT, .own_of_input = TILE_ROWS
#define OF_GRADIENT .number = 4, .whole = 1, .own = GRAD_ROWS * (2 * TILE_SCALES + MAX_GROUP), .own_of_input = GRAD_ROWS
