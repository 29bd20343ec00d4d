/* x @ W.T. Few inputs: codes are decoded in registers. More: rows are restored into a tile that stays in the
 * first cache, and multiplied with a batch that lies across the lanes. */

#ifndef LEVEL_LOW /* whether the level multiplies bfloat16 */
#define LEVEL_LOW 0
#endif

/* Put columns of one input where their codes come up, as float32: vectors lie `step` vectors apart. What lies
 * beyond the row is left alone. */
INLINE void LEVEL(place)(const struct job *job, int64_t m, int64_t c0, int64_t c1, float *out, int64_t step, const int type)
{
    const struct weight *w = job->weight;
    const int64_t before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP, from = m * w->columns;
    const int32_t *place = w->order ? w->order->place : NULL;
    for (int64_t c = c0; c < c1; c++) {
        const int64_t s = (place ? place[c] : c) - before;
        if (s >= 0 && s < floats)
            out[s / LANES * step * LANES + s % LANES] = read_as_float(job->x, type, from + c);
    }
}

static void LEVEL(place_typed)(const struct job *job, int64_t m, int64_t c0, int64_t c1, float *out, int64_t step)
{
    if (job->type == FLOAT32)
        LEVEL(place)(job, m, c0, c1, out, step, FLOAT32);
    else if (job->type == BFLOAT16)
        LEVEL(place)(job, m, c0, c1, out, step, BFLOAT16);
    else
        LEVEL(place)(job, m, c0, c1, out, step, FLOAT16);
}

/* Loops over R rows and M inputs, which must be unrolled for their arrays to be registers. */
#define EACH_ROW _Pragma("GCC unroll 4") for (int i = 0; i < R; i++)
#define EACH_INPUT _Pragma("GCC unroll 8") for (int j = 0; j < M; j++)
#define AT (i * M + j)
#define FEW_SUMS 16 /* the most rows times inputs */

INLINE void LEVEL(put)(const struct job *job, int64_t m, int64_t r, float sum)
{
    const int64_t i = m * job->weight->rows + r;
    if (job->g0)
        sum += read_as_float(job->out, job->out_type, i);
    else if (job->bias)
        sum += read_as_float(job->bias, job->bias_type, r);
    write_as(job->out, job->out_type, i, sum);
}

INLINE void LEVEL(put_sums)(const struct job *job, int64_t r, const int R, const int M, const V *sums)
{
    for (int j = 0; j < M; j++) {
        float out[4];
        if (R == 4)
            v_sum4(sums[j], sums[M + j], sums[2 * M + j], sums[3 * M + j], out);
        else
            for (int i = 0; i < R; i++)
                out[i] = v_sum(sums[AT]);
        for (int i = 0; i < R; i++)
            LEVEL(put)(job, job->m0 + j, r + i, out[i]);
    }
}

/* Add to `sums` what R rows with M inputs make in groups t0 to t1, decoding codes in registers. A block's products are
 * summed before its scale is applied; blocks that are not whole words (`apart`) are scaled first. */
INLINE void LEVEL(few_groups)(const struct weight *w, int64_t r, int64_t t0, int64_t t1, const int R, const int M,
                              const int apart, const float *scales, const float *x, V *sums)
{
    const int64_t row_bytes = w->row_bytes;
    const int32_t *first = w->order->first_block, *block = w->order->block + t0 * 4 * LANES;
    const uint8_t *p = w->packed + r * row_bytes + t0 * LANES * 4;
    const T table = table_load(w->levels);
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = sums[AT];
    scales -= first[t0];
    for (int64_t g = t0; g < t1; g++, p += LANES * 4, x += M * GROUP, block += 4 * LANES) {
        const int64_t left = row_bytes - g * (LANES * 4);
        const float *scale_at = scales + first[g];
        EACH_ROW prefetch(p + (i + 8 * R) * row_bytes);
        W words[4];
        V scale[4], sum[FEW_SUMS];
        if (left >= LANES * 4)
            EACH_ROW words[i] = words_load(p + i * row_bytes, LANES * 4);
        else
            EACH_ROW words[i] = words_load(p + i * row_bytes, left);
        EACH_ROW scale[i] = v_spread(scale_at + i * FEW_SCALES, block);
        EACH_ROW EACH_INPUT sum[AT] = v_zero();
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            V level[4];
            if (apart && k && k % 2 == 0)
                EACH_ROW scale[i] = v_spread(scale_at + i * FEW_SCALES, block + k / 2 * LANES);
            EACH_ROW level[i] = v_lookup(table, words[i], k);
            if (apart)
                EACH_ROW level[i] = v_mul(level[i], scale[i]);
            EACH_INPUT {
                V value = v_load(x + (k * M + j) * LANES);
                if (M > 2)
                    v_keep(value);
                if (apart)
                    EACH_ROW acc[AT] = v_fma(level[i], value, acc[AT]);
                else
                    EACH_ROW sum[AT] = v_fma(level[i], value, sum[AT]);
            }
        }
        if (!apart)
            EACH_ROW EACH_INPUT acc[AT] = v_fma(sum[AT], scale[i], acc[AT]);
    }
    EACH_ROW EACH_INPUT sums[AT] = acc[AT];
}

/* R rows with M inputs. */
#define FEW_PRODUCT(name, groups, step, ...)                                                                         \
    INLINE void LEVEL(name)(const struct job *job, int64_t r, const int R, const int M)                              \
    {                                                                                                                \
        const struct weight *w = job->weight;                                                                        \
        const float *x = job->packed;                                                                                \
        float scales[4 * FEW_SCALES];                                                                                \
        V sums[FEW_SUMS];                                                                                            \
        EACH_ROW EACH_INPUT sums[AT] = v_zero();                                                                     \
        for (int64_t t0 = job->g0, t1; t0 < job->g1; t0 = t1) {                                                      \
            t1 = smaller(t0 + FEW_COLUMNS / GROUP, job->g1);                                                         \
            for (int i = 0; i < R; i++)                                                                              \
                LEVEL(group_scales)(w, r + i, t0, t1, scales + i * FEW_SCALES);                                      \
            LEVEL(groups)(w, r, t0, t1, R, M, __VA_ARGS__ scales, x, sums);                                          \
            x += (t1 - t0) * M * step;                                                                               \
        }                                                                                                            \
        LEVEL(put_sums)(job, r, R, M, sums);                                                                         \
    }

FEW_PRODUCT(few, few_groups, GROUP, 0, )
FEW_PRODUCT(few_apart, few_groups, GROUP, 1, )

/* The same with 16-bit weights. */
INLINE void LEVEL(few_sixteen)(const struct job *job, int64_t r, const int R, const int M, const int type)
{
    const struct weight *w = job->weight;
    const int64_t from = job->g0 * GROUP, columns = smaller(w->columns - from, (job->g1 - job->g0) * GROUP);
    const int64_t whole = columns / LANES * LANES, stride = w->columns;
    const uint16_t *rows = (const uint16_t *)w->packed + r * stride + from;
    const float *x = job->packed;
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t c = 0; c < whole; c += LANES, x += M * LANES) {
        V row[4];
        EACH_ROW row[i] = LEVEL(sixteen)(rows + i * stride + c, type);
        if (c % 32 == 0) /* a line; rows are read from memory faster than the processor foresees */
            EACH_ROW prefetch(rows + (i + 8 * R) * stride + c);
        EACH_INPUT {
            const V value = v_load(x + j * LANES);
            EACH_ROW acc[AT] = v_fma(row[i], value, acc[AT]);
        }
    }
    if (whole < columns) { /* the input is padded with zeros */
        float rest[4][LANES];
        EACH_ROW for (int64_t c = 0; c < LANES; c++)
            rest[i][c] = whole + c < columns ? read_as_float(rows + i * stride, type, whole + c) : 0.0f;
        EACH_INPUT EACH_ROW acc[AT] = v_fma(v_load(rest[i]), v_load(x + j * LANES), acc[AT]);
    }
    LEVEL(put_sums)(job, r, R, M, acc);
}

/* Rows of a tile with all panels, three vectors of inputs at a time; but four are two and two. */
#define MULTIPLY(multiply, R, N) multiply(tile + i * width, R, floats, x, panel, N, sums + i * batch + p * LANES, batch, first)
#define MULTIPLY_PANELS(multiply, R)                 \
    for (int64_t p = 0, n; p < panels; p += n) {     \
        const int64_t left = panels - p;             \
        const float *x = packed + p * panel;         \
        n = left == 4 ? 2 : left < 3 ? left : 3;     \
        if (n == 3)                                  \
            MULTIPLY(multiply, R, 3);                \
        else if (n == 2)                             \
            MULTIPLY(multiply, R, 2);                \
        else                                         \
            MULTIPLY(multiply, R, 1);                \
    }
#define MULTIPLY_TILE(name, multiply, tile_width)                                                                     \
    static void LEVEL(name)(const float *tile, int rows, int64_t floats, const float *packed, int64_t panel,          \
                            int64_t panels, float *sums, int first)                                                   \
    {                                                                                                                 \
        const int64_t batch = panels * LANES, width = tile_width;                                                     \
        int i = 0;                                                                                                    \
        for (; i + MANY_ROWS <= rows; i += MANY_ROWS)                                                                 \
            MULTIPLY_PANELS(LEVEL(multiply), MANY_ROWS)                                                               \
        for (; i < rows; i++)                                                                                         \
            MULTIPLY_PANELS(LEVEL(multiply), 1)                                                                       \
    }

#if LEVEL_LOW
#include "bfloat16.h"
#endif

/* All rows of a thread with M inputs. */
INLINE void LEVEL(few_rows)(const struct job *job, int64_t r, int64_t to, const int M)
{
    const struct weight *w = job->weight;
    const int R = FEW_ROWS(M);
    if (!w->order && w->encoding == BFLOAT16) {
        for (; r + R <= to; r += R)
            LEVEL(few_sixteen)(job, r, R, M, BFLOAT16);
        for (; r < to; r++)
            LEVEL(few_sixteen)(job, r, 1, M, BFLOAT16);
    } else if (!w->order) {
        for (; r + R <= to; r += R)
            LEVEL(few_sixteen)(job, r, R, M, FLOAT16);
        for (; r < to; r++)
            LEVEL(few_sixteen)(job, r, 1, M, FLOAT16);
    } else if (!w->order->whole_words) {
        for (; r < to; r++)
            LEVEL(few_apart)(job, r, 1, M);
#if LEVEL_LOW
    } else if (job->low) {
        for (; r + R <= to; r += R)
            LEVEL(few_low)(job, r, R, M);
        for (; r < to; r++)
            LEVEL(few_low)(job, r, 1, M);
#endif
    } else {
        for (; r + R <= to; r += R)
            LEVEL(few)(job, r, R, M);
        for (; r < to; r++)
            LEVEL(few)(job, r, 1, M);
    }
}

/* Pack the inputs of a small batch side by side, vector by vector. */
static void LEVEL(pack_few)(const struct job *job)
{
    const int64_t floats = (job->g1 - job->g0) * GROUP, batch = job->m1 - job->m0;
    if (floats != job->weight->columns)
        memset(job->packed, 0, (size_t)(batch * floats) * sizeof(float));
    for (int64_t m = 0; m < batch; m++)
        LEVEL(place_typed)(job, job->m0 + m, 0, job->weight->columns, job->packed + m * LANES, batch);
#if LEVEL_LOW
    if (job->low && job->weight->order->whole_words)
        LEVEL(lower)(job->packed, floats, batch);
#endif
}

static void LEVEL(few_body)(const struct job *job, int64_t thread)
{
    int64_t r, to;
    share(job->weight->rows, TILE_ROWS, job->threads, thread, &r, &to);
    switch (job->m1 - job->m0) {
    case 1: LEVEL(few_rows)(job, r, to, 1); break;
    case 2: LEVEL(few_rows)(job, r, to, 2); break;
    case 3: LEVEL(few_rows)(job, r, to, 3); break;
    default: LEVEL(few_rows)(job, r, to, FEW); break;
    }
}

/* Put LANES columns of up to LANES inputs into a panel: across the lanes, where their codes come up. */
INLINE void LEVEL(place_panel)(const struct job *job, int64_t m, int64_t c, float *panel, const int type)
{
    const struct weight *w = job->weight;
    const int64_t before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP, columns = w->columns;
    const int32_t *place = w->order ? w->order->place : NULL;
    V v[LANES];
    for (int j = 0; j < LANES; j++) {
        const int64_t from = (m + j) * columns + c;
        if (m + j >= job->m1) {
            v[j] = v_zero();
        } else if (c + LANES > columns) {
            float rest[LANES] = {0};
            for (int64_t i = 0; i < columns - c; i++)
                rest[i] = read_as_float(job->x, type, from + i);
            v[j] = v_load(rest);
        } else {
            v[j] = type == FLOAT32 ? v_load((const float *)job->x + from) : LEVEL(sixteen)((const uint16_t *)job->x + from, type);
        }
    }
    v_transpose(v);
    for (int64_t i = 0; i < smaller(LANES, columns - c); i++) {
        const int64_t s = (place ? place[c + i] : c + i) - before;
        if (s >= 0 && s < floats)
            v_store(panel + s * LANES, v[i]);
    }
}

/* Pack a piece of the batch across the lanes: element s of LANES inputs side by side, and after them element s + 1. */
static void LEVEL(pack_many)(const struct job *job, int64_t thread)
{
    const int64_t floats = (job->g1 - job->g0) * GROUP, columns = job->weight->columns;
    int64_t from, to;
    share((job->m1 - job->m0 + LANES - 1) / LANES, 1, job->threads, thread, &from, &to);
    for (int64_t p = from; p < to; p++) {
        float *panel = job->packed + p * floats * LANES;
        const int64_t m = job->m0 + p * LANES;
        if (floats != columns)
            memset(panel, 0, (size_t)(floats * LANES) * sizeof(float));
        for (int64_t c = 0; c < columns; c += LANES)
            if (job->type == FLOAT32)
                LEVEL(place_panel)(job, m, c, panel, FLOAT32);
            else if (job->type == BFLOAT16)
                LEVEL(place_panel)(job, m, c, panel, BFLOAT16);
            else
                LEVEL(place_panel)(job, m, c, panel, FLOAT16);
#if LEVEL_LOW
        if (job->low)
            LEVEL(lower_panel)(panel, floats);
#endif
    }
}

/* R rows of a tile with N vectors of inputs, added to `sums` a part at a time: a long sum loses what it adds. */
INLINE void LEVEL(multiply)(const float *tile, const int R, int64_t floats, const float *x, int64_t panel, const int N,
                            float *sums, int64_t batch, int first)
{
    for (int64_t part = 0; part < floats; part += PART, first = 0) {
        const int64_t end = smaller(part + PART, floats);
        V acc[TILE_ROWS][3];
        for (int i = 0; i < R; i++)
            for (int n = 0; n < N; n++)
                acc[i][n] = v_zero();
        for (int64_t s = part; s < end; s++) {
            V value[3];
            for (int n = 0; n < N; n++)
                value[n] = v_load(x + n * panel + s * LANES);
            for (int i = 0; i < R; i++) {
                const V weight = v_set1(tile[i * TILE_COLUMNS + s]);
                for (int n = 0; n < N; n++)
                    acc[i][n] = v_fma(weight, value[n], acc[i][n]);
            }
        }
        for (int i = 0; i < R; i++)
            for (int n = 0; n < N; n++) {
                float *to = sums + i * batch + n * LANES;
                v_store(to, first ? acc[i][n] : v_add(v_load(to), acc[i][n]));
            }
    }
}

MULTIPLY_TILE(multiply_tile, multiply, TILE_COLUMNS)

/* The sums of the rows of a tile, (rows, batch), to the output. */
INLINE void LEVEL(put_tile)(const struct job *job, int64_t r, int rows, const float *sums, int64_t batch, const int type)
{
    float bias[TILE_ROWS] = {0};
    for (int i = 0; i < rows && job->bias; i++)
        bias[i] = read_as_float(job->bias, job->bias_type, r + i);
    if (rows < TILE_ROWS || job->g0) {
        for (int64_t m = job->m0; m < job->m1; m++)
            for (int i = 0; i < rows; i++)
                LEVEL(put)(job, m, r + i, sums[i * batch + m - job->m0]);
        return;
    }
    for (int64_t m = job->m0; m < job->m1; m += LANES) {
        V v[LANES];
        for (int i = 0; i < LANES; i++)
            v[i] = i < TILE_ROWS ? v_add(v_load(sums + i * batch + m - job->m0), v_set1(bias[i])) : v_zero();
        v_transpose(v);
        for (int64_t j = 0; j < smaller(LANES, job->m1 - m); j++) {
            float out[LANES]; /* TILE_ROWS of them, in any type */
            LEVEL(store_as)(out, type, 0, v[j]);
            const int64_t at = (m + j) * job->weight->rows + r, size = type == FLOAT32 ? 4 : 2;
            memcpy((char *)job->out + at * size, out, (size_t)(TILE_ROWS * size));
        }
    }
}

static void LEVEL(many_body)(const struct job *job, int64_t thread)
{
    const struct weight *w = job->weight;
    const int64_t panels = (job->m1 - job->m0 + LANES - 1) / LANES, batch = panels * LANES;
    const int64_t panel = (job->g1 - job->g0) * GROUP * LANES;
    float *scales = job->own + thread * job->own_floats;
    float *tile = scales + TILE_SCALES, *sums = tile + TILE_ROWS * TILE_COLUMNS;
    int64_t r, to;
    share(w->rows, TILE_ROWS, job->threads, thread, &r, &to);
    for (; r < to; r += TILE_ROWS) {
        const int rows = (int)smaller(TILE_ROWS, to - r);
        for (int64_t t0 = job->g0; t0 < job->g1; t0 += TILE_GROUPS) {
            const int64_t t1 = smaller(t0 + TILE_GROUPS, job->g1), before = (t0 - job->g0) * GROUP;
            const int64_t floats = (t1 - t0) * GROUP;
#if LEVEL_LOW
            if (job->low) {
                for (int i = 0; i < rows; i++)
                    LEVEL(decode_low)(w, r + i, t0, t1, scales, tile + i * (TILE_COLUMNS / 2));
                LEVEL(multiply_tile_low)(tile, rows, floats / 2, job->packed + before / 2 * LANES, panel, panels, sums,
                                         t0 == job->g0);
                continue;
            }
#endif
            for (int i = 0; i < rows; i++)
                LEVEL(decode)(w, r + i, t0, t1, scales, tile + i * TILE_COLUMNS);
            LEVEL(multiply_tile)(tile, rows, floats, job->packed + before * LANES, panel, panels, sums, t0 == job->g0);
        }
        if (job->out_type == FLOAT32)
            LEVEL(put_tile)(job, r, rows, sums, batch, FLOAT32);
        else if (job->out_type == BFLOAT16)
            LEVEL(put_tile)(job, r, rows, sums, batch, BFLOAT16);
        else
            LEVEL(put_tile)(job, r, rows, sums, batch, FLOAT16);
    }
}

static void LEVEL(linear)(struct job *job)
{
    const struct weight *w = job->weight;
    const int64_t groups = w->stride / GROUP, wide = WIDE / GROUP;
    const int64_t piece = piece_of(job->batch, smaller(w->stride, WIDE));
    for (job->m0 = 0; job->m0 < job->batch; job->m0 = job->m1) {
        const int64_t left = job->batch - job->m0, passes = (left + FEW - 1) / FEW;
        const int few = left <= FEW_BATCH;
        job->m1 = job->m0 + (few ? (left + passes - 1) / passes : smaller(left, piece));
        for (job->g0 = 0; job->g0 < groups; job->g0 = job->g1) {
            job->g1 = smaller(job->g0 + wide, groups);
            if (few) {
                LEVEL(pack_few)(job);
                parallel(job, LEVEL(few_body));
            } else {
                parallel(job, LEVEL(pack_many));
                parallel(job, LEVEL(many_body));
            }
        }
    }
}
