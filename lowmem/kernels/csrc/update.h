/* A low-rank update in float32: narrow = scaling * (x @ A.T), then out = base + narrow @ B.T. */
#pragma once
#include "reading.h"

/* out[j * LANES + i] = row i of a matrix (R, columns) times row j of x, as partial sums in the lanes, for `whole` columns. */
INLINE void dots(const float *matrix, int64_t columns, int64_t whole, const int R, const float *x, const int M, V *out)
{
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t c = 0; c < whole; c += LANES) {
        V row[4];
        EACH_ROW row[i] = v_load(matrix + i * columns + c);
        EACH_INPUT {
            const V value = v_load(x + j * columns + c);
            EACH_ROW acc[AT] = v_fma(row[i], value, acc[AT]);
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

/* Define dots_M(): the same for up to LANES rows and all columns, summed. There is a function for each M. */
#define DOTS_WITH(M)                                                                                      \
    OWN_FUNCTION dots_##M(const float *matrix, int64_t rows, int64_t columns, const float *x, float *out) \
    {                                                                                                     \
        const int64_t whole = columns / LANES * LANES;                                                    \
        V sums[M * LANES];                                                                                \
        int64_t i = 0;                                                                                    \
        for (; i + 4 <= rows; i += 4)                                                                     \
            dots(matrix + i * columns, columns, whole, 4, x, M, sums + i);                                \
        for (; i < rows; i++)                                                                             \
            dots(matrix + i * columns, columns, whole, 1, x, M, sums + i);                                \
        sum_lanes(sums, M, out);                                                                          \
        for (int64_t j = 0; j < M; j++)                                                                   \
            for (i = 0; i < rows; i++)                                                                    \
                for (int64_t c = whole; c < columns; c++)                                                 \
                    out[j * LANES + i] += matrix[i * columns + c] * x[j * columns + c];                   \
    }
DOTS_WITH(1)
DOTS_WITH(2)
DOTS_WITH(3)
DOTS_WITH(4)
static void (*const dots_with[])(const float *, int64_t, int64_t, const float *, float *) = {dots_1, dots_2, dots_3, dots_4};

/* out = base + scale * (x @ matrix.T) for rows r to `to` of a matrix (rows, columns); base may be NULL. */
INLINE void small_product(int64_t batch, int64_t r, int64_t to, const float *matrix, int64_t rows, int64_t columns,
                                 const float *x, const float *base, float scale, float *out)
{
    for (int64_t n; r < to; r += n) {
        float sums[UPDATED * LANES];
        n = smaller(LANES, to - r);
        for (int64_t m = 0; m < batch; m += FEW)
            dots_with[smaller(FEW, batch - m) - 1](matrix + r * columns, n, columns, x + m * columns, sums + m * LANES);
        for (int64_t m = 0; m < batch; m++) {
            const V sum = v_mul(v_load(sums + m * LANES), v_set1(scale));
            store_some(out, FLOAT32, m * rows + r, n, base ? v_add(load_some(base, FLOAT32, m * rows + r, n), sum) : sum);
        }
    }
}

/* narrow = scaling * (x @ A.T), for a part of the rank. */
static void narrow_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct update *u = job->update;
    int64_t r, to;
    share(u->rank, 4, parts, part, &r, &to);
    small_product(job->batch, r, to, u->a, u->rank, u->columns, u->x, NULL, u->scaling, u->narrow);
}

/* out = base + narrow @ B.T, for rows r to `to` of B. */
static void add_wide(const struct job *job, int64_t r, int64_t to)
{
    const struct update *u = job->update;
    small_product(job->batch, r, to, u->b, u->rows, u->rank, u->narrow, u->base, 1.0f, u->out);
}

static void wide_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    int64_t r, to;
    share(job->update->rows, 4, parts, part, &r, &to);
    add_wide(job, r, to);
}
