/* Products in 8-bit integers: vpdpbusd adds four products of an unsigned and a signed byte per lane to a 32-bit sum,
 * exactly. GROUP columns of a row of x are rounded to signed bytes with one scale, its unit; levels are multiples of
 * a step that fit unsigned bytes (struct weight, use_inputs8 of weights.h). lowmem/kernels/int8_rounding.py defines the rounding.
 *
 *   sum of level[c] * x = step * unit * (sum of steps[c] * v - 128 * sum of v),        x ~ unit * v
 *
 * A small batch is multiplied in registers, as in few.h. A packed group of a batch row: 64 bytes for the columns of low nibbles,
 * 64 for those of high nibbles; -128 * sum of v, per lane; and step * unit.
 *
 * In a larger batch, LANES rows of x form a panel and lie across the lanes, and the sum of a block starts with the term of the
 * zero point. A packed group of a panel: four columns of each batch row, first those of the low nibbles of each of LANES words,
 * then those of the high nibbles; the terms of the zero point for each block; and the units. */
#pragma once
#include "avx512.h"
#include "few.h"

/* Offsets in floats of the 32-bit sums and of the units in a packed group: of a batch row, and of a panel. */
#define FEW_INPUTS8_SUMS (2 * LANES)
#define FEW_INPUTS8_UNIT (FEW_INPUTS8_SUMS + LANES)
#define INPUTS8_SUMS (2 * LANES * LANES)
#define INPUTS8_UNITS (INPUTS8_SUMS + LANES * LANES)
#define INPUTS8_GROUP (GROUP / 2) /* floats of a group of a batch row in a panel */
#define INPUTS8_PANEL (INPUTS8_GROUP * LANES) /* floats of a group of a panel */
#define INPUTS8_PANELS 3 /* most panels that are multiplied at a time: two or three with four rows, one with eight */
#define INPUTS8_MOST 12  /* most sums at a time: they stay in registers */
#define INPUTS8_RANGE 127.0f      /* largest integer that a number of x is rounded to */
#define INPUTS8_LARGEST 0x1p100f /* largest number of x, and scale: a scale times the sum of a group must be finite */
#define INPUTS8_LEAST 0x1p-60f   /* least magnitude of the largest number of a group, unless the group is all zeros */
_Static_assert(LANES == PANEL && MOST * INPUTS8_ROWS <= SUMS_AT, "what is turned has room before the sums");
_Static_assert(INPUTS8_UNITS + LANES <= INPUTS8_GROUP * LANES, "a panel has room for its groups");

INLINE W steps_load(const struct weight *w) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)w->steps)); }

/* sum + bytes * numbers. In assembly: in long loops GCC copies each sum around the intrinsic, which takes half of the time. */
INLINE W add_bytes(W sum, W bytes, W numbers)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(numbers));
    return sum;
}

/* The steps of the low and the high nibbles of words. */
INLINE void look_up_steps(W table, W words, W *low, W *high)
{
    const W nibble = _mm512_set1_epi8(15);
    *low = _mm512_shuffle_epi8(table, _mm512_and_si512(words, nibble));
    *high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble));
}

/* As few, in 8-bit integers. */
INLINE void few_inputs8(const struct job *job, int64_t r, const int R, const int M, V *out)
{
    const struct weight *w = job->weight;
    const float *x = job->packed;
    const W table = steps_load(w);
    struct reading at;
    V acc[FEW_SUMS];
    begin_reading(&at, w, r, job->g0, R);
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t g = job->g0; g < job->g1; g++, x += M * GROUP) {
        W lows[4], highs[4];
        read_group(&at, w, r, g, R);
        EACH_ROW look_up_steps(table, at.words[i], lows + i, highs + i);
        /* Products of different rows alternate: chains of dependent products would fill the queues of waiting operations. */
        EACH_INPUT {
            const float *of = x + j * GROUP;
            const W low = _mm512_loadu_si512(of), high = _mm512_loadu_si512(of + LANES);
            const W offset = _mm512_loadu_si512(of + FEW_INPUTS8_SUMS);
            const V unit_of_input = v_set1(of[FEW_INPUTS8_UNIT]);
            W sum[4];
            EACH_ROW sum[i] = _mm512_dpbusd_epi32(offset, lows[i], low);
            EACH_ROW sum[i] = _mm512_dpbusd_epi32(sum[i], highs[i], high);
            EACH_ROW acc[AT] = v_fma(v_mul(_mm512_cvtepi32_ps(sum[i]), unit_of_input), at.scale[i], acc[AT]);
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

/* Positions in to_inputs8_group of quads (four columns each), given their numbers in the order of a group's columns. */
INLINE W four_at(W four)
{
    const W three = _mm512_set1_epi32(3);
    const W quarter = _mm512_and_si512(_mm512_srli_epi32(four, 2), three), in_quarter = _mm512_and_si512(four, three);
    return _mm512_or_si512(_mm512_and_si512(four, _mm512_set1_epi32(16)), _mm512_or_si512(_mm512_slli_epi32(in_quarter, 2), quarter));
}

/* Convert the GROUP numbers x to the bytes, sums and unit of a group. `run` quads of four columns belong to low nibbles, the next
 * `run` to high ones. Returns 0 if a number is too large or not finite, or if all are too small. */
INLINE int to_inputs8_group(const struct weight *w, const V *x, const int run, float *group)
{
    const W magnitude = _mm512_set1_epi32(0x7fffffff);
    W most = _mm512_setzero_si512();
    for (int i = 0; i < 8; i++)
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude));
    const float largest = float_of((uint32_t)_mm512_reduce_max_epi32(most));
    if (!(largest <= INPUTS8_LARGEST && (largest >= INPUTS8_LEAST || largest == 0.0f)))
        return 0;
    const V factor = v_set1(largest > 0.0f ? INPUTS8_RANGE / largest : 0.0f);
    const W lowest = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400); /* the lowest byte of each of four words */
    const W word = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const W fours = _mm512_add_epi32(word, _mm512_andnot_si512(_mm512_set1_epi32(run - 1), word)); /* quads of low nibbles */
    const W lows = four_at(fours), highs = four_at(_mm512_add_epi32(fours, _mm512_set1_epi32(run)));
    /* The bytes of 64 columns as quads: the first quad of each quarter of these columns, then the second of each, and so on. */
    W v[8], of[2];
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_shuffle_epi8(_mm512_cvtps_epi32(v_mul(x[i], factor)), lowest);
    for (int i = 0; i < 2; i++)
        of[i] = _mm512_unpacklo_epi64(_mm512_unpacklo_epi32(v[4 * i], v[4 * i + 1]), _mm512_unpacklo_epi32(v[4 * i + 2], v[4 * i + 3]));
    const W low = _mm512_permutex2var_epi32(of[0], lows, of[1]), high = _mm512_permutex2var_epi32(of[0], highs, of[1]);
    const W one = _mm512_set1_epi8(1), sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), one, low), one, high);
    _mm512_storeu_si512(group, low);
    _mm512_storeu_si512(group + LANES, high);
    _mm512_storeu_si512(group + FEW_INPUTS8_SUMS, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-INPUTS8_ZERO)));
    group[FEW_INPUTS8_UNIT] = largest / INPUTS8_RANGE * w->inputs8_step;
    return 1;
}

/* Where group g of batch row m is packed. */
INLINE float *inputs8_at(const struct job *job, int64_t m, int64_t g)
{
    return job->packed + ((g - job->g0) * round_up(job->m1 - job->m0, LANES) + m - job->m0) * INPUTS8_GROUP;
}

/* Pack group g of batch row m. Returns 0 if 8-bit integers cannot represent it (see to_inputs8_group). */
INLINE int to_inputs8(const struct job *job, int64_t m, int64_t g, float *group)
{
    const struct weight *w = job->weight;
    const int64_t from = m * w->columns + g * GROUP, left = w->columns - g * GROUP;
    float sorted[GROUP] = {0};
    V x[8];
    if (left < GROUP) { /* the end of a row: its last block may be short */
        const int32_t *place = w->order->place + g * GROUP;
        for (int64_t c = 0; c < left; c++) {
            const int64_t nibble = place[c] % GROUP / LANES, word = place[c] % LANES;
            sorted[word * 8 + nibble % 2 * 4 + nibble / 2] = read_as_float(job->x, job->type, from + c);
        }
        EACH_VECTOR(8) x[n] = v_load(sorted + n * LANES);
        return to_inputs8_group(w, x, 1, group);
    }
    EACH_VECTOR(8) x[n] = load_as(job->x, job->type, from + n * LANES);
    return to_inputs8_group(w, x, (int)w->half / 4, group);
}

/* Pack panels of batch rows; refuse the job if 8-bit integers cannot represent them. */
static void pack_panels_inputs8(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t words = job->weight->half / 4; /* words of a block */
    int64_t m, to;
    share(round_up(job->m1 - job->m0, LANES), LANES, parts, part, &m, &to);
    for (m += job->m0, to += job->m0; m < to; m += LANES)
        for (int64_t g = job->g0; g < job->g1; g++) {
            float of[LANES][GROUP] = {{0}}, *out = inputs8_at(job, m, g);
            for (int64_t i = 0; i < smaller(LANES, job->m1 - m); i++)
                if (!to_inputs8(job, m + i, g, of[i])) {
                    refuse(job);
                    return;
                }
            V v[LANES];
            for (int half = 0; half < 2; half++) {
                EACH_LANE v[i] = v_load(of[i] + half * LANES);
                v_transpose(v);
                EACH_LANE v_store(out + (half * LANES + i) * LANES, v[i]);
            }
            EACH_LANE v[i] = v_load(of[i] + FEW_INPUTS8_SUMS);
            v_transpose(v);
            for (int64_t word = 0; word < LANES; word += words) {
                W sum = _mm512_setzero_si512();
                for (int64_t i = word; i < word + words; i++)
                    sum = _mm512_add_epi32(sum, words_of_v(v[i]));
                v_store(out + INPUTS8_SUMS + word / words * LANES, v_of_words(sum));
            }
            for (int i = 0; i < LANES; i++)
                out[INPUTS8_UNITS + i] = of[i][FEW_INPUTS8_UNIT];
        }
}

/* sums (P panels, R rows, LANES) += a group of R dequantized rows times P panels. Rows and panels share what is loaded. */
INLINE void multiply_inputs8(const float *x, const uint8_t *tile, const float *scales, const int words, const int R, const int P,
                                 float *sums)
{
    const float *offset = x + INPUTS8_SUMS, *unit = x + INPUTS8_UNITS, *end = x + LANES * LANES;
    V acc[INPUTS8_MOST];
#define EACH_OF_ROWS _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)
#define EACH_PANEL _Pragma("GCC unroll 4") for (int j = 0; j < P; j++)
#define OF (i * P + j)
    EACH_OF_ROWS EACH_PANEL acc[OF] = v_zero();
    for (; x < end; scales++, offset += LANES) {
        W sum[INPUTS8_MOST];
        EACH_PANEL {
            const W first = _mm512_loadu_si512(offset + j * INPUTS8_PANEL);
            EACH_OF_ROWS sum[OF] = first;
        }
        for (int word = 0; word < words; word++, x += LANES, tile += 4)
#pragma GCC unroll 2
            for (int high = 0; high < 2; high++) {
                W of[INPUTS8_PANELS];
                EACH_PANEL of[j] = _mm512_loadu_si512(x + high * LANES * LANES + j * INPUTS8_PANEL);
                EACH_OF_ROWS {
                    const W bytes = word_of(tile + i * GROUP + high * GROUP / 2);
                    EACH_PANEL sum[OF] = add_bytes(sum[OF], bytes, of[j]);
                }
            }
        EACH_OF_ROWS {
            const V scale = v_set1(scales[i * LANES]);
            EACH_PANEL acc[OF] = v_fma(_mm512_cvtepi32_ps(sum[OF]), scale, acc[OF]);
        }
    }
    EACH_OF_ROWS EACH_PANEL {
        float *to = sums + (j * INPUTS8_ROWS + i) * LANES;
        v_store(to, v_fma(acc[OF], v_load(unit + j * INPUTS8_PANEL), v_load(to)));
    }
}

/* The steps of the codes of a group, (INPUTS8_ROWS, GROUP), and its scales, (INPUTS8_ROWS, LANES). Refuses too large scales. */
INLINE void steps_inputs8(const struct job *job, int64_t r, int64_t g, const float *units, uint8_t *tile, float *scales)
{
    const struct weight *w = job->weight;
    const W table = steps_load(w);
    const int64_t first = g * LANES * 4 / w->half;
    for (int64_t i = 0; i < INPUTS8_ROWS; i++) {
        const int64_t row = smaller(r + i, w->rows - 1);
        const V unit = v_set1(units[i]);
        V stored;
        W low, high;
        prefetch(w->packed + (r + INPUTS8_ROWS + i) * w->row_bytes + g * LANES * 4);
        look_up_steps(table, words_of_group(w, row, g), &low, &high);
        _mm512_storeu_si512(tile + i * GROUP, low);
        _mm512_storeu_si512(tile + i * GROUP + GROUP / 2, high);
        few_scales(w, row, first, 1, &unit, &stored);
        if (w->encoding == SCALES_FLOAT32 && _mm512_cmp_ps_mask(_mm512_abs_ps(stored), v_set1(INPUTS8_LARGEST), _CMP_NLE_UQ))
            refuse(job);
        v_store(scales + i * LANES, stored);
    }
}

/* x @ W.T by panels, for a part of the rows. */
static void panels_inputs8_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct weight *w = job->weight;
    const int64_t batch = round_up(job->m1 - job->m0, LANES);
    const int words = (int)w->half / 4; /* words of a block */
    float *own = job->own + thread * job->own_floats, *sums = own + SUMS_AT, *turned = own;
    float units[INPUTS8_ROWS] = {0}, scales[INPUTS8_ROWS * LANES];
    uint8_t tile[INPUTS8_ROWS * GROUP];
    int64_t r, to;
    share(w->rows, INPUTS8_ROWS, parts, part, &r, &to);
    for (; r < to && !is_refused(job); r += INPUTS8_ROWS) {
        memset(sums, 0, (size_t)(batch * INPUTS8_ROWS) * sizeof(float));
        for (int i = 0; w->encoding >= SCALES_DOUBLE && i < INPUTS8_ROWS; i++)
            units[i] = row_scale(w, smaller(r + i, w->rows - 1)) / row_steps(w);
        for (int64_t g = job->g0; g < job->g1; g++) {
            steps_inputs8(job, r, g, units, tile, scales);
            const float *x = inputs8_at(job, job->m0, g);
#define ROWS_WITH_PANELS(R, P)                                                                                  \
    for (int i = 0; i < INPUTS8_ROWS; i += R)                                                                      \
        multiply_inputs8(x + m * INPUTS8_GROUP, tile + i * GROUP, scales + i * LANES, words, R, P,             \
                             sums + m * INPUTS8_ROWS + i * LANES)
            for (int64_t m = 0, left; (left = (batch - m) / LANES) > 0; m += smaller(left, INPUTS8_PANELS) * LANES)
                if (left == 1)
                    ROWS_WITH_PANELS(8, 1);
                else if (left == 2)
                    ROWS_WITH_PANELS(4, 2);
                else
                    ROWS_WITH_PANELS(4, 3);
        }
        for (int64_t m = 0; m < batch; m += LANES)
            turn(sums + m * INPUTS8_ROWS, INPUTS8_ROWS, turned + m * INPUTS8_ROWS);
        put_rows(job, r, smaller(INPUTS8_ROWS, to - r), INPUTS8_ROWS / LANES, turned);
    }
}

/* Pack a small batch, (groups, batch rows, GROUP floats); refuse the job if 8-bit integers cannot represent it. */
static void pack_few_inputs8(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t batch = job->m1 - job->m0;
    for (int64_t g = job->g0; g < job->g1; g++)
        for (int64_t m = 0; m < batch; m++)
            if (!to_inputs8(job, job->m0 + m, g, job->packed + ((g - job->g0) * batch + m) * GROUP)) {
                refuse(job);
                return;
            }
}

ROWS_WITH_MORE(rows_inputs8, FEW_ROWS, few_inputs8)

static void few_inputs8_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    if (!is_refused(job))
        few_rows(job, part, parts, rows_inputs8);
}
