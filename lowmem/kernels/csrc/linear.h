/* x @ W.T with a few inputs: columns lie across the lanes, and codes are decoded in registers. many.h has more inputs. */

#ifndef LEVEL_LOW /* whether the level multiplies bfloat16, */
#define LEVEL_LOW 0
#endif
#ifndef LEVEL_GRID /* and 8-bit integers */
#define LEVEL_GRID 0
#endif

/* Put one input where its codes come up, as float32: vectors lie `step` vectors apart. What lies beyond the row is left alone. */
INLINE void LEVEL(place)(const struct job *job, int64_t m, float *out, int64_t step, const int type)
{
    const struct weight *w = job->weight;
    const int64_t before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP, from = m * w->columns;
    if (!w->order) { /* in its own order */
        const int64_t end = smaller(w->columns, before + floats);
        int64_t c = before;
        for (; c + LANES <= end; c += LANES, out += step * LANES)
            v_store(out, LEVEL(load_as)(job->x, type, from + c));
        for (; c < end; c++, out++)
            *out = read_as_float(job->x, type, from + c);
        return;
    }
    int64_t c, end;
    columns_between(w, job->g0, job->g1, GROUP, &c, &end);
    for (; c < end; c++) {
        const int64_t s = w->order->place[c] - before;
        if (s >= 0 && s < floats)
            out[s / LANES * step * LANES + s % LANES] = read_as_float(job->x, type, from + c);
    }
}

static void LEVEL(place_typed)(const struct job *job, int64_t m, float *out, int64_t step)
{
    if (job->type == FLOAT32)
        LEVEL(place)(job, m, out, step, FLOAT32);
    else if (job->type == BFLOAT16)
        LEVEL(place)(job, m, out, step, BFLOAT16);
    else
        LEVEL(place)(job, m, out, step, FLOAT16);
}

/* Loops over R rows and M inputs, which must be unrolled for their arrays to be registers. */
#define EACH_ROW _Pragma("GCC unroll 4") for (int i = 0; i < R; i++)
#define EACH_INPUT _Pragma("GCC unroll 8") for (int j = 0; j < M; j++)
#define AT (i * M + j)
#define FEW_SUMS 16 /* the most rows times inputs */
#define FEW_CHAIN 32 /* the most products that are summed in one chain: all their roundings may go one way */
/* Of a loop for one number of inputs: it has the registers for itself. */
#define OWN_FUNCTION static __attribute__((noinline)) void

/* The sums across the lanes of R rows with M inputs: LANES an input. */
INLINE void LEVEL(few_sums)(const int R, const int M, const V *sums, float *out)
{
#pragma GCC unroll 8
    for (int j = 0; j < M; j += R == 2 ? 2 : 1) {
        const int last = j + 1 == M;
        float four[4];
        if (R == 4) {
            v_sum4(sums[j], sums[M + j], sums[2 * M + j], sums[3 * M + j], out + j * LANES);
        } else if (R == 2) { /* in the same order, whether there is a second input or not */
            v_sum4(sums[j], sums[M + j], last ? v_zero() : sums[j + 1], last ? v_zero() : sums[M + j + 1], four);
            memcpy(out + j * LANES, four, 2 * sizeof(float));
            if (!last)
                memcpy(out + (j + 1) * LANES, four + 2, 2 * sizeof(float));
        } else {
            for (int i = 0; i < R; i++)
                out[j * LANES + i] = v_sum(sums[AT]);
        }
    }
}

/* What the steps of the scales of R rows count. */
INLINE void LEVEL(row_units)(const struct weight *w, int64_t r, const int R, V *out)
{
    EACH_ROW out[i] = v_zero();
    if (w->encoding >= SCALES_DOUBLE)
        EACH_ROW out[i] = v_set1(LEVEL(row_scale)(w, r + i) / row_steps(w));
}

/* What is fetched while groups from g on of R rows are multiplied: the lines of rows to come, which lie behind each other,
 * R of them a group. */
INLINE const uint8_t *LEVEL(codes_soon)(const struct weight *w, int64_t r, int64_t g, const int R)
{
    return w->packed + (r + 8 * R) * w->row_bytes + g * LANES * 4 * R;
}

/* The scales of R rows, which are `step` apart, from a block on, as many as there are lanes. */
INLINE void LEVEL(few_scales)(const struct weight *w, int64_t r, int64_t step, int64_t first, const int R, const V *unit, V *out)
{
    const int64_t stride = scale_bytes(w) * step, n = w->blocks - first;
    const uint8_t *p = w->scales + r * scale_bytes(w);
#define READ(encoding)                                                     \
    if (n >= LANES)                                                        \
        EACH_ROW out[i] = v_scales(p + i * stride, first, LANES, encoding); \
    else                                                                   \
        EACH_ROW out[i] = v_scales(p + i * stride, first, n, encoding)
    if (w->encoding == SCALES_FLOAT16) {
        READ(SCALES_FLOAT16);
    } else if (w->encoding == SCALES_FLOAT32) {
        READ(SCALES_FLOAT32);
    } else if (w->encoding == SCALES_DOUBLE) {
        READ(SCALES_DOUBLE);
        EACH_ROW out[i] = v_mul(out[i], unit[i]);
    } else {
        READ(SCALES_SIGNED);
        EACH_ROW out[i] = v_mul(out[i], unit[i]);
    }
#undef READ
}

/* A group of words of R rows, of which `left` bytes are there. One way leads to them, not two: or they would go to the stack. */
INLINE void LEVEL(few_words)(const uint8_t *p, int64_t row_bytes, int64_t left, const int R, W *words)
{
    uint8_t rest[4][LANES * 4]; /* with zeros behind what is left */
    if (left < LANES * 4) {
        EACH_ROW v_store((float *)rest[i], v_of_words(words_load(p + i * row_bytes, left)));
        p = rest[0];
        row_bytes = LANES * 4;
    }
    EACH_ROW words[i] = words_load(p + i * row_bytes, LANES * 4);
}

/* What R rows with M inputs make in groups g to g1, decoding codes in registers. A block's products are
 * summed before its scale is applied; blocks that are not whole words (`apart`) are scaled first. */
INLINE void LEVEL(few_groups)(const struct weight *w, int64_t r, int64_t g, int64_t g1, const int R, const int M,
                              const int apart, const float *x, V *sums)
{
    const int64_t row_bytes = w->row_bytes;
    const int32_t *first = w->order->first_block, *block = w->order->block + g * 4 * LANES;
    const uint8_t *p = w->packed + r * row_bytes + g * LANES * 4;
    const uint8_t *soon = LEVEL(codes_soon)(w, r, g, R);
    const T table = table_load(w->levels);
    V unit[4], stored[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
    int32_t from = -1;
    LEVEL(row_units)(w, r, R, unit);
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (; g < g1; g++, p += LANES * 4, x += M * GROUP, block += 4 * LANES, soon += LANES * 4 * R) {
        const int64_t left = row_bytes - g * (LANES * 4);
        EACH_ROW prefetch(soon + i * LANES * 4);
        W words[4];
        V scale[4], sum[FEW_SUMS];
        if (first[g] != from)
            LEVEL(few_scales)(w, r, 1, from = first[g], R, unit, stored);
        LEVEL(few_words)(p, row_bytes, left, R, words);
        EACH_ROW scale[i] = v_spread(stored[i], block);
        EACH_ROW EACH_INPUT sum[AT] = v_zero();
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            V level[4];
            if (apart && k && k % 2 == 0)
                EACH_ROW scale[i] = v_spread(stored[i], block + k / 2 * LANES);
            EACH_ROW level[i] = v_lookup(table, words[i], k);
            if (apart)
                EACH_ROW level[i] = v_mul(level[i], scale[i]);
            EACH_INPUT {
                V value = v_load(x + (k * M + j) * LANES);
                if (M > 2)
                    v_keep(value);
                EACH_ROW sum[AT] = v_fma(level[i], value, sum[AT]);
            }
        }
        EACH_ROW EACH_INPUT acc[AT] = apart ? v_add(acc[AT], sum[AT]) : v_fma(sum[AT], scale[i], acc[AT]);
    }
    EACH_ROW EACH_INPUT sums[AT] = acc[AT];
}

/* R rows with M inputs. */
#define FEW_PRODUCT(name, groups, ...)                                                         \
    INLINE void LEVEL(name)(const struct job *job, int64_t r, const int R, const int M, float *out) \
    {                                                                                          \
        V sums[FEW_SUMS];                                                                      \
        LEVEL(groups)(job->weight, r, job->g0, job->g1, R, M, __VA_ARGS__ job->packed, sums);  \
        LEVEL(few_sums)(R, M, sums, out);                                                      \
    }

FEW_PRODUCT(few, few_groups, 0, )
FEW_PRODUCT(few_apart, few_groups, 1, )

/* The same with 16-bit weights. */
INLINE void LEVEL(few_sixteen)(const struct job *job, int64_t r, const int R, const int M, float *out, const int type)
{
    const struct weight *w = job->weight;
    const int64_t from = job->g0 * GROUP, columns = smaller(w->columns - from, (job->g1 - job->g0) * GROUP);
    const int64_t whole = columns / LANES * LANES, stride = w->columns;
    const uint16_t *rows = (const uint16_t *)w->packed + r * stride + from;
    const float *x = job->packed;
    V sums[FEW_SUMS], acc[FEW_SUMS];
    EACH_ROW EACH_INPUT sums[AT] = v_zero();
    for (int64_t c = 0; c < whole;) {
        EACH_ROW EACH_INPUT acc[AT] = v_zero();
        for (const int64_t end = smaller(c + FEW_CHAIN * LANES, whole); c < end; c += LANES, x += M * LANES) {
            V row[4];
            EACH_ROW row[i] = LEVEL(sixteen)(rows + i * stride + c, type);
            if (c % 32 == 0) /* a line; rows are read from memory faster than the processor foresees */
                EACH_ROW prefetch(rows + (i + 8 * R) * stride + c);
            EACH_INPUT {
                const V value = v_load(x + j * LANES);
                EACH_ROW acc[AT] = v_fma(row[i], value, acc[AT]);
            }
        }
        EACH_ROW EACH_INPUT sums[AT] = v_add(sums[AT], acc[AT]);
    }
    if (whole < columns) { /* the input is padded with zeros */
        float rest[4][LANES];
        EACH_ROW for (int64_t c = 0; c < LANES; c++)
            rest[i][c] = whole + c < columns ? read_as_float(rows + i * stride, type, whole + c) : 0.0f;
        EACH_INPUT EACH_ROW sums[AT] = v_fma(v_load(rest[i]), v_load(x + j * LANES), sums[AT]);
    }
    LEVEL(few_sums)(R, M, sums, out);
}

#if LEVEL_LOW
#include "bfloat16.h"
#endif
#include "pack.h"
#include "update.h"
#include "many.h"
#if LEVEL_GRID
#include "grid.h"
#endif

/* Rows r to `to` with M inputs, LANES of them at a time: a function for each M, which has the registers for itself. What LANES
 * rows make is written when the next ones are done: it would have to wait for what has just been stored a few numbers at a time. */
#define ROWS_WITH(M, name, rows, product, ...)                              \
    OWN_FUNCTION LEVEL(name##_##M)(const struct job *job, int64_t r, int64_t to) \
    {                                                                       \
        float sums[2][M * LANES], *now = sums[0], *before = sums[1];        \
        for (const int64_t begin = r; r < to; r += LANES) {                 \
            const int n = (int)smaller(LANES, to - r);                      \
            int i = 0;                                                      \
            for (; i + rows <= n; i += rows)                                \
                LEVEL(product)(job, r + i, rows, M, now + i __VA_ARGS__);   \
            for (; i < n; i++)                                              \
                LEVEL(product)(job, r + i, 1, M, now + i __VA_ARGS__);      \
            if (r > begin)                                                  \
                LEVEL(put_rows)(job, r - LANES, LANES, 1, before);          \
            float *const done = now;                                        \
            now = before;                                                   \
            before = done;                                                  \
            if (r + LANES >= to)                                            \
                LEVEL(put_rows)(job, r, n, 1, before);                      \
        }                                                                   \
    }
#define ROWS_WITH_FEW(name, rows, product, ...)                             \
    ROWS_WITH(1, name, rows(1), product, __VA_ARGS__)                       \
    ROWS_WITH(2, name, rows(2), product, __VA_ARGS__)                       \
    ROWS_WITH(3, name, rows(3), product, __VA_ARGS__)                       \
    ROWS_WITH(4, name, rows(4), product, __VA_ARGS__)
#define ROWS_WITH_MORE(name, rows, product, ...)                            \
    ROWS_WITH_FEW(name, rows, product, __VA_ARGS__)                         \
    ROWS_WITH(5, name, rows(5), product, __VA_ARGS__)                       \
    ROWS_WITH(6, name, rows(6), product, __VA_ARGS__)                       \
    ROWS_WITH(7, name, rows(7), product, __VA_ARGS__)                       \
    ROWS_WITH(8, name, rows(8), product, __VA_ARGS__)
#define NAMED_FEW(name) LEVEL(name##_1), LEVEL(name##_2), LEVEL(name##_3), LEVEL(name##_4)
#define NAMED_MORE(name) NAMED_FEW(name), LEVEL(name##_5), LEVEL(name##_6), LEVEL(name##_7), LEVEL(name##_8)
#define ONE_ROW(M) 1

ROWS_WITH_FEW(rows, FEW_ROWS, few)
ROWS_WITH_FEW(rows_apart, ONE_ROW, few_apart)
ROWS_WITH_MORE(rows_bfloat, FEW_ROWS, few_sixteen, , BFLOAT16)
ROWS_WITH_MORE(rows_half, FEW_ROWS, few_sixteen, , FLOAT16)
#if LEVEL_GRID
ROWS_WITH_FEW(rows_steps, FEW_ROWS, few_steps)
ROWS_WITH_FEW(rows_codes, FEW_ROWS, few_codes)
ROWS_WITH(1, rows_codes_of_one, FEW_ROWS(1), few_codes_of_one)
ROWS_WITH(1, rows_codes_low, FEW_ROWS(1), few_codes_low)
#endif
#if LEVEL_LOW
ROWS_WITH_MORE(rows_low, LOW_ROWS, few_low)
#endif

typedef void LEVEL(rows_with)(const struct job *, int64_t r, int64_t to);

/* What multiplies rows with the inputs that are packed. */
static LEVEL(rows_with) *LEVEL(rows_with_few)(const struct job *job)
{
    static LEVEL(rows_with) *const few[] = {NAMED_FEW(rows)}, *const apart[] = {NAMED_FEW(rows_apart)};
    static LEVEL(rows_with) *const bfloat[] = {NAMED_MORE(rows_bfloat)}, *const half[] = {NAMED_MORE(rows_half)};
    const struct weight *w = job->weight;
    const int64_t at = job->m1 - job->m0 - 1;
#if LEVEL_GRID
    static LEVEL(rows_with) *const steps[] = {NAMED_FEW(rows_steps)}, *const codes[] = {NAMED_FEW(rows_codes)};
    if (job->grid == CODES_OF_ONE)
        return job->low ? LEVEL(rows_codes_low_1) : LEVEL(rows_codes_of_one_1);
    if (job->grid)
        return (job->grid == CODES ? codes : steps)[at];
#endif
#if LEVEL_LOW
    static LEVEL(rows_with) *const low[] = {NAMED_MORE(rows_low)};
    if (job->low && w->order->whole_words)
        return low[at];
#endif
    if (!w->order)
        return (w->encoding == BFLOAT16 ? bfloat : half)[at];
    return (w->order->whole_words ? few : apart)[at];
}

/* Pack the inputs of a small batch side by side, vector by vector. */
static void LEVEL(pack_few)(struct job *job)
{
#if LEVEL_GRID
    job->grid = LEVEL(pack_grid)(job);
    if (job->grid)
        return;
#endif
#if LEVEL_LOW
    if (job->low && job->weight->order->whole_words) {
        for (int64_t m = job->m0; m < job->m1; m++)
            LEVEL(pack_low)(job, m);
        return;
    }
#endif
    const int64_t floats = (job->g1 - job->g0) * GROUP, batch = job->m1 - job->m0;
    if (floats != job->weight->columns)
        memset(job->packed, 0, (size_t)(batch * floats) * sizeof(float));
    for (int64_t m = 0; m < batch; m++)
        LEVEL(place_typed)(job, job->m0 + m, job->packed + m * LANES, batch);
}

/* The first part packs the inputs; the others multiply them with an update's A. */
static void LEVEL(pack_body)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    if (part == 0)
        LEVEL(pack_few)(job);
    if (job->update && !job->g0 && (part || parts == 1))
        LEVEL(narrow_body)(job, part - (parts > 1), parts - (parts > 1), thread);
}

static void LEVEL(few_body)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    (void)thread;
    int64_t r, to;
    share(job->weight->rows, SHARE_ROWS, parts, part, &r, &to);
    LEVEL(rows_with) *const rows = LEVEL(rows_with_few)(job);
    const struct update *u = job->g1 * GROUP < job->weight->columns ? NULL : job->update; /* once the rows are whole */
    for (int64_t end; r < to; r = end) {
        end = u ? smaller(r + UPDATE_ROWS, to) : to;
        for (int64_t i = r; u && i < end; i++) /* B, which is read from further away than it takes to multiply rows */
            for (int64_t k = 0; k < u->rank; k += 16)
                prefetch(u->b + i * u->rank + k);
        rows(job, r, end);
        if (u)
            LEVEL(add_wide)(job, r, end);
    }
}

#if LEVEL_GRID
#include "int8.h"
#endif

static void LEVEL(linear_piece)(struct job *job)
{
    if (job->batch <= few_inputs(job->weight, job->low))
        parallel(job, LEVEL(pack_body), !job->update ? 0 : job->packed_step ? 1 : 2, LEVEL(few_body), job->batch > FEW ? PARTS : 1);
    else
        parallel(job, LEVEL(by_panels)(job) ? LEVEL(pack_panels) : LEVEL(pack_many),
                 job->packed_step || job->m1 - job->m0 <= PACKED_ALONE ? 0 : PARTS, LEVEL(many_body), PARTS);
}

static void LEVEL(linear)(struct job *job)
{
    in_pieces(job, job->weight->stride / GROUP, wide_of(job->batch) / GROUP, LEVEL(linear_piece));
    if (job->update && job->batch > few_inputs(job->weight, job->low)) {
        job->packed_step = 0; /* its parts are shared */
        LEVEL(update)(job);
    }
}
