/* The registers of AMX, which are tiles (Intel's Software Developer's Manual, volume 1, chapter 18): 16 lines of 64 bytes. One
 * instruction multiplies a tile of 16 lines of 32 columns with one of 16 pairs of columns, each of 16 lines side by side, and adds
 * the 16 x 16 sums to a third. Four registers hold sums here: two tiles of inputs with two of the weight. */

/* No other level has any of this, so that names are plain. */
#define TILE_FLOATS (16 * LANES) /* of a register */
#define LINE TILED_LINE
#define LINES (GROUP / LINE)    /* of a group */
#define GROUP_FLOATS (LINES * 2 * TILE_FLOATS) /* of a group of dequantized rows */

_Static_assert(TILED_ROWS == MANY_ROWS && TILED_ROWS == 32, "two tiles, and as many as put_rows has");

/* GCC 12 does not know that tiles read and write memory. */
#define TILES_BARRIER __asm__ volatile("" ::: "memory")

/* All registers are whole: what is too much in them is not used. Who begins must end: other code has other shapes. */
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

/* Where tiles lie: the first, the second, and those of the next columns. */
struct tiles {
    const float *at;
    int64_t second, next; /* floats */
    int64_t line;         /* bytes from a line to the next */
};

/* Registers 0 to 3 += `count` products of tiles: 4 and 5 are two of the weight, 6 and 7 one or two (`both`) of the input.
 * `transposed`: the lines are those of the input, not of the weight. */
INLINE void add_products(const float *w, const float *x, struct tiles at_w, struct tiles at_x, int64_t count, const int transposed,
                         const int both)
{
#define ADD_PRODUCT(sum, w, x)           \
    if (transposed)                      \
        _tile_dpbf16ps(sum, x, w);       \
    else                                 \
        _tile_dpbf16ps(sum, w, x);
    for (; count; count--, w += at_w.next, x += at_x.next) {
        _tile_loadd(4, w, at_w.line);
        _tile_loadd(6, x, at_x.line);
        _tile_loadd(5, w + at_w.second, at_w.line);
        ADD_PRODUCT(0, 4, 6)
        ADD_PRODUCT(1, 5, 6)
        if (both) {
            _tile_loadd(7, x + at_x.second, at_x.line);
            ADD_PRODUCT(2, 4, 7)
            ADD_PRODUCT(3, 5, 7)
        }
    }
#undef ADD_PRODUCT
}

INLINE void store_sums(float *sums, int64_t second, const int both)
{
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_FLOATS, 64);
    if (both) {
        _tile_stored(2, sums + second, 64);
        _tile_stored(3, sums + second + TILE_FLOATS, 64);
    }
}

INLINE void zero_sums(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Sums of 16 inputs, or of 32 (`both`: `second` floats further), with two tiles of the weight += so many products of tiles.
 * `first`: they begin with zero. */
INLINE void multiply_tiles(struct tiles w, struct tiles x, int64_t count, const int transposed, const int both, int first,
                           float *sums, int64_t second)
{
    TILES_BARRIER;
    if (first) {
        zero_sums();
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE_FLOATS, 64);
        if (both) {
            _tile_loadd(2, sums + second, 64);
            _tile_loadd(3, sums + second + TILE_FLOATS, 64);
        }
    }
    add_products(w.at, x.at, w, x, count, transposed, both);
    store_sums(sums, second, both);
    TILES_BARRIER;
}
