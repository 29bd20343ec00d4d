/* The tile registers of AMX (Intel's Software Developer's Manual, volume 1, chapter 18): 16 lines of 64 bytes. tdpbf16ps
 * multiplies 16 lines of 32 bfloat16 columns with 16 pairs of columns, each with 16 lines side by side, and adds 16 x 16
 * products to a third tile. */
#pragma once
#define ISA_BFLOAT16
#include "avx512.h"
#include "reading.h"

/* TILE_FLOATS: floats of a tile. LINE: bfloat16 columns of a line. */
#define TILE_FLOATS (16 * LANES)
#define LINE TILED_LINE
#define LINES (GROUP / LINE)    /* lines of a group */
#define GROUP_FLOATS (LINES * 2 * TILE_FLOATS) /* floats of a group of TILED_ROWS dequantized rows */

_Static_assert(TILED_ROWS == MANY_ROWS && TILED_ROWS == 32, "two tiles, and as many as put_rows has");

/* GCC 12 does not know that tile instructions read and write memory. */
#define TILES_BARRIER __asm__ volatile("" ::: "memory")

/* Configure all eight registers as whole tiles. Each begin_tiles needs an end_tiles: other code configures other shapes. */
static void begin_tiles(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t lines[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++)
        shape.bytes[i] = 64, shape.lines[i] = 16;
    TILES_BARRIER;
    _tile_loadconfig(&shape);
}

static void end_tiles(void) { _tile_release(); }

/* The memory of tiles: the first tile, the distance to the second, and the distance to the tiles of the next columns. */
struct tiles {
    const float *at;
    int64_t second, next; /* in floats */
    int64_t line;         /* bytes from a line to the next */
};

/* sums += two tiles of the weight times one or two (`both`) of x or grad, for `count` tiles of columns. The second sums are `second`
 * floats further. `transposed`: the lines of the sums are those of x or grad. `first`: sums start at zero. */
INLINE void multiply_tiles(struct tiles w, struct tiles x, int64_t count, const int transposed, const int both, int first,
                           float *sums, int64_t second)
{
#define ADD_PRODUCT(sum, w, x)           \
    if (transposed)                      \
        _tile_dpbf16ps(sum, x, w);       \
    else                                 \
        _tile_dpbf16ps(sum, w, x);
    TILES_BARRIER;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE_FLOATS, 64);
        if (both) {
            _tile_loadd(2, sums + second, 64);
            _tile_loadd(3, sums + second + TILE_FLOATS, 64);
        }
    }
    for (; count; count--, w.at += w.next, x.at += x.next) {
        _tile_loadd(4, w.at, w.line);
        _tile_loadd(6, x.at, x.line);
        _tile_loadd(5, w.at + w.second, w.line);
        ADD_PRODUCT(0, 4, 6)
        ADD_PRODUCT(1, 5, 6)
        if (both) {
            _tile_loadd(7, x.at + x.second, x.line);
            ADD_PRODUCT(2, 4, 7)
            ADD_PRODUCT(3, 5, 7)
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_FLOATS, 64);
    if (both) {
        _tile_stored(2, sums + second, 64);
        _tile_stored(3, sums + second + TILE_FLOATS, 64);
    }
    TILES_BARRIER;
#undef ADD_PRODUCT
}
