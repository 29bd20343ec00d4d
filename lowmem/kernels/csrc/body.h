/* The kernels of one ISA, over the vector operations that the file that includes this has defined; rows.h lists them, and:
 *
 *   FEW_ROWS(M)    rows at a time with M inputs where these are few, at most 4, and 16 / M
 *   FUSED_BATCH    the largest batch that is multiplied with codes decoded in registers, FUSED_INPUTS at a time (FEW or less: none)
 *   MANY_VECTORS   vectors of rows that are dequantized together, at most MAX_VECTORS, and
 *   MANY_INPUTS    inputs at a time that are multiplied with them, at most 16
 *   GRAD_CODES, GRAD_SIXTEEN   the largest batches whose gradients decode codes, or widen 16-bit floats, in registers
 *   GRAD_VECTORS, TILE_VECTORS   vectors of columns at a time in the gradient, decoded in registers or in a tile:
 *                  divisors of 8
 *   ISA_BFLOAT16   whether it has products of bfloat16 vectors
 */
#ifndef ISA_BFLOAT16
#define ISA_BFLOAT16 0
#endif

#include "plan.h"
#include "rows.h"
#include "linear.h"
#include "gradient.h"
#include "quantize.h"

/* Scratch of kernels. */
#define IN_REGISTERS(bytes) .number = bytes, .whole = 1, .few = 1
#define IN_TILES(bytes) .number = bytes, .whole = 1, .own = SUMS_AT, .own_of_input = TILE_ROWS
#define OF_GRADIENT .number = 4, .whole = 1, .own = GRAD_ROWS * (2 * TILE_SCALES + MAX_GROUP), .own_of_input = GRAD_ROWS
