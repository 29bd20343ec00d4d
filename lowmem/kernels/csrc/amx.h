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
#define LINE TILED_LINE
#define LINES (GROUP / LINE)    /* of a group */
#define TERM (LINES * 2 * TILE_FLOATS) /* floats of a group of restored rows: terms lie behind each other */
#include "terms.h"

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

/* Where tiles lie: the first, the second, those of the next columns, and those of the next term. */
struct tiles {
    const float *at;
    int64_t second, next, term; /* floats */
    int64_t line;               /* bytes from a line to the next */
    int terms;
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

/* The same for the products of terms that count, the smallest first: sums of the largest are rounded as if there were no others.
 * What `count` products make is summed before it is added to the rest, so that long sums lose less. */
INLINE void multiply_terms(struct tiles w, struct tiles x, int64_t count, const int transposed, const int both, int first,
                           float *sums, int64_t second)
{
    float made[4 * TILE_FLOATS];
    TILES_BARRIER;
    zero_sums();
    for (int i = x.terms - 1; i >= 0; i--)
        for (int j = (int)smaller(x.terms - i, w.terms) - 1; j >= 0; j--)
            add_products(w.at + j * w.term, x.at + i * x.term, w, x, count, transposed, both);
    if (first) {
        store_sums(sums, second, both);
        TILES_BARRIER;
        return;
    }
    store_sums(made, 2 * TILE_FLOATS, both);
    TILES_BARRIER;
    for (int64_t i = 0; i < 2 * TILE_FLOATS; i += LANES) {
        v_store(sums + i, v_add(v_load(sums + i), v_load(made + i)));
        if (both)
            v_store(sums + second + i, v_add(v_load(sums + second + i), v_load(made + 2 * TILE_FLOATS + i)));
    }
}

/* How codes come into lines, whose 32 columns may be any, as long as those of the input are the same. */
enum kind {
    SIXTEEN, /* no codes: 16-bit floats */
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

/* Columns c and on of an input as words, as many of LINE as are there: as they are, or as terms, `step` vectors apart. */
INLINE void load_line(const struct job *job, int64_t m, int64_t c, V factor, const int terms, W *out, int64_t step, W *most)
{
    const int64_t left = job->weight->columns - c, at = m * job->weight->columns + c;
    if (terms == 1) {
        *out = words_load((const uint8_t *)((const uint16_t *)job->x + at), 2 * left);
        return;
    }
    *most = load_terms((const float *)job->x + at, left, factor, terms, out, step, *most);
}

/* Pack sixteen inputs, of which `inputs` are there, from m on: line by line, pairs of columns with all sixteen. */
INLINE void pack_sixteen(const struct job *job, int64_t m, int64_t inputs, float *out, const int terms)
{
    const struct weight *w = job->weight;
    const enum kind kind = kind_of(w);
    const int64_t columns = w->columns, before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP;
    const int64_t term = floats / LINE * TILE_FLOATS;
    const V factor = v_set1(input_factor(w, terms));
    W words[TERMS * LANES], most[LANES];
    for (int i = 0; i < LANES; i++)
        most[i] = _mm512_setzero_si512();
    for (int i = 0; i < TERMS * LANES; i++)
        words[i] = _mm512_setzero_si512();
    if (kind == SIXTEEN) {
        for (int64_t c = before; c < before + floats; c += LINE, out += TILE_FLOATS) {
            for (int64_t i = 0; i < inputs; i++)
                load_line(job, m + i, c, factor, terms, words + i, LANES, most + i);
            for (int t = 0; t < terms; t++) {
                V v[LANES];
                EACH_LANE v[i] = v_of_words(words[t * LANES + i]);
                v_transpose(v);
                EACH_LANE v_store(out + t * term + i * LANES, v[i]);
            }
        }
    } else {
        /* Four columns that lie in one word are two pairs: those of its even bytes, and those of its odd ones. */
        const W pairs = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
        const int64_t odd = kind == EIGHTS ? 8 * LANES : 2 * TILE_FLOATS; /* floats from the even to the odd ones */
        const int64_t size = 2 * w->half, left = columns % size, end = smaller(columns, before + floats + size);
        const int64_t by_fours = kind == APART ? 0 : left % 8 ? columns - left : columns, whole = smaller(end, by_fours) / LINE * LINE;
        int64_t c = before > size ? (before - size) / LINE * LINE : 0;
        if (whole < before + floats)
            memset(out, 0, (size_t)(terms * term) * sizeof *out);
        for (; c < whole; c += LINE) {
            for (int64_t i = 0; i < inputs; i++)
                load_line(job, m + i, c, factor, terms, words + i, LANES, most + i);
            for (int t = 0; t < terms; t++) {
                V v[LANES];
                EACH_LANE v[i] = v_of_words(_mm512_shuffle_epi8(words[t * LANES + i], pairs));
                v_transpose(v);
                for (int i = 0; i < 8; i++) {
                    const int64_t place = w->order->place[c + 4 * i] - before;
                    if (place < 0 || place >= floats)
                        continue;
                    float *at = out + t * term + line_of(place, kind) * TILE_FLOATS + at_in_line(place, kind) / 2 * LANES;
                    v_store(at, v[2 * i]);
                    v_store(at + odd, v[2 * i + 1]);
                }
            }
        }
        for (; c < end; c++) {
            const int64_t place = w->order->place[c] - before;
            if (place < 0 || place >= floats)
                continue;
            const int64_t at = at_in_line(place, kind);
            uint16_t *pair = (uint16_t *)(out + line_of(place, kind) * TILE_FLOATS + at / 2 * LANES) + at % 2;
            for (int64_t i = 0; i < inputs; i++) {
                if (terms == 1) {
                    pair[2 * i] = ((const uint16_t *)job->x)[(m + i) * columns + c];
                    continue;
                }
                float value = ((const float *)job->x)[(m + i) * columns + c] * input_factor(w, terms);
                most[i] = larger(most[i], v_set1(value));
                for (int t = 0; t < terms; t++) {
                    const uint16_t bits = float_to_bfloat(value);
                    pair[2 * (t * term + i)] = bits;
                    value -= bfloat_to_float(bits);
                }
            }
        }
    }
    if (terms > 1)
        for (int64_t i = 0; i < inputs; i++)
            if (!input_has_terms((uint32_t)_mm512_reduce_max_epi32(most[i])))
                refuse(job);
}

/* Pack a piece of the batch. */
static void pack_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t batch = job->m1 - job->m0, floats = (job->g1 - job->g0) * LINES * TILE_FLOATS * job->tiles;
    int64_t m, to;
    (void)thread;
    share(batch, TILED_INPUTS, parts, part, &m, &to);
    for (; m < to; m += TILED_INPUTS) {
        const int64_t inputs = smaller(TILED_INPUTS, batch - m);
        float *out = job->packed + m / TILED_INPUTS * floats;
        if (job->tiles == 1)
            pack_sixteen(job, job->m0 + m, inputs, out, 1);
        else
            pack_sixteen(job, job->m0 + m, inputs, out, TERMS);
    }
}

/* The scales of TILED_ROWS rows from a block on, a vector a row; behind the last row they are its own. */
static void put_scales(const struct job *job, int64_t r, int64_t first, float *out)
{
    const struct weight *w = job->weight;
    const int64_t bytes = scale_bytes(w);
    const uint8_t *soon = w->scales + (r + TILED_ROWS) * bytes + first * bytes / w->blocks;
    V unit[4], scale[4];
    int have = 1;
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
            have &= w->encoding != SCALES_FLOAT32 || scales_have_terms(scale[i]);
        }
    }
    if (!have && job->tiles > 1)
        refuse(job);
}

/* Levels times two scales, as bfloat16: side by side, or their terms in turns. */
INLINE void two_tables(V levels, const float *one, const float *two, const int terms, W *out)
{
    const V first = v_mul(levels, v_set1(*one)), second = v_mul(levels, v_set1(*two));
    if (terms == 1)
        *out = (W)_mm512_cvtne2ps_pbh(second, first);
    else
        split_pairs(first, second, terms, out);
}

/* Nibble k of 16-bit words where tables are looked up with it: one bit further up where they stand in turns. */
INLINE W nibble_at(W words, int k, const int terms)
{
    return terms == 1 ? _mm512_srli_epi16(words, 4 * k) : k ? _mm512_srli_epi16(words, 4 * k - 1) : _mm512_slli_epi16(words, 1);
}

/* What 16-bit words, of which `nibble` counts, are in the tables of each term; `second` has the bit that says in which of two. */
INLINE void look_up(W words, W nibble, W second, const W *tables, const int terms, float *out, int64_t step)
{
    const W index = _mm512_ternarylogic_epi32(words, nibble, second, 0xea); /* a & b | c */
    for (int t = 0; t < terms; t++)
        v_store(out + t * step, v_of_words(_mm512_permutexvar_epi16(index, tables[t])));
}

/* Four rows of group g, of which the first is there: LANES floats a row and line, `scales` of block first_block[g] on. */
INLINE void restore_four(const struct weight *w, int64_t r, int64_t g, const enum kind kind, const float *scales, float *out,
                         const int terms)
{
    const int64_t left = w->row_bytes - g * LANES * 4, last = w->rows - 1 - r;
    const int32_t *block = w->order->block + g * 4 * LANES;
    const V levels = levels_of(w, terms);
    const int bit = terms == 1 ? 4 : 0, down = terms == 1 ? 0 : 1; /* the bit that says which table; bits that nibbles stand further up */
    W nibble = _mm512_set1_epi16((short)(15 << down));
    W shifts = _mm512_sub_epi64(_mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0), _mm512_set1_epi64(down));
    W second = _mm512_slli_epi32(_mm512_set4_epi32(0x00010001, 0x00010001, 0, 0), bit);
    if (kind == FOURS) {
        /* words behind the row have block 0: they must not be taken for those of a block that may not be there */
        const W is = _mm512_max_epi32(_mm512_sub_epi32(_mm512_loadu_si512(block), _mm512_set1_epi32(block[0])), _mm512_setzero_si512());
        second = _mm512_or_si512(_mm512_slli_epi32(is, bit), _mm512_slli_epi32(is, bit + 16));
    }
    v_keep(nibble); /* the compiler would make them anew for every row */
    v_keep(shifts);
    v_keep(second);
    for (int i = 0; i < 4; i++, scales += LANES, out += LANES) {
        const uint8_t *p = w->packed + (r + smaller(i, last)) * w->row_bytes + g * LANES * 4;
        uint8_t padded[LANES * 4];
        W tables[TERMS];
        prefetch_far(p + TILED_ROWS * w->row_bytes);
        if (kind == EIGHTS) {
            if (left < LANES * 4) {
                _mm512_storeu_si512(padded, words_load(p, left));
                p = padded;
            }
#pragma GCC unroll 4
            for (int k = 0; k < LINES; k++) { /* sixteen bytes, four times */
                const W codes = _mm512_rorv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p + k)), shifts);
                two_tables(levels, scales + block[4 * k], scales + block[4 * k + 2], terms, tables);
                look_up(codes, nibble, second, tables, terms, out + 2 * k * TILE_FLOATS, TERM);
            }
            continue;
        }
        const W words = words_load(p, left);
        if (kind == FOURS) {
            two_tables(levels, scales + block[0], scales + block[0] + 1, terms, tables);
#pragma GCC unroll 4
            for (int k = 0; k < LINES; k++)
                look_up(nibble_at(words, k, terms), nibble, second, tables, terms, out + 2 * k * TILE_FLOATS, TERM);
            continue;
        }
#pragma GCC unroll 4
        for (int k = 0; k < LINES; k++) {
            const int32_t *low = block + (kind == APART ? k / 2 : 0) * LANES, *high = low + (kind == APART ? 2 : 0) * LANES;
            const V scale = v_load(scales);
            const V even = v_mul(v_lookup(levels, words, k), v_spread(scale, low));
            const V odd = v_mul(v_lookup(levels, words, k + 4), v_spread(scale, high));
            if (terms == 1)
                v_store(out + 2 * k * TILE_FLOATS, (V)LEVEL(pairs)(even, odd));
            else {
                split_pairs(even, odd, terms, tables);
                for (int t = 0; t < terms; t++)
                    v_store(out + 2 * k * TILE_FLOATS + t * TERM, v_of_words(tables[t]));
            }
        }
    }
}

/* The same of 16-bit floats; `float16` are two terms. Whether an input may be multiplied with them term by term. */
INLINE int copy_four(const struct weight *w, int64_t r, int64_t g, float *out, const int type)
{
    int have = 1;
    for (int64_t i = 0; i < 4; i++, out += LANES)
        for (int64_t k = 0, c = g * GROUP; k < LINES; k++, c += LINE) {
            const uint16_t *p = (const uint16_t *)w->packed + smaller(r + i, w->rows - 1) * w->columns + c;
            prefetch_far(p + TILED_ROWS * w->columns);
            W terms[2] = {words_load((const uint8_t *)p, 2 * (w->columns - c))};
            have &= weights_have_terms(terms[0], type);
            if (type == FLOAT16) {
                split_line(_mm512_cvtph_ps(_mm512_castsi512_si256(terms[0])), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(terms[0], 1)),
                           2, terms, 1);
                v_store(out + 2 * k * TILE_FLOATS + TERM, v_of_words(terms[1]));
            }
            v_store(out + 2 * k * TILE_FLOATS, v_of_words(terms[0]));
        }
    return have;
}

/* Restore TILED_ROWS rows of groups g to g1: two tiles a line. `scales` are those from block `from` on, or of other rows (-1). */
static void restore_tiles(const struct job *job, int64_t r, int64_t g, int64_t g1, float *scales, int64_t *from, float *out)
{
    const struct weight *w = job->weight;
    const enum kind kind = kind_of(w);
    const int terms = weight_terms(w, job->tiles);
    int have = 1;
    for (; g < g1; g++, out += LINES * 2 * TILE_FLOATS) {
        if (w->order && w->order->first_block[g] != *from)
            put_scales(job, r, *from = w->order->first_block[g], scales);
        for (int row = 0; row < TILED_ROWS && r + row < w->rows; row += 4) {
            const float *of = scales + row * LANES;
            float *at = out + row * LANES;
#define RESTORE(kind)                                               \
    if (terms == 1)                                                 \
        restore_four(w, r + row, g, kind, of, at, 1);               \
    else if (terms == 2)                                            \
        restore_four(w, r + row, g, kind, of, at, 2);               \
    else                                                            \
        restore_four(w, r + row, g, kind, of, at, TERMS);           \
    break
            switch (kind) {
            case SIXTEEN:
                have &= w->encoding == FLOAT16 ? copy_four(w, r + row, g, at, FLOAT16) : copy_four(w, r + row, g, at, BFLOAT16);
                break;
            case EIGHTS: RESTORE(EIGHTS);
            case FOURS: RESTORE(FOURS);
            case WORDS: RESTORE(WORDS);
            case APART: RESTORE(APART);
            }
#undef RESTORE
        }
    }
    if (!have && job->tiles > 1)
        refuse(job);
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
    float *sums = job->own + thread * job->own_floats + TILED_OWN(job->tiles);
    const int64_t batch = job->m1 - job->m0, term = (job->g1 - job->g0) * LINES * TILE_FLOATS, sixteen = term * job->tiles;
    const int64_t groups = job->tiles > 1 ? 1 : TILED_GROUPS;
    int64_t r, to;
    share(w->rows, TILED_ROWS, parts, part, &r, &to);
    if (r >= to)
        return;
    begin_tiles();
    for (; r < to && !(job->tiles > 1 && is_refused(job)); r += TILED_ROWS) {
        int64_t from = -1;
        for (int64_t g = job->g0, end; g < job->g1; g = end) {
            end = smaller(g + groups, job->g1);
            restore_tiles(job, r, g, end, scales, &from, restored);
            const struct tiles rows = {restored, TILE_FLOATS, 2 * TILE_FLOATS, TERM, 64, weight_terms(w, job->tiles)};
            struct tiles x = {job->packed + (g - job->g0) * LINES * TILE_FLOATS, sixteen, TILE_FLOATS, term, 64, job->tiles};
            for (int64_t m = 0; m < batch; m += 2 * TILED_INPUTS, x.at += 2 * sixteen) {
                const int both = m + TILED_INPUTS < batch, first = g == job->g0;
                float *of = sums + m * TILED_ROWS;
                if (job->tiles > 1 && both)
                    multiply_terms(rows, x, LINES, 0, 1, first, of, 2 * TILE_FLOATS);
                else if (job->tiles > 1)
                    multiply_terms(rows, x, LINES, 0, 0, first, of, 0);
                else if (both)
                    multiply_tiles(rows, x, (end - g) * LINES, 0, 1, first, of, 2 * TILE_FLOATS);
                else
                    multiply_tiles(rows, x, (end - g) * LINES, 0, 0, first, of, 0);
            }
        }
        for (int64_t m = 0; m < batch; m += TILED_INPUTS)
            put_tiles(job, r, smaller(TILED_ROWS, to - r), m, sums + m * TILED_ROWS);
    }
    end_tiles();
}

static void linear(struct job *job)
{
    const int64_t groups = job->weight->stride / GROUP, wide = (job->tiles > 1 ? TILED_WIDE : WIDE) / GROUP;
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
    if (job->update && !*job->refused) {
        job->packed_step = 0; /* its parts are shared */
        update(job);
    }
}
