/* One level of the kernel, over the operations that the file that includes this has defined; rows.h lists them.
 *
 *   FEW_ROWS(M)    rows at a time with M inputs where these are few, at most 4, and 16 / M
 *   FUSED_BATCH    the largest batch that is multiplied with codes decoded in registers, FUSED_INPUTS at a time (FEW or less: none)
 *   MANY_VECTORS   vectors of rows that are restored together, at most MAX_VECTORS, and
 *   MANY_INPUTS    inputs at a time that are multiplied with them, at most 16
 *   GRAD_CODES, GRAD_SIXTEEN   the largest batches whose gradients decode codes, or widen 16-bit floats, in registers
 *   GRAD_VECTORS, TILE_VECTORS   vectors of columns at a time in the gradient, decoded in registers or in a tile:
 *                  divisors of 8
 */
#include "rows.h"
#include "linear.h"
#include "gradient.h"
#include "quantize.h"
