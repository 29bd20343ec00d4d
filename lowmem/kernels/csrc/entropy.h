/* The cross entropy of rows of logits, and its gradient in their place; lowmem/kernels/entropy.py has the definition. */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

INLINE void entropy_row(const struct entropy *call, int64_t row, const int type)
{
    const int64_t n = call->columns, whole = n / LANES * LANES, at = row * n, target = call->targets[row];
    const float smoothing = call->smoothing, spread = smoothing / (float)n;
    V tops = v_set1(-INFINITY), sums = v_zero(), shifts = v_zero();
    for (int64_t c = 0; c < whole; c += LANES)
        tops = v_larger(load_as(call->logits, type, at + c), tops);
    float top = largest_of(tops), sum, shift;
    for (int64_t c = whole; c < n; c++) {
        const float x = read_as_float(call->logits, type, at + c);
        top = x > top ? x : top;
    }
    const V most = v_set1(top);
    for (int64_t c = 0; c < whole; c += LANES) {
        const V x = v_sub(load_as(call->logits, type, at + c), most);
        sums = v_add(sums, v_exp_below(x));
        shifts = v_add(shifts, x);
    }
    sum = sum_of(sums);
    shift = sum_of(shifts);
    for (int64_t c = whole; c < n; c++) {
        const float x = read_as_float(call->logits, type, at + c) - top;
        sum += expf(x);
        shift += x;
    }
    const float log_sum = logf(sum), inverse = 1.0f / sum, own = read_as_float(call->logits, type, at + target) - top;
    float loss = (1.0f - smoothing) * (log_sum - own);
    if (smoothing != 0.0f) /* else 0 * shift would be NaN if a logit is minus infinity */
        loss += smoothing * log_sum - spread * shift;
    call->losses[row] = loss;
    if (!call->has_gradient)
        return;
    const V by = v_set1(inverse), less = v_set1(spread);
    for (int64_t c = 0; c < whole; c += LANES) {
        const V x = v_sub(load_as(call->logits, type, at + c), most);
        store_as(call->logits, type, at + c, v_sub(v_mul(v_exp_below(x), by), less));
    }
    for (int64_t c = whole; c < n; c++)
        write_as(call->logits, type, at + c, expf(read_as_float(call->logits, type, at + c) - top) * inverse - spread);
    write_as(call->logits, type, at + target, expf(own) * inverse - (1.0f - smoothing) - spread);
}

static void entropy_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct entropy *call = job->call;
    int64_t row, to;
    for (share(call->rows, 1, parts, part, &row, &to); row < to; row++)
        OF_TYPE(call->type, entropy_row, call, row);
}
