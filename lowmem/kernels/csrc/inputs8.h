/* Products in 8-bit integers: SPAN columns of a row of x are rounded to signed bytes with one scale, its unit, and multiplied with
 * bytes of the weight: 8-bit codes, or the steps of 4-bit levels (struct weight, use_inputs8 of weights.h).
 * lowmem/kernels/int8_rounding.py defines the rounding. The sum of a block is exact, in 32 bits:
 *
 *   sum of level[c] * x = step * unit * (sum of (steps[c] - zero) * v),        x ~ unit * v
 *
 * Where an ISA multiplies unsigned with signed bytes, steps are shifted by a zero point, and the sum of a block starts with the term
 * -zero * sum of v. Written over operations that an ISA defines in addition to those of rows.h; a quad is four bytes in a lane:
 *
 *   steps_load(p), steps_lookup(table, index)   a table of 16 bytes, and its bytes for LANES * 4 indices below 16
 *   IS_SHIFTED(w)               whether the steps of a weight are shifted
 *   struct steps, steps_of(bytes, is_shifted)   bytes of a weight, made ready to be multiplied
 *   add_products(sum, steps, x, n, is_shifted)  adds n products of quads to each lane: n is 1, 2 or QUADS
 *   add_spread(sum, steps, x, next, n, is_shifted)  the same with quads that all lanes share: x[0] and x[1], x[next] and x[next + 1].
 *                               Optional (OWN_SPREAD)
 *   QUADS(is_shifted)           quads that are multiplied at a time, of a tile: 2 or 4
 *   INPUTS8_INPUTS              batch rows that are multiplied with a tile at a time */
#pragma once
#include "few.h"
#include "tiled.h"

#define SPAN MAX_GROUP
#define INPUTS8_BYTES 3          /* bytes of a packed column, on average */
#define SPAN_WORDS (SPAN / 8)    /* words of 4-bit codes */
#define SPAN_QUADS (SPAN / 4)
/* A packed span of a batch row. First its bytes: those of the columns of low nibbles, then of high ones; or, for 8-bit codes, of all
 * columns in their order. Then, at these offsets in floats, step * unit, and the terms of the zero point. */
#define UNIT_AT SPAN_QUADS
#define TERMS_AT (SPAN_QUADS + MAX_LANES)
#define SPAN_FLOATS (SPAN / 4 * INPUTS8_BYTES)
#define INPUTS8_RANGE 127.0f     /* largest integer that a number of x is rounded to */
#define INPUTS8_LARGEST 0x1p100f /* largest number of x, and scale: a scale times the sum of a span must be finite */
#define INPUTS8_LEAST 0x1p-60f   /* least magnitude of the largest number of a span, unless the span is all zeros */
_Static_assert(TERMS_AT + SPAN_QUADS <= SPAN_FLOATS, "a packed span has room for its terms");

INLINE W quads_load(const float *p) { return words_of_v(v_load(p)); }

/* Steps of the low and the high nibbles of words. */
INLINE void look_up_steps(W table, W words, struct steps *out, const int is_shifted)
{
    out[0] = steps_of(steps_lookup(table, (W)((I)words & 0x0f0f0f0f)), is_shifted);
    out[1] = steps_of(steps_lookup(table, (W)((I)words >> 4 & 0x0f0f0f0f)), is_shifted);
}

/* 8-bit codes as bytes that are multiplied: an integer and 128, or the integer. */
INLINE W bytes_of_codes(W codes, const int is_shifted) { return is_shifted ? codes : (W)((I)codes ^ 0x80808080); }

#ifndef OWN_SPREAD
INLINE W add_spread(W sum, const struct steps *w, const float *x, int64_t next, const int n, const int is_shifted)
{
    W quads[4];
#pragma GCC unroll 4
    for (int k = 0; k < n; k++)
        quads[k] = (W)((I){0} + bits_of(x[k % 2 + k / 2 * next]));
    return add_products(sum, w, quads, n, is_shifted);
}
#endif

/* Vectors of quads of 8-bit codes whose sums have one scale in each lane. */
INLINE int vectors_of_block(const struct weight *w) { return w->half > 2 * LANES ? (int)w->half / (2 * LANES) : 1; }

/* The terms of the zero point: for few_inputs8 in the lanes where the products are, for tiles of each block. */
INLINE void put_terms(const struct weight *w, const float *bytes, const int is_few, float *out)
{
    int32_t sums[SPAN_QUADS], terms[SPAN_QUADS] = {0};
    const struct steps one = steps_of((W)((I){0} + 0x01010101), 1);
    for (int q = 0; q < SPAN_QUADS; q += LANES) {
        const W quads = quads_load(bytes + q), sum = add_products((W){0}, &one, &quads, 1, 1);
        memcpy(sums + q, &sum, sizeof sum);
    }
    const int block = (int)w->half / (w->levels ? 4 : 2), run = vectors_of_block(w); /* block: in words, or in quads of 8-bit codes */
    for (int q = 0; q < SPAN_QUADS; q++) {
        const int word = w->levels ? q % SPAN_WORDS : q;
        const int at = !is_few ? word / block : w->levels ? word : q / (run * LANES) * LANES + q % LANES;
        terms[at] -= w->inputs8_zero * sums[q];
    }
    memcpy(out, terms, sizeof terms);
}

/* Pack SPAN columns of batch row m from column `first` on. Returns 0 if a number is too large or not finite, or if all are too small. */
INLINE int pack_span(const struct job *job, int64_t m, int64_t first, const int is_few, float *out, const int type)
{
    const struct weight *w = job->weight;
    const int64_t from = m * w->columns + first, left = w->columns - first;
    uint8_t bytes[SPAN];
    V x[SPAN / LANES];
    I most = {0};
    uint32_t of_lanes[LANES], largest_bits = 0;
#pragma GCC unroll 32
    for (int n = 0; n < SPAN / LANES; n++) {
        x[n] = left >= SPAN ? load_as(job->x, type, from + n * LANES) : load_some(job->x, type, from + n * LANES, left - n * LANES);
        const I magnitude = (I)x[n] & 0x7fffffff;
        most = (I)v_where((I)((N)magnitude > (N)most), (V)magnitude, (V)most);
    }
    memcpy(of_lanes, &most, sizeof most);
    for (int i = 0; i < LANES; i++)
        largest_bits = of_lanes[i] > largest_bits ? of_lanes[i] : largest_bits;
    const float largest = float_of(largest_bits);
    if (!(largest <= INPUTS8_LARGEST && (largest >= INPUTS8_LEAST || largest == 0.0f)))
        return 0;
    /* Adding 1.5 * 2^23 rounds to an integer, whose lowest byte is that of the sum. */
    const V factor = v_set1(largest > 0.0f ? INPUTS8_RANGE / largest : 0.0f), round = v_set1(0x1.8p23f);
    typedef uint8_t Q __attribute__((vector_size(LANES)));
#pragma GCC unroll 32
    for (int n = 0; n < SPAN / LANES; n++) {
        const Q integers = __builtin_convertvector((I)v_add(v_mul(x[n], factor), round), Q);
        memcpy(bytes + n * LANES, &integers, sizeof integers);
    }
    uint8_t *low = (uint8_t *)out, *high = low + SPAN / 2;
    const int64_t half = w->half;
    if (!w->levels)
        memcpy(out, bytes, SPAN);
    else if (left >= SPAN)
        for (int64_t i = 0; i < SPAN / 2; i += 8) { /* halves of blocks are multiples of 8 columns */
            memcpy(low + i, bytes + i + i / half * half, 8);
            memcpy(high + i, bytes + i + i / half * half + half, 8);
        }
    else {
        memset(out, 0, SPAN);
        for (int64_t i = 0, c = 0; c < left; i += half, c += 2 * half) { /* the last block may be short */
            const int64_t columns = smaller(left - c, 2 * half), lower = (columns + 1) / 2;
            memcpy(low + i, bytes + c, (size_t)lower);
            memcpy(high + i, bytes + c + lower, (size_t)(columns - lower));
        }
    }
    out[UNIT_AT] = largest / INPUTS8_RANGE * w->inputs8_step;
    if (w->inputs8_zero)
        put_terms(w, out, is_few, out + TERMS_AT);
    return 1;
}

/* Where the span of a group of columns is packed, of the first batch row; that of the next one follows. */
INLINE float *span_at(const struct job *job, int64_t g) { return job->packed + (g - job->g0) * GROUP / SPAN * (job->m1 - job->m0) * SPAN_FLOATS; }

/* Pack batch rows of a piece, a part of them; refuse the job if 8-bit integers cannot represent them. */
INLINE void pack_inputs8(struct job *job, int64_t part, int64_t parts, const int is_few)
{
    int64_t from, to;
    share(job->m1 - job->m0, 1, parts, part, &from, &to);
    for (int64_t g = job->g0; g < job->g1; g += SPAN / GROUP)
        for (int64_t m = from; m < to; m++)
            if (!OF_TYPE(job->type, pack_span, job, job->m0 + m, g * GROUP, is_few, span_at(job, g) + m * SPAN_FLOATS)) {
                refuse(job);
                return;
            }
}
static void pack_few_inputs8(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    pack_inputs8(job, 0, 1, 1);
    sum_blocks(job); /* of numbers that are not rounded: offsets may be large */
}
static void pack_tiles_inputs8(struct job *job, int64_t part, int64_t parts, int64_t thread) { pack_inputs8(job, part, parts, 0); }

/* As few, in 8-bit integers. */
INLINE void few_inputs8(const struct job *job, int64_t r, const int R, const int M, V *out, const int is_shifted)
{
    const struct weight *w = job->weight;
    const float *x = job->packed;
    const W table = steps_load(w->steps);
    struct reading at;
    V acc[FEW_SUMS];
    begin_reading(&at, w, r, job->g0, R);
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t g = job->g0; g < job->g1; x += M * SPAN_FLOATS)
        for (int n = 0; n < SPAN_WORDS; n += LANES, g++) {
            struct steps of[4][2];
            read_group(&at, w, r, g, R);
            EACH_ROW look_up_steps(table, at.words[i], of[i], is_shifted);
            EACH_INPUT {
                const float *p = x + j * SPAN_FLOATS + n;
                const W quads[2] = {quads_load(p), quads_load(p + SPAN_WORDS)};
                const W start = is_shifted ? quads_load(p + TERMS_AT) : (W){0};
                const V unit_of_input = v_set1(x[j * SPAN_FLOATS + UNIT_AT]);
                EACH_ROW {
                    const W sum = add_products(start, of[i], quads, 2, is_shifted);
                    acc[AT] = v_fma(v_mul(__builtin_convertvector((N)sum, V), unit_of_input), at.scale[i], acc[AT]);
                }
            }
        }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

/* The same with 8-bit codes. */
INLINE void few_inputs8_weights8(const struct job *job, int64_t r, const int R, const int M, V *out, const int is_shifted)
{
    const struct weight *w = job->weight;
    const int64_t end = smaller(w->columns, job->g1 * GROUP), size = 2 * w->half;
    const uint8_t *rows = w->packed + r * w->row_bytes;
    const float *x = job->packed;
    const int run = vectors_of_block(w);
    float scales[4][2 * MAX_LANES] = {{0}}; /* of LANES blocks from `first` on, and room to read vectors from any of them */
    int32_t block_of_lane[LANES];
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int i = 0; i < LANES; i++)
        block_of_lane[i] = (int32_t)(4 * i / size);
    int64_t c = job->g0 * GROUP, first = c / size - LANES;
    for (; c < end; x += M * SPAN_FLOATS)
        for (int n = 0; n < SPAN_QUADS && c < end;) {
            const int64_t block = c / size;
            const int start = TERMS_AT + n / run;
            W sum[FEW_SUMS];
            if (block >= first + LANES) {
                first = block;
                EACH_ROW row_scales(w, r + i, first, smaller(LANES, w->blocks - first), scales[i]);
            }
            EACH_INPUT EACH_ROW sum[AT] = is_shifted ? quads_load(x + j * SPAN_FLOATS + start) : (W){0};
            for (const int stop = n + run * LANES; n < stop; n += LANES, c += 4 * LANES) {
                struct steps of[4];
                EACH_ROW {
                    prefetch(rows + (i + 8 * R) * w->row_bytes + c);
                    of[i] = steps_of(bytes_of_codes(words_load(rows + i * w->row_bytes + c, w->columns - c), is_shifted), is_shifted);
                }
                EACH_INPUT {
                    const W quads = quads_load(x + j * SPAN_FLOATS + n);
                    EACH_ROW sum[AT] = add_products(sum[AT], of + i, &quads, 1, is_shifted);
                }
            }
            EACH_ROW {
                const V scale = v_spread(v_load(scales[i] + block - first), block_of_lane);
                EACH_INPUT {
                    const V unit_of_input = v_set1(x[j * SPAN_FLOATS + UNIT_AT]);
                    acc[AT] = v_fma(v_mul(__builtin_convertvector((N)sum[AT], V), unit_of_input), scale, acc[AT]);
                }
            }
        }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

ROWS_WITH_MORE(rows_inputs8, FEW_ROWS, few_inputs8, , 0)
ROWS_WITH_MORE(rows_inputs8_shifted, FEW_ROWS, few_inputs8, , 1)
ROWS_WITH_FEW(rows_inputs8_weights8, FEW_ROWS, few_inputs8_weights8, , INPUTS8_SHIFTS_CODES)

static void few_inputs8_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    if (!is_refused(job))
        few_rows(job, part, parts, !w->levels ? rows_inputs8_weights8 : IS_SHIFTED(w) ? rows_inputs8_shifted : rows_inputs8);
}

/* The bytes of SPAN columns, from column c on, of LANES rows from r on: in the order of packed x, the rows in the lanes. */
INLINE void tile_inputs8(const struct weight *w, int64_t r, int64_t c, float *tile)
{
    const W table = steps_load(w->steps);
    float words[SPAN_QUADS * LANES];
    const int bytes = w->levels ? SPAN / 2 : SPAN, is_shifted = IS_SHIFTED(w);
    const int64_t first = w->levels ? c / 2 : c;
    for (int i = 0; i < LANES; i++)
        prefetch(w->packed + (r + LANES + i) * w->row_bytes + first);
    for (int n = 0; n < bytes; n += 4 * LANES)
        words_across(w, r, (first + n) / (4 * LANES), LANES, (w->levels ? words : tile) + n / 4 * LANES);
    if (w->levels)
        for (int n = 0; n < SPAN_WORDS * LANES; n += LANES) {
            const W codes = quads_load(words + n);
            v_store(tile + n, v_of_words(steps_lookup(table, (W)((I)codes & 0x0f0f0f0f))));
            v_store(tile + n + SPAN_WORDS * LANES, v_of_words(steps_lookup(table, (W)((I)codes >> 4 & 0x0f0f0f0f))));
        }
    else if (!is_shifted)
        for (int n = 0; n < SPAN_QUADS * LANES; n += LANES)
            v_store(tile + n, v_of_words(bytes_of_codes(quads_load(tile + n), 0)));
}

/* sums (M, LANES) += a span of LANES rows of a tile times M batch rows. A step is four quads: two neighbours, and two that are `next`
 * quads behind them. There are `steps` of them in a block, whose scales are `scales`. */
INLINE void multiply_inputs8(const float *x, const float *tile, const float *scales, int steps, int next, const int M,
                             const int is_shifted, float *sums)
{
    const int step = next > 2 ? 2 : 4; /* quads of packed x from a step to the next */
    V acc[16];
    EACH_OF_MANY acc[j] = v_zero();
    const float *term = x + TERMS_AT;
    for (int n = 0; n < SPAN_QUADS / 4 * step; scales += LANES, term++) {
        W sum[16];
        EACH_OF_MANY sum[j] = is_shifted ? (W)((I){0} + bits_of(term[j * SPAN_FLOATS])) : (W){0};
        for (const int end = n + steps * step; n < end; n += step)
            for (int k = 0; k < 4; k += QUADS(is_shifted)) {
                struct steps of[4];
                for (int q = 0; q < QUADS(is_shifted); q++)
                    of[q] = steps_of(quads_load(tile + (n + (k + q) % 2 + (k + q) / 2 * next) * LANES), is_shifted);
                EACH_OF_MANY sum[j] = add_spread(sum[j], of, x + j * SPAN_FLOATS + n + k / 2 * next, next, QUADS(is_shifted), is_shifted);
            }
        const V scale = v_load(scales);
        EACH_OF_MANY acc[j] = v_fma(__builtin_convertvector((N)sum[j], V), scale, acc[j]);
    }
    EACH_OF_MANY v_store(sums + j * LANES, v_fma(acc[j], v_set1(x[j * SPAN_FLOATS + UNIT_AT]), v_load(sums + j * LANES)));
}

/* Multiply a tile with all batch rows of a piece. */
#define MULTIPLY_INPUTS8(name, is_shifted)                                                                        \
    OWN_FUNCTION name(const float *x, const float *tile, const float *scales, const struct weight *w, int64_t batch, float *sums) \
    {                                                                                                             \
        const int steps = (int)w->half / 8, next = w->levels ? SPAN_WORDS : 2;                                    \
        IN_PASSES(batch, INPUTS8_INPUTS, CALL_##is_shifted)                                                       \
    }
#define CALL_0(M) multiply_inputs8(x + m * SPAN_FLOATS, tile, scales, steps, next, M, 0, sums + m * LANES)
#define CALL_1(M) multiply_inputs8(x + m * SPAN_FLOATS, tile, scales, steps, next, M, 1, sums + m * LANES)
MULTIPLY_INPUTS8(multiply_signed, 0)
MULTIPLY_INPUTS8(multiply_shifted, 1)

/* Whether a scale is so large that it times the sum of a span could be infinite. */
INLINE int has_large_scale(const struct weight *w, const float *scales, int64_t n)
{
    I large = {0};
    for (int64_t i = 0; w->encoding == SCALES_FLOAT32 && i < n; i++)
        large |= ~(I)((V)((I)v_load(scales + i * LANES) & 0x7fffffff) <= v_set1(INPUTS8_LARGEST));
    uint32_t of_lanes[LANES], any = 0;
    memcpy(of_lanes, &large, sizeof large);
    for (int i = 0; i < LANES; i++)
        any |= of_lanes[i];
    return any != 0;
}

static void tiled_inputs8_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, begin = job->g0 * GROUP, size = 2 * w->half;
    float *scales = job->own + thread * job->own_floats, *tile = scales + TILES_AT, *sums = scales + SUMS_AT;
    int64_t r, to, first = 0;
    share(w->rows, LANES, parts, part, &r, &to);
    for (; r < to && !is_refused(job); r += LANES) {
        memset(sums, 0, (size_t)(batch * LANES) * sizeof(float));
        for (int64_t c = begin; c < job->g1 * GROUP; c += SPAN) {
            if ((c - begin) % chunk_of(w) == 0) {
                first = chunk_scales(job, r, c, 1, scales);
                if (has_large_scale(w, scales, (smaller(c + chunk_of(w), job->g1 * GROUP) - c) / size))
                    refuse(job);
            }
            tile_inputs8(w, r, c, tile);
            (IS_SHIFTED(w) ? multiply_shifted : multiply_signed)(span_at(job, c / GROUP), tile, scales + (c / size - first) * LANES, w, batch, sums);
        }
        put_rows(job, r, smaller(LANES, to - r), 1, sums);
    }
}

/* With 8-bit codes, of which a tile takes less work, few rows pay up to a smaller batch. */
#define FEW_INPUTS8 .number = INPUTS8_BYTES, .whole = 1, .few = 1, .adds_offsets = 1, .pack = pack_few_inputs8, .multiply = few_inputs8_body
#define TILED_INPUTS8 \
    .number = INPUTS8_BYTES, .whole = 1, .own = SUMS_AT, .own_of_input = LANES, .pack = pack_tiles_inputs8, .multiply = tiled_inputs8_body
#define INPUTS8_KERNELS                                                                          \
    {"few_inputs8", LINEAR_INPUTS8, GROUPS, ANY_TYPE, 1, FEW_MORE, FEW_INPUTS8},                 \
    {"few_inputs8", LINEAR_INPUTS8, GROUPS8, ANY_TYPE, 1, FEW, FEW_INPUTS8},                     \
    {"tiled_inputs8", LINEAR_INPUTS8, GROUPS, ANY_TYPE, FEW_MORE + 1, ANY_ROWS, TILED_INPUTS8},  \
    {"tiled_inputs8", LINEAR_INPUTS8, GROUPS8, ANY_TYPE, FEW + 1, ANY_ROWS, TILED_INPUTS8}
