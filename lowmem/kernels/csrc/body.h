/* One level of the kernel, over the operations that the file that includes this has defined; rows.h lists them.
 *
 *   FEW_BATCH      the largest batch that is multiplied in registers, FEW inputs at a time
 *   FEW_ROWS(M)    rows at a time with M inputs there, at most 4
 *   MANY_ROWS      rows at a time of a tile, a divisor of TILE_ROWS
 *   GRAD_VECTORS, TILE_VECTORS   vectors of columns at a time in the gradient, decoded in registers or in a tile:
 *                  divisors of 8
 */
#include "rows.h"
#include "linear.h"
#include "gradient.h"
#include "quantize.h"
#include "update.h"
