/* RMS norms of rows and their gradients, computed in float32 and rounded once; lowmem/kernels/rms_norm_and_gating.py has the definition. */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

INLINE V factor_of(const struct norm *call, int64_t c, int64_t n)
{
    const V factor = call->factor_type == FLOAT32    ? load_some(call->factor, FLOAT32, c, n)
                     : call->factor_type == BFLOAT16 ? load_some(call->factor, BFLOAT16, c, n)
                                                     : load_some(call->factor, FLOAT16, c, n);
    return v_add(factor, v_set1(call->offset));
}

/* out = x / rms(x) * factor; gradient: out = d rms_norm / dx * grad. */
INLINE void norm_row(const struct norm *call, int64_t row, const int gradient, const int type)
{
    const int64_t at = row * call->columns;
    V squares = v_zero(), dots = v_zero();
    EACH_VECTOR_OF_ROW(call->columns) {
        const V x = load_some(call->x, type, at + c, n);
        squares = v_fma(x, x, squares);
        if (gradient)
            dots = v_fma(v_mul(load_some(call->grad, type, at + c, n), factor_of(call, c, n)), x, dots);
    }
    V both[LANES] = {squares, dots};
    float sums[LANES];
    v_store(sums, v_sums(both));
    const float inverse = 1.0f / sqrtf(sums[0] / (float)call->columns + call->eps);
    const V by = v_set1(inverse), back = v_set1(sums[1] * inverse / (float)call->columns * inverse * inverse);
    EACH_VECTOR_OF_ROW(call->columns) {
        const V x = load_some(call->x, type, at + c, n), factor = factor_of(call, c, n);
        V out = v_mul(gradient ? v_mul(load_some(call->grad, type, at + c, n), factor) : x, by);
        if (!gradient && call->rounds_first) {
            store_some(call->out, type, at + c, n, out);
            out = load_some(call->out, type, at + c, n);
        }
        store_some(call->out, type, at + c, n, gradient ? v_sub(out, v_mul(back, x)) : v_mul(out, factor));
    }
}

static void norm_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct norm *call = job->call;
    int64_t row, to;
    for (share(call->rows, 1, parts, part, &row, &to); row < to; row++)
        call->grad ? OF_WIDE(call->type, norm_row, call, row, 1) : OF_WIDE(call->type, norm_row, call, row, 0);
}
