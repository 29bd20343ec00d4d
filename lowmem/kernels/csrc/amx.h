/* Products in bfloat16 by AMX (Intel's Software Developer's Manual, volume 1, chapter 18). A register of it is a tile, 16 lines
 * of 64 bytes. One instruction multiplies a tile of 16 lines of 32 columns with one of 16 pairs of columns, each of 16 lines
 * side by side, and adds the 16 x 16 sums to a third.
 *
 * Four registers hold sums: two tiles of inputs with two of the weight. In x @ W.T the lines are rows of the weight, restored
 * as they lie, and nothing is transposed but the input, once a call, and what comes out. In grad @ W (amx_gradient.h) the lines
 * are the gradient as it lies, and pairs of rows of the weight are restored side by side.
 *
 * What 16 weights of a block are, as bfloat16, is looked up in their levels times the scale. A lookup takes one of 32
 * numbers, so that a line may have two blocks: the bit above a code says which. */

/* No other level has any of this, so that names are plain. */
#define TILE_FLOATS (16 * LANES) /* of a register */
#define LINE 32                 /* columns */
#define LINES (GROUP / LINE)    /* of a group */
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

/* Sums of 16 inputs, or of 32 (`both`: `second` floats further), with two tiles of the weight += so many products of tiles.
 * `first`: they begin with zero. `transposed`: the lines are those of the inputs, not of the weight. */
INLINE void multiply_tiles(struct tiles w, struct tiles x, int64_t count, const int transposed, const int both, int first,
                           float *sums, int64_t second)
{
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
#define ADD_PRODUCT(sum, w, x)           \
    if (transposed)                      \
        _tile_dpbf16ps(sum, x, w);       \
    else                                 \
        _tile_dpbf16ps(sum, w, x);
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
#undef ADD_PRODUCT
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_FLOATS, 64);
    if (both) {
        _tile_stored(2, sums + second, 64);
        _tile_stored(3, sums + second + TILE_FLOATS, 64);
    }
    TILES_BARRIER;
}

/* How codes come into lines, whose 32 columns may be any, as long as those of the input are the same. */
enum kind {
    SIXTEEN, /* no codes: bfloat16 */
    EIGHTS,  /* blocks of 16 and 32: nibbles 0 to 3 of the eight 16-bit words of 16 bytes. All others: a nibble of all 32 */
    FOURS,   /* blocks of which a group has two at most: 64, 128 and more */
    WORDS,   /* other blocks of whole words, whose weights are scaled one by one, */
    APART    /* and blocks that are not */
};

static enum kind kind_of(const struct weight *w)
{
    if (!w->order)
        return SIXTEEN;
    if (!w->order->whole_words)
        return APART;
    return w->half == 8 || w->half == 16 ? EIGHTS : w->half == 32 || w->half >= 64 ? FOURS : WORDS;
}

/* Where a column comes up that the order of the words has at `place`: in which line, and where in it. */
INLINE int64_t line_of(int64_t place, enum kind kind)
{
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return place / GROUP * LINES + (kind == EIGHTS ? word / 4 : nibble % 4);
}
INLINE int64_t at_in_line(int64_t place, enum kind kind)
{
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return 2 * (kind == EIGHTS ? nibble % 4 * 4 + word % 4 : word) + nibble / 4;
}

/* Pack sixteen inputs, of which `inputs` are there, from m on: line by line, pairs of columns with all sixteen. */
static void pack_sixteen(const struct job *job, int64_t m, int64_t inputs, float *out)
{
    const struct weight *w = job->weight;
    const enum kind kind = kind_of(w);
    const int64_t columns = w->columns, before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP;
    const uint16_t *x = (const uint16_t *)job->x + m * columns;
    if (kind == SIXTEEN) {
        for (int64_t c = before; c < before + floats; c += LINE, out += TILE_FLOATS) {
            V v[LANES];
            EACH_LANE v[i] = v_of_words(words_load((const uint8_t *)(x + i * columns + c), i < inputs ? 2 * (columns - c) : 0));
            v_transpose(v);
            EACH_LANE v_store(out + i * LANES, v[i]);
        }
        return;
    }
    /* Four columns that lie in one word are two pairs: those of its even bytes, and those of its odd ones. */
    const W pairs = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
    const int64_t odd = kind == EIGHTS ? 8 * LANES : 2 * TILE_FLOATS; /* floats from the even to the odd ones */
    const int64_t size = 2 * w->half, left = columns % size, end = smaller(columns, before + floats + size);
    const int64_t by_fours = kind == APART ? 0 : left % 8 ? columns - left : columns, whole = smaller(end, by_fours) / LINE * LINE;
    int64_t c = before > size ? (before - size) / LINE * LINE : 0;
    if (whole < before + floats)
        memset(out, 0, (size_t)(floats / LINE * TILE_FLOATS) * sizeof *out);
    for (; c < whole; c += LINE) {
        V v[LANES];
        for (int i = 0; i < LANES; i++) {
            const W of = i < inputs ? _mm512_loadu_si512(x + i * columns + c) : _mm512_setzero_si512();
            v[i] = v_of_words(_mm512_shuffle_epi8(of, pairs));
        }
        v_transpose(v);
        for (int i = 0; i < 8; i++) {
            const int64_t place = w->order->place[c + 4 * i] - before;
            if (place < 0 || place >= floats)
                continue;
            float *at = out + line_of(place, kind) * TILE_FLOATS + at_in_line(place, kind) / 2 * LANES;
            v_store(at, v[2 * i]);
            v_store(at + odd, v[2 * i + 1]);
        }
    }
    for (; c < end; c++) {
        const int64_t place = w->order->place[c] - before;
        if (place < 0 || place >= floats)
            continue;
        const int64_t at = at_in_line(place, kind);
        uint16_t *pair = (uint16_t *)(out + line_of(place, kind) * TILE_FLOATS + at / 2 * LANES);
        for (int64_t i = 0; i < inputs; i++)
            pair[2 * i + at % 2] = x[i * columns + c];
    }
}

/* Pack a piece of the batch. */
static void pack_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t batch = job->m1 - job->m0, floats = (job->g1 - job->g0) * LINES * TILE_FLOATS;
    int64_t m, to;
    (void)thread;
    share(batch, TILED_INPUTS, parts, part, &m, &to);
    for (; m < to; m += TILED_INPUTS)
        pack_sixteen(job, job->m0 + m, smaller(TILED_INPUTS, batch - m), job->packed + m / TILED_INPUTS * floats);
}

/* The scales of TILED_ROWS rows from a block on, a vector a row; behind the last row they are its own. */
static void put_scales(const struct weight *w, int64_t r, int64_t first, float *out)
{
    const int64_t bytes = scale_bytes(w);
    const uint8_t *soon = w->scales + (r + TILED_ROWS) * bytes + first * bytes / w->blocks;
    V unit[4], scale[4];
    for (const int64_t end = r + TILED_ROWS; r < end; r += 4, soon += 4 * bytes, out += 4 * LANES) {
        if (r + 4 <= w->rows) {
            LEVEL(row_units)(w, r, 4, unit);
            LEVEL(few_scales)(w, r, 1, first, 4, unit, scale);
        } else
            for (int i = 0; i < 4; i++) {
                const int64_t row = smaller(r + i, w->rows - 1);
                LEVEL(row_units)(w, row, 1, unit);
                LEVEL(few_scales)(w, row, 1, first, 1, unit, scale + i);
            }
        for (int i = 0; i < 4; i++) {
            prefetch_far(soon + i * bytes);
            v_store(out + i * LANES, scale[i]);
        }
    }
}

/* Levels times two scales, as bfloat16, side by side. */
INLINE W two_tables(V levels, const float *one, const float *two)
{
    return (W)_mm512_cvtne2ps_pbh(v_mul(levels, v_set1(*two)), v_mul(levels, v_set1(*one)));
}

/* What 16-bit words, of which the lowest nibble counts, are in two tables; `second` has the bit that says in which. */
INLINE V look_up(W words, W nibble, W second, W tables)
{
    return v_of_words(_mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(words, nibble, second, 0xea), tables)); /* a & b | c */
}

/* Four rows of group g, of which the first is there: LANES floats a row and line, `scales` of block first_block[g] on. */
INLINE void restore_four(const struct weight *w, int64_t r, int64_t g, const enum kind kind, const float *scales, float *out)
{
    const int64_t left = w->row_bytes - g * LANES * 4, last = w->rows - 1 - r;
    const int32_t *block = w->order->block + g * 4 * LANES;
    const V levels = v_load(w->levels);
    W nibble = _mm512_set1_epi16(15), shifts = _mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0);
    W second = _mm512_set4_epi32(0x00100010, 0x00100010, 0, 0);
    if (kind == FOURS) {
        /* words behind the row have block 0: they must not be taken for those of a block that may not be there */
        const W is = _mm512_max_epi32(_mm512_sub_epi32(_mm512_loadu_si512(block), _mm512_set1_epi32(block[0])), _mm512_setzero_si512());
        second = _mm512_or_si512(_mm512_slli_epi32(is, 4), _mm512_slli_epi32(is, 20));
    }
    v_keep(nibble); /* the compiler would make them anew for every row */
    v_keep(shifts);
    v_keep(second);
    for (int i = 0; i < 4; i++, scales += LANES, out += LANES) {
        const uint8_t *p = w->packed + (r + smaller(i, last)) * w->row_bytes + g * LANES * 4;
        uint8_t padded[LANES * 4];
        prefetch_far(p + TILED_ROWS * w->row_bytes);
        if (kind == EIGHTS) {
            if (left < LANES * 4) {
                _mm512_storeu_si512(padded, words_load(p, left));
                p = padded;
            }
#pragma GCC unroll 4
            for (int k = 0; k < LINES; k++) { /* sixteen bytes, four times */
                const W codes = _mm512_srlv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p + k)), shifts);
                const W tables = two_tables(levels, scales + block[4 * k], scales + block[4 * k + 2]);
                v_store(out + 2 * k * TILE_FLOATS, look_up(codes, nibble, second, tables));
            }
            continue;
        }
        const W words = words_load(p, left);
        if (kind == FOURS) {
            const W tables = two_tables(levels, scales + block[0], scales + block[0] + 1);
#pragma GCC unroll 4
            for (int k = 0; k < LINES; k++)
                v_store(out + 2 * k * TILE_FLOATS, look_up(_mm512_srli_epi16(words, 4 * k), nibble, second, tables));
            continue;
        }
#pragma GCC unroll 4
        for (int k = 0; k < LINES; k++) {
            const int32_t *low = block + (kind == APART ? k / 2 : 0) * LANES, *high = low + (kind == APART ? 2 : 0) * LANES;
            const V scale = v_load(scales);
            const V even = v_mul(v_lookup(levels, words, k), v_spread(scale, low));
            const V odd = v_mul(v_lookup(levels, words, k + 4), v_spread(scale, high));
            v_store(out + 2 * k * TILE_FLOATS, (V)LEVEL(pairs)(even, odd));
        }
    }
}

/* The same of bfloat16 numbers. */
INLINE void copy_four(const struct weight *w, int64_t r, int64_t g, float *out)
{
    for (int64_t i = 0; i < 4; i++, out += LANES)
        for (int64_t k = 0, c = g * GROUP; k < LINES; k++, c += LINE) {
            const uint16_t *p = (const uint16_t *)w->packed + smaller(r + i, w->rows - 1) * w->columns + c;
            prefetch_far(p + TILED_ROWS * w->columns);
            v_store(out + 2 * k * TILE_FLOATS, v_of_words(words_load((const uint8_t *)p, 2 * (w->columns - c))));
        }
}

/* Restore TILED_ROWS rows of groups g to g1: two tiles a line. `scales` are those from block `from` on, or of other rows (-1). */
static void restore_tiles(const struct weight *w, int64_t r, int64_t g, int64_t g1, float *scales, int64_t *from, float *out)
{
    const enum kind kind = kind_of(w);
    for (; g < g1; g++, out += LINES * 2 * TILE_FLOATS) {
        if (w->order && w->order->first_block[g] != *from)
            put_scales(w, r, *from = w->order->first_block[g], scales);
        for (int row = 0; row < TILED_ROWS && r + row < w->rows; row += 4) {
            const float *of = scales + row * LANES;
            float *at = out + row * LANES;
            switch (kind) {
            case SIXTEEN: copy_four(w, r + row, g, at); break;
            case EIGHTS: restore_four(w, r + row, g, EIGHTS, of, at); break;
            case FOURS: restore_four(w, r + row, g, FOURS, of, at); break;
            case WORDS: restore_four(w, r + row, g, WORDS, of, at); break;
            case APART: restore_four(w, r + row, g, APART, of, at);
            }
        }
    }
}

/* Sums of rows r and on, of which `rows` are there, with inputs m and on of a piece, sixteen a row, to the output. */
static void put_tiles(const struct job *job, int64_t r, int64_t rows, int64_t m, const float *sums)
{
    struct job of = *job;
    float turned[TILED_INPUTS * TILED_ROWS];
    of.m0 = job->m0 + m;
    of.m1 = smaller(of.m0 + TILED_INPUTS, job->m1);
    for (int n = 0; n < TILED_ROWS; n += LANES) {
        V v[LANES];
        EACH_LANE v[i] = v_load(sums + (n + i) * LANES);
        v_transpose(v);
        EACH_LANE v_store(turned + i * TILED_ROWS + n, v[i]);
    }
    if (job->out_type != BFLOAT16 || rows < TILED_ROWS || job->g0) {
        LEVEL(put_rows)(&of, r, rows, MANY_VECTORS, turned);
        return;
    }
    float widened[TILED_ROWS] = {0};
    const float *bias = LEVEL(bias_of)(job, r, rows, widened);
    uint16_t *out = (uint16_t *)job->out + of.m0 * job->weight->rows + r;
    for (const float *sum = turned; of.m0 < of.m1; of.m0++, sum += TILED_ROWS, out += job->weight->rows) {
        const V front = v_add(v_load(sum), v_load(bias)), back = v_add(v_load(sum + LANES), v_load(bias + LANES));
        enum { SUBNORMAL = 0x20 };
        if (_mm512_fpclass_ps_mask(front, SUBNORMAL) | _mm512_fpclass_ps_mask(back, SUBNORMAL)) {
            v_to_bfloat(out, front);
            v_to_bfloat(out + LANES, back);
        } else {
            _mm512_storeu_si512(out, (W)_mm512_cvtne2ps_pbh(back, front)); /* takes subnormal numbers for zeros */
        }
    }
}

static void linear_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    float *scales = job->own + thread * job->own_floats, *restored = scales + TILED_ROWS * LANES;
    float *sums = job->own + thread * job->own_floats + TILED_OWN;
    const int64_t batch = job->m1 - job->m0, sixteen = (job->g1 - job->g0) * LINES * TILE_FLOATS;
    int64_t r, to;
    share(w->rows, TILED_ROWS, parts, part, &r, &to);
    if (r >= to)
        return;
    begin_tiles();
    for (; r < to; r += TILED_ROWS) {
        int64_t from = -1;
        for (int64_t g = job->g0, end; g < job->g1; g = end) {
            end = smaller(g + TILED_GROUPS, job->g1);
            restore_tiles(w, r, g, end, scales, &from, restored);
            const struct tiles rows = {restored, TILE_FLOATS, 2 * TILE_FLOATS, 64};
            struct tiles x = {job->packed + (g - job->g0) * LINES * TILE_FLOATS, sixteen, TILE_FLOATS, 64};
            for (int64_t m = 0; m < batch; m += 2 * TILED_INPUTS, x.at += 2 * sixteen)
                if (m + TILED_INPUTS < batch)
                    multiply_tiles(rows, x, (end - g) * LINES, 0, 1, g == job->g0, sums + m * TILED_ROWS, 2 * TILE_FLOATS);
                else
                    multiply_tiles(rows, x, (end - g) * LINES, 0, 0, g == job->g0, sums + m * TILED_ROWS, 0);
        }
        for (int64_t m = 0; m < batch; m += TILED_INPUTS)
            put_tiles(job, r, smaller(TILED_ROWS, to - r), m, sums + m * TILED_ROWS);
    }
    end_tiles();
}

static void linear(struct job *job)
{
    const int64_t groups = job->weight->stride / GROUP, wide = WIDE / GROUP;
    if (!job->tiles) {
        level_avx512bf16.linear(job);
        return;
    }
    for (job->m0 = 0; job->m0 < job->batch; job->m0 = job->m1) {
        job->m1 = smaller(job->m0 + job->piece, job->batch);
        for (job->g0 = 0; job->g0 < groups; job->g0 = job->g1) {
            job->g1 = smaller(job->g0 + wide, groups);
            parallel(job, pack_body, job->packed_step || job->batch <= TILED_INPUTS ? 0 : PARTS, linear_body, PARTS);
        }
    }
}
