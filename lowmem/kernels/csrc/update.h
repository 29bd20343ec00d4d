/* Products with a dense float32 matrix, and a low-rank update of two of them: narrow = scaling * (x @ A.T), then out = base + narrow @ B.T. */
#pragma once
#include "reading.h"
#include "row_calls.h"

/* out[j * LANES + i] = row i of a matrix (R, columns) times row j of x, whose first number is number `from`, as partial sums in the
 * lanes, for `whole` columns. */
INLINE void dots(const float *matrix, int64_t columns, int64_t whole, const int R, const void *x, int64_t from, const int M, V *out, const int type)
{
    V acc[FEW_SUMS];
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t c = 0; c < whole; c += LANES) {
        V row[4];
        EACH_ROW row[i] = v_load(matrix + i * columns + c);
        EACH_INPUT {
            const V value = load_as(x, type, from + j * columns + c);
            EACH_ROW acc[AT] = v_fma(row[i], value, acc[AT]);
        }
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

/* The same for up to LANES rows and all columns, summed. */
INLINE void summed_dots(const float *matrix, int64_t rows, int64_t columns, const void *x, int64_t from, float *out, const int M, const int type)
{
    const int64_t whole = columns / LANES * LANES;
    V sums[M * LANES];
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
        dots(matrix + i * columns, columns, whole, 4, x, from, M, sums + i, type);
    for (; i < rows; i++)
        dots(matrix + i * columns, columns, whole, 1, x, from, M, sums + i, type);
    sum_lanes(sums, M, out);
    for (int64_t j = 0; j < M; j++)
        for (i = 0; i < rows; i++)
            for (int64_t c = whole; c < columns; c++)
                out[j * LANES + i] += matrix[i * columns + c] * read_as_float(x, type, from + j * columns + c);
}

/* Define dots_M(): the same for x of any type. There is a function for each M. */
#define DOTS_WITH(M)                                                                                                                    \
    OWN_FUNCTION dots_##M(const float *matrix, int64_t rows, int64_t columns, const void *x, int64_t from, int type, float *out)        \
    {                                                                                                                                   \
        OF_TYPE(type, summed_dots, matrix, rows, columns, x, from, out, M);                                                             \
    }
DOTS_WITH(1)
DOTS_WITH(2)
DOTS_WITH(3)
DOTS_WITH(4)
static void (*const dots_with[])(const float *, int64_t, int64_t, const void *, int64_t, int, float *) = {dots_1, dots_2, dots_3, dots_4};

/* out = base + scale * sums, n numbers from number i on; base may be NULL. */
INLINE void put_sums_of_dots(void *out, const void *base, int64_t i, int64_t n, float scale, const float *sums, const int type)
{
    const V sum = v_mul(v_load(sums), v_set1(scale));
    store_some(out, type, i, n, base ? v_add(load_some(base, type, i, n), sum) : sum);
}

/* Rows r to `to` of the matrix of a product. */
INLINE void multiply_dense(const struct dense_product *call, int64_t r, int64_t to)
{
    for (int64_t n; r < to; r += n) {
        float sums[FEW * LANES];
        n = smaller(LANES, to - r);
        for (int64_t m = 0; m < call->batch; m += FEW) {
            const int64_t M = smaller(FEW, call->batch - m);
            dots_with[M - 1](call->matrix + r * call->columns, n, call->columns, call->x, m * call->columns, (int)call->type, sums);
            for (int64_t j = 0; j < M; j++)
                OF_TYPE(call->out_type, put_sums_of_dots, call->out, call->base, (m + j) * call->rows + r, n, call->scale, sums + j * LANES);
        }
    }
}

static void dense_product_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct dense_product *call = job->call;
    int64_t r, to;
    share(call->rows, 4, parts, part, &r, &to);
    multiply_dense(call, r, to);
}

/* narrow = scaling * (x @ A.T), for a part of the rank. */
static void narrow_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct update *u = job->update;
    int64_t r, to;
    share(u->rank, 4, parts, part, &r, &to);
    const struct dense_product narrow = {
        .batch = job->batch, .rows = u->rank, .columns = u->columns, .scale = u->scaling, .x = u->x, .matrix = u->a, .out = u->narrow,
    };
    multiply_dense(&narrow, r, to);
}

/* out = base + narrow @ B.T, for rows r to `to` of B. */
static void add_wide(const struct job *job, int64_t r, int64_t to)
{
    const struct update *u = job->update;
    const struct dense_product wide = {
        .batch = job->batch, .rows = u->rows, .columns = u->rank, .scale = 1.0f, .x = u->narrow, .matrix = u->b, .base = u->base, .out = u->out,
    };
    multiply_dense(&wide, r, to);
}

static void wide_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    int64_t r, to;
    share(job->update->rows, 4, parts, part, &r, &to);
    add_wide(job, r, to);
}
