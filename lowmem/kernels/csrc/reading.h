/* What kernels for a small batch share: loops over rows and batch rows in registers, and reading R rows by groups. */
#pragma once
#include "many.h"

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

/* The first row to prefetch while R rows from r on are multiplied: about 2 KiB of codes further, whole steps of R rows. */
INLINE int64_t row_soon(const struct weight *w, int64_t r, const int R) { return r + (1 + 2048 / (R * w->row_bytes)) * R; }

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

/* Load a group of words, of which `left` bytes exist: a copy of a short group, since two loads would need the stack. */
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
    at->soon = w->packed + row_soon(w, r, R) * w->row_bytes + g * LANES * 4 * R; /* lines are fetched in order */
    at->block = w->order->block + g * LANES;
    at->first = -1;
    row_units(w, r, R, at->unit);
    EACH_ROW at->stored[i] = v_zero();
    for (int64_t line = 0; line < R * scale_bytes(w); line += 64)
        prefetch(w->scales + row_soon(w, r, R) * scale_bytes(w) + line);
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

/* Where a product with offsets keeps the sums of x over blocks, a row for each packed batch row: behind packed x. */
INLINE float *block_sums(const struct job *job)
{
    return job->packed + (job->m1 - job->m0) * (job->g1 - job->g0) * GROUP * job->kernel->number / 4;
}

/* A row's offsets times the sums, in the lanes. */
INLINE void dot_offsets(const struct weight *w, const uint8_t *p, const float *sums, V *dot, const int encoding)
{
    for (int64_t b = 0; b < w->blocks; b += LANES)
        *dot = v_fma(v_scales(p, w->blocks + b, w->blocks - b, encoding), v_load(sums + b), *dot);
}

/* Add the offsets of n rows from r on, times the sums of x over blocks. */
static __attribute__((noinline)) void add_offsets(const struct job *job, int64_t r, int64_t n, int64_t batch, float *out)
{
    const struct weight *w = job->weight;
    const float *sums = block_sums(job);
    const uint8_t *p = w->scales + r * scale_bytes(w);
    for (int64_t j = 0; j < batch; j++, sums += padded_blocks(w), out += LANES) {
        V dots[LANES] = {{0}};
        for (int64_t i = 0; i < n; i++)
            w->encoding == SCALES_FLOAT16 ? dot_offsets(w, p + i * scale_bytes(w), sums, dots + i, SCALES_FLOAT16)
                                          : dot_offsets(w, p + i * scale_bytes(w), sums, dots + i, SCALES_FLOAT32);
        v_store(out, v_add(v_load(out), v_sums(dots)));
    }
}

/* Multiplies rows r to `to` with the packed batch rows. */
typedef void rows_with(const struct job *, int64_t r, int64_t to);

/* Define name_M(), rows r to `to` times M batch rows, each with all registers for itself, and the table `name` of them. */
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
            if (job->weight->offsets && !job->g0)                         \
                add_offsets(job, r, n, M, out);                           \
            put_rows(job, r, n, 1, out);                                  \
        }                                                                 \
    }
#define ROWS_WITH_4(name, rows, product, ...)         \
    ROWS_WITH(1, name, rows(1), product, __VA_ARGS__) \
    ROWS_WITH(2, name, rows(2), product, __VA_ARGS__) \
    ROWS_WITH(3, name, rows(3), product, __VA_ARGS__) \
    ROWS_WITH(4, name, rows(4), product, __VA_ARGS__)
#define ROWS_WITH_FEW(name, rows, product, ...)   \
    ROWS_WITH_4(name, rows, product, __VA_ARGS__) \
    static rows_with *const name[] = {name##_1, name##_2, name##_3, name##_4};
#define ROWS_WITH_MORE(name, rows, product, ...)      \
    ROWS_WITH_4(name, rows, product, __VA_ARGS__)     \
    ROWS_WITH(5, name, rows(5), product, __VA_ARGS__) \
    ROWS_WITH(6, name, rows(6), product, __VA_ARGS__) \
    ROWS_WITH(7, name, rows(7), product, __VA_ARGS__) \
    ROWS_WITH(8, name, rows(8), product, __VA_ARGS__) \
    static rows_with *const name[] = {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8};
