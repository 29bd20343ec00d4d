/* Columns of a weight, rounded one after the other for the errors of those before it (lowmem/kernels/column_rounding.py). */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

enum { MOST_COLUMNS = 64 }; /* most columns of a call */

/* Round all columns for up to LANES rows of the weight, from row `at` on. */
INLINE void round_columns(const struct rounding *call, int64_t at, const int descends)
{
    const T table = table_load(call->levels);
    const B boundaries = boundaries_load(call->boundaries);
    const int64_t n = call->rows - at;
    V changes[MOST_COLUMNS];
    uint8_t codes[MAX_LANES];
    for (int64_t i = 0; i < call->columns; i++, at += call->rows) {
        const V scale = load_some(call->scales, FLOAT32, at, n), pivot = v_set1(call->pivots[i]);
        const V divisor = v_where((I)(scale == v_zero()), v_set1(float_of(0x7f800000)), scale);
        V left = load_some(call->values, FLOAT32, at, n);
        for (int64_t j = 0; j < i; j++)
            left = v_fma(v_set1(-call->matrix[i * call->columns + j]), changes[j], left);
        const V before = load_some(call->approximate, FLOAT32, at, n);
        const W code = v_code(boundaries, v_div(descends ? v_add(before, v_div(left, pivot)) : left, divisor));
        const V near = v_mul(v_lookup(table, code, 0), scale);
        changes[i] = descends ? v_sub(near, before) : v_div(v_sub(left, near), pivot);
        store_some(call->values, FLOAT32, at, n, changes[i]);
        store_some(call->approximate, FLOAT32, at, n, near);
        codes_store(codes, code);
        memcpy(call->codes + at, codes, (size_t)smaller(n, LANES));
    }
}

static void round_columns_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct rounding *call = job->call;
    int64_t row, to;
    for (share(call->rows, LANES, parts, part, &row, &to); row < to; row += LANES)
        call->descends ? round_columns(call, row, 1) : round_columns(call, row, 0);
}
