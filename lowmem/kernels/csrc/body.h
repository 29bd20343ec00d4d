/* The kernels of one ISA. The file that includes this has defined the ISA's vector operations, which rows.h lists,
 * and these parameters:
 *
 *   FEW_ROWS(M)    rows that few.h multiplies at a time with M batch rows: at most 4, and at most 16 / M
 *   FUSED_BATCH    largest batch for fused.h; FEW if the ISA does not use it
 *   FUSED_INPUTS   batch rows that fused.h multiplies at a time
 *   MANY_VECTORS   vectors of rows in a tile of tiled.h, at most MAX_VECTORS
 *   MANY_INPUTS    batch rows that tiled.h multiplies with a tile at a time, at most 16
 *   GRAD_SIXTEEN   largest batch of grad @ W for which 16-bit weights are widened in registers
 *   TILE_VECTORS   vectors of columns that grad @ W multiplies at a time: a divisor of 8
 *   TORCH_FLOAT_ROWS  batch rows from which torch is faster in float32 with dequantized weights; undefined if it is not
 *   ISA_BFLOAT16   defined if the ISA multiplies bfloat16 vectors (vdpbf16ps) */
#pragma once
#pragma GCC diagnostic ignored "-Wunused-function" /* some functions are used only by other ISAs */
#include "few.h"
#include "fused.h"
#include "gradient.h"
#include "quantize.h"
#include "tiled.h"

/* Scratch fields of struct kernel: for kernels of few.h, many.h and gradient.h, in this order. */
#define IN_REGISTERS(bytes) .number = bytes, .whole = 1, .few = 1, .adds_offsets = 1
#define IN_TILES(bytes) .number = bytes, .whole = 1, .own = SUMS_AT, .own_of_input = TILE_ROWS
#define OF_GRADIENT .number = 4, .whole = 1, .own = GRAD_ROWS * (2 * TILE_SCALES + MAX_GROUP), .own_of_input = GRAD_ROWS
