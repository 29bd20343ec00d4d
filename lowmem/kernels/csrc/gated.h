/* Gated activations of rows and their gradients, in float32, rounded once (lowmem/kernels/rms_norm_and_gating.py). */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

/* out = act(a) b (see row_calls.h); b is 1 if it is NULL. With `gradient`: out[0] and out[1] = the gradients of a and b. */
INLINE void gated_row(const struct gated *call, int64_t row, const int gradient, const int type, const int wide)
{
    const V one = v_set1(1.0f);
    int last = 6;
    while (last && call->terms[last] == 0.0f)
        last--;
    const int64_t at = row * call->step, out = row * call->columns, to = row * call->out_step;
    EACH_VECTOR_OF_ROW(call->columns) {
        const V a = load_some(call->a, type, at + c, n), b = call->b ? load_some(call->b, type, at + c, n) : one;
        const V x = v_within(a), square = v_mul(x, x);
        V sum = v_set1(call->terms[last]), slope = v_set1(call->terms[last] * (float)(2 * last + 1)); /* z / a, dz / da */
        for (int i = last; i--;) {
            sum = v_fma(sum, square, v_set1(call->terms[i]));
            if (gradient)
                slope = v_fma(slope, square, v_set1(call->terms[i] * (float)(2 * i + 1)));
        }
        const V z = v_within(v_mul(x, sum));
        const V s = v_div(one, v_add(one, v_exp(v_sub(v_zero(), z)))), act = v_mul(a, s);
        if (gradient) {
            const V g = load_some(call->grad, wide, out + c, n);
            store_some(call->out, wide, to + c, n, v_mul(v_mul(g, b), v_fma(v_mul(v_mul(x, s), v_sub(one, s)), slope, s)));
            if (call->out_b)
                store_some(call->out_b, wide, to + c, n, v_mul(g, act));
        } else {
            store_some(call->out, wide, to + c, n, v_mul(act, b));
        }
    }
}

INLINE void gated_rows(const struct gated *call, int64_t row, int64_t to, const int gradient)
{
    for (; row < to; row++)
        if (call->type == FLOAT32)
            gated_row(call, row, gradient, FLOAT32, FLOAT32);
        else
            OF_WIDE(call->wide, gated_row, call, row, gradient, BFLOAT16);
}

static void gated_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct gated *call = job->call;
    int64_t row, to;
    share(call->rows, 1, parts, part, &row, &to);
    call->grad ? gated_rows(call, row, to, 1) : gated_rows(call, row, to, 0);
}
