/* x @ W.T for a small batch. Columns lie across the lanes, codes are decoded in registers, and each row of W is read once for
 * all batch rows. many.h serves larger batches. */

/* Pack batch row m as float32 in the order of the codes; its vectors are `step` vectors apart. Padding is not written. */
INLINE void place_input(const struct job *job, int64_t m, float *out, int64_t step, const int type)
{
    const struct weight *w = job->weight;
    const int64_t before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP, from = m * w->columns;
    if (!w->order) { /* codes of 8 bits and 16-bit weights keep the order of the columns */
        const int64_t end = smaller(w->columns, before + floats);
        for (int64_t c = before; c < end; c += LANES, out += step * LANES)
            v_store(out, load_some(job->x, type, from + c, end - c));
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

/* Loops over R rows and M batch rows. They must be unrolled, so that arrays indexed by AT become registers. */
#define EACH_ROW _Pragma("GCC unroll 4") for (int i = 0; i < R; i++)
#define EACH_INPUT _Pragma("GCC unroll 8") for (int j = 0; j < M; j++)
#define AT (i * M + j)
#define FEW_SUMS 16 /* most rows times batch rows: sums in registers */
/* Most products that are added in one chain; in longer chains too much rounding error accumulates. */
#define FEW_CHAIN 32
/* A function for one number of batch rows, not inlined, so that its loop has all registers for itself. */
#define OWN_FUNCTION static __attribute__((noinline)) void

/* out[j * LANES + i] = the sum of the lanes of sums[j * LANES + i]. */
INLINE void sum_lanes(V *sums, const int M, float *out)
{
    for (int j = 0; j < M; j++)
        v_store(out + j * LANES, v_sums(sums + j * LANES));
}

/* out[i] = row scale / row_steps of row r + i, which a block's steps are multiplied with; zero without double quantization. */
INLINE void row_units(const struct weight *w, int64_t r, const int R, V *out)
{
    EACH_ROW out[i] = v_zero();
    if (w->encoding >= SCALES_DOUBLE)
        EACH_ROW out[i] = v_set1(row_scale(w, r + i) / row_steps(w));
}

/* The codes to prefetch while group g of R rows is multiplied: of rows 8 * R further. Rows are contiguous, so that the lines of
 * all R rows together are fetched in order, R lines of LANES * 4 bytes per group. */
INLINE const uint8_t *codes_soon(const struct weight *w, int64_t r, int64_t g, const int R)
{
    return w->packed + (r + 8 * R) * w->row_bytes + g * LANES * 4 * R;
}

/* The scales of R rows, for up to LANES blocks from `first` on. `unit` is what row_units returns. */
INLINE void few_scales(const struct weight *w, int64_t r, int64_t first, const int R, const V *unit, V *out)
{
    const int64_t stride = scale_bytes(w), n = w->blocks - first;
    const uint8_t *p = w->scales + r * stride;
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

/* Load a group of words of R rows, `left` bytes of which exist. A short group is copied first, so that both cases share one
 * load: with two paths the compiler keeps the words on the stack. */
INLINE void few_words(const uint8_t *p, int64_t row_bytes, int64_t left, const int R, W *words)
{
    uint8_t rest[4][LANES * 4]; /* padded with zeros */
    if (left < LANES * 4) {
        EACH_ROW v_store((float *)rest[i], v_of_words(words_load(p + i * row_bytes, left)));
        p = rest[0];
        row_bytes = LANES * 4;
    }
    EACH_ROW words[i] = words_load(p + i * row_bytes, LANES * 4);
}

/* The state of reading R rows by groups: `words` are the group's codes, `scale` has the scale of each word. */
struct reading {
    const uint8_t *p, *soon;
    const int32_t *block;
    int64_t first; /* block of the first scale in `stored` */
    V unit[4], stored[4], scale[4];
    W words[4];
};

INLINE void begin_reading(struct reading *at, const struct weight *w, int64_t r, int64_t g, const int R)
{
    at->p = w->packed + r * w->row_bytes + g * LANES * 4;
    at->soon = codes_soon(w, r, g, R);
    at->block = w->order->block + g * LANES;
    at->first = -1;
    row_units(w, r, R, at->unit);
    EACH_ROW at->stored[i] = v_zero();
}

INLINE void read_group(struct reading *at, const struct weight *w, int64_t r, int64_t g, const int R)
{
    EACH_ROW prefetch(at->soon + i * LANES * 4);
    if (w->order->first_block[g] != at->first)
        few_scales(w, r, at->first = w->order->first_block[g], R, at->unit, at->stored);
    few_words(at->p, w->row_bytes, w->row_bytes - g * LANES * 4, R, at->words);
    EACH_ROW at->scale[i] = v_spread(at->stored[i], at->block);
    at->p += LANES * 4;
    at->soon += LANES * 4 * R;
    at->block += LANES;
}

/* out[j * LANES + i] = row r + i times batch row j, as partial sums in the lanes. Codes are decoded in registers. A
 * block's products are summed before they are multiplied with its scale. */
INLINE void few(const struct job *job, int64_t r, const int R, const int M, V *out)
{
    const struct weight *w = job->weight;
    const float *x = job->packed;
    const T table = table_load(w->levels);
    struct reading at;
    V acc[FEW_SUMS], sum[FEW_SUMS];
    begin_reading(&at, w, r, job->g0, R);
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t g = job->g0; g < job->g1; g++, x += M * GROUP) {
        read_group(&at, w, r, g, R);
        EACH_ROW EACH_INPUT sum[AT] = v_zero();
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            V level[4];
            EACH_ROW level[i] = v_lookup(table, at.words[i], k);
            EACH_INPUT {
                V value = v_load(x + (k * M + j) * LANES);
                if (M > 2)
                    v_keep(value);
                EACH_ROW sum[AT] = v_fma(level[i], value, sum[AT]);
            }
        }
        EACH_ROW EACH_INPUT acc[AT] = v_fma(sum[AT], at.scale[i], acc[AT]);
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

/* The same for 16-bit weights. */
INLINE void few_sixteen(const struct job *job, int64_t r, const int R, const int M, V *out, const int type)
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
            EACH_ROW row[i] = sixteen(rows + i * stride + c, type);
            /* once per cache line; rows come from memory faster than the hardware prefetcher predicts */
            if (c % 32 == 0)
                EACH_ROW prefetch(rows + (i + 8 * R) * stride + c);
            EACH_INPUT {
                const V value = v_load(x + j * LANES);
                EACH_ROW acc[AT] = v_fma(row[i], value, acc[AT]);
            }
        }
        EACH_ROW EACH_INPUT sums[AT] = v_add(sums[AT], acc[AT]);
    }
    if (whole < columns) { /* x is padded with zeros */
        V rest[4];
        EACH_ROW rest[i] = load_some(rows + i * stride, type, whole, columns - whole);
        EACH_INPUT EACH_ROW sums[AT] = v_fma(rest[i], v_load(x + j * LANES), sums[AT]);
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = sums[AT];
}

#include "eight.h"
#if ISA_BFLOAT16
#include "bfloat16.h"
#else /* substitutes for the names of bfloat16.h, in code that no kernel of this ISA runs */
#define table_bf16 table_load
#define pair_levels v_lookup
#define spread_pair(p) v_set1(*(p))
#define multiply_pairs v_fma
#define pairs(even, odd) ((void)(odd), (even))
#define adjacent(words) (words)
#endif
#include "pack.h"
#include "update.h"
#include "many.h"

/* Define name_M(): rows r to `to` times M batch rows, LANES rows at a time. There is a function for each M, which has the
 * registers for itself. */
#define ROWS_WITH(M, name, rows, product, ...)                            \
    OWN_FUNCTION name##_##M(const struct job *job, int64_t r, int64_t to) \
    {                                                                     \
        for (; r < to; r += LANES) {                                      \
            V sums[M * LANES];                                            \
            float out[M * LANES];                                         \
            const int n = (int)smaller(LANES, to - r);                    \
            int i = 0;                                                    \
            for (; i + rows <= n; i += rows)                              \
                product(job, r + i, rows, M, sums + i __VA_ARGS__);       \
            for (; i < n; i++)                                            \
                product(job, r + i, 1, M, sums + i __VA_ARGS__);          \
            sum_lanes(sums, M, out);                                      \
            put_rows(job, r, n, 1, out);                                  \
        }                                                                 \
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
#define NAMED_FEW(name) name##_1, name##_2, name##_3, name##_4
#define NAMED_MORE(name) NAMED_FEW(name), name##_5, name##_6, name##_7, name##_8

ROWS_WITH_FEW(rows, FEW_ROWS, few)
ROWS_WITH_MORE(rows_bfloat, FEW_ROWS, few_sixteen, , BFLOAT16)
ROWS_WITH_MORE(rows_half, FEW_ROWS, few_sixteen, , FLOAT16)
ROWS_WITH_MORE(rows_eight, FEW_ROWS, few_eight)
#if ISA_BFLOAT16
ROWS_WITH_MORE(rows_bf16, BF16_ROWS, few_bf16)
#endif

/* Multiplies rows r to `to` with the packed batch rows; there is a function for each number of them. */
typedef void rows_with(const struct job *, int64_t r, int64_t to);

/* Pack a small batch as float32: vector by vector, all batch rows side by side. */
static void put_few(struct job *job)
{
    const int64_t floats = (job->g1 - job->g0) * GROUP, batch = job->m1 - job->m0;
    if (floats != job->weight->columns)
        memset(job->packed, 0, (size_t)(batch * floats) * sizeof(float));
    for (int64_t m = 0; m < batch; m++)
        OF_TYPE(job->type, place_input, job, job->m0 + m, job->packed + m * LANES, batch);
}

/* The first part packs x; the others compute the narrow product of a low-rank update. */
static void pack_few(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    if (part == 0)
        put_few(job);
    if (job->update && !job->g0 && (part || parts == 1))
        narrow_body(job, part - (parts > 1), parts - (parts > 1), thread);
}

/* Multiply the rows of a part, by the function for the number of packed batch rows, and add the low-rank update. */
INLINE void few_rows(struct job *job, int64_t part, int64_t parts, rows_with *const *rows)
{
    int64_t r, to;
    share(job->weight->rows, SHARE_ROWS, parts, part, &r, &to);
    /* An update is added with the last groups of columns, when the sums are complete. */
    const struct update *u = job->g1 * GROUP < job->weight->columns ? NULL : job->update;
    for (int64_t end; r < to; r = end) {
        end = u ? smaller(r + UPDATE_ROWS, to) : to;
        /* prefetch rows of B: loading them takes longer than multiplying these rows of W */
        for (int64_t i = r; u && i < end; i++)
            for (int64_t k = 0; k < u->rank; k += 16)
                prefetch(u->b + i * u->rank + k);
        rows[job->m1 - job->m0 - 1](job, r, end);
        if (u)
            add_wide(job, r, end);
    }
}

/* The kernels for a small batch: NAME_body is the function of kernel NAME in the table of an ISA. */
static void few_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    static rows_with *const rows[] = {NAMED_FEW(rows)};
    few_rows(job, part, parts, rows);
}

static void few_sixteen_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    static rows_with *const bfloats[] = {NAMED_MORE(rows_bfloat)}, *const halves[] = {NAMED_MORE(rows_half)};
    few_rows(job, part, parts, job->weight->encoding == BFLOAT16 ? bfloats : halves);
}

static void few_eight_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    static rows_with *const eights[] = {NAMED_MORE(rows_eight)};
    few_rows(job, part, parts, eights);
}

/* Dequantize a part of the rows, for struct isa. */
static void dequantize_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    float scales[TILE_SCALES];
    int64_t r, to;
    share(job->weight->rows, 1, parts, part, &r, &to);
    if (job->weight->levels)
        OF_TYPE(job->out_type, dequantize_rows, job, r, to, scales);
    else
        OF_TYPE(job->out_type, dequantize_eight, job, r, to, scales);
}

#if ISA_BFLOAT16
static void pack_few_bf16(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    for (int64_t m = job->m0; m < job->m1; m++)
        pack_bf16(job, m);
}

static void few_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    static rows_with *const rows[] = {NAMED_MORE(rows_bf16)};
    few_rows(job, part, parts, rows);
}
#endif
