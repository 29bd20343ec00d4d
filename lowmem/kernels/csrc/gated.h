/* Gated activations of rows and their gradients, in float32, rounded once (lowmem/kernels/rms_norm_and_gating.py). */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

/* act(a) = a sigmoid(z) (see row_calls.h), whose terms behind `last` are zero; with `gradient`, `slope` = its derivative. */
INLINE V gated_sigmoid(const struct gated *call, V a, const int last, const int gradient, V *slope)
{
    const V one = v_set1(1.0f), x = v_within(a), square = v_mul(x, x);
    V sum = v_set1(call->terms[last]), rise = v_set1(call->terms[last] * (float)(2 * last + 1)); /* z / a, dz / da */
    for (int i = last; i--;) {
        sum = v_fma(sum, square, v_set1(call->terms[i]));
        if (gradient)
            rise = v_fma(rise, square, v_set1(call->terms[i] * (float)(2 * i + 1)));
    }
    const V z = v_within(v_mul(x, sum));
    const V s = v_div(one, v_add(one, v_exp(v_sub(v_zero(), z))));
    if (gradient)
        *slope = v_fma(v_mul(v_mul(x, s), v_sub(one, s)), rise, s);
    return v_mul(a, s);
}

/* act(a) = relu(a)^2, with its derivative; a NaN stays a NaN. */
INLINE V gated_squared_relu(V a, V *slope)
{
    const V positive = v_where((I)(a < v_zero()), v_zero(), a);
    *slope = v_add(positive, positive);
    return v_mul(positive, positive);
}

/* out = act(a) b (see row_calls.h); b is 1 if it is NULL. With `gradient`: out[0] and out[1] = the gradients of a and b. */
INLINE void gated_row(const struct gated *call, int64_t row, const int gradient, const int squares, const int type, const int wide)
{
    const V one = v_set1(1.0f);
    int last = 6;
    while (last && call->terms[last] == 0.0f)
        last--;
    const int64_t at = row * call->step, out = row * call->columns, to = row * call->out_step;
    EACH_VECTOR_OF_ROW(call->columns) {
        const V a = load_some(call->a, type, at + c, n), b = call->b ? load_some(call->b, type, at + c, n) : one;
        V slope = one;
        const V act = squares ? gated_squared_relu(a, &slope) : gated_sigmoid(call, a, last, gradient, &slope);
        if (gradient) {
            const V g = load_some(call->grad, wide, out + c, n);
            store_some(call->out, wide, to + c, n, v_mul(v_mul(g, b), slope));
            if (call->out_b)
                store_some(call->out_b, wide, to + c, n, v_mul(g, act));
        } else {
            store_some(call->out, wide, to + c, n, v_mul(act, b));
        }
    }
}

INLINE void gated_rows(const struct gated *call, int64_t row, int64_t to, const int gradient, const int squares)
{
    for (; row < to; row++)
        if (call->type == FLOAT32)
            gated_row(call, row, gradient, squares, FLOAT32, FLOAT32);
        else
            OF_WIDE(call->wide, gated_row, call, row, gradient, squares, BFLOAT16);
}

static void gated_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct gated *call = job->call;
    int64_t row, to;
    share(call->rows, 1, parts, part, &row, &to);
    if (call->is_squared_relu)
        call->grad ? gated_rows(call, row, to, 1, 1) : gated_rows(call, row, to, 0, 1);
    else
        call->grad ? gated_rows(call, row, to, 1, 0) : gated_rows(call, row, to, 0, 0);
}
