/* Row-wise operations: RMS norms and gated activations, forward and backward, here; cross entropy (entropy.h), 8-bit
 * codes (codes.h) and the rounding of a weight's columns (columns.h). Norms and activations are computed in float32
 * and rounded once; lowmem/kernels/rowwise.py has their definitions. */

#define EACH_VECTOR_OF_ROW for (int64_t c = 0, n; (n = r->columns - c) > 0; c += LANES)

/* Clamp to -88 and 88, between which e^x does not overflow; a NaN stays a NaN. */
INLINE V v_within(V x)
{
    const V most = v_set1(88.0f), least = v_set1(-88.0f);
    return v_where((I)(x > most), most, v_where((I)(x < least), least, x));
}

/* e^x = 2^n e^s with |s| <= log(2) / 2, by the polynomial of the Cephes library. x must be within -88 and 88. */
INLINE V v_exp(V x)
{
    static const float of[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f};
    const V shift = v_set1(0x1.8p23f + 127), t = v_fma(x, v_set1(1.44269504f), shift), n = v_sub(t, shift); /* t's low bits: n + 127 */
    const V s = v_fma(n, v_set1(2.12194440e-4f), v_fma(n, v_set1(-0.693359375f), x));
    V sum = v_set1(of[0]);
    for (int i = 1; i < 6; i++)
        sum = v_fma(sum, s, v_set1(of[i]));
    return v_mul(v_fma(sum, v_mul(s, s), v_add(s, v_set1(1.0f))), (V)((I)t << 23));
}

/* out = x / rms(x) * factor; gradient: out = d rms_norm / dx * grad. */
INLINE void norm_row(const struct rowwise *r, int64_t row, const int gradient, const int type)
{
    const int64_t at = row * r->columns;
    V squares = v_zero(), dots = v_zero();
    EACH_VECTOR_OF_ROW {
        const V x = load_some(r->a, type, at + c, n);
        squares = v_fma(x, x, squares);
        if (gradient)
            dots = v_fma(v_mul(load_some(r->grad, type, at + c, n), load_some(r->b, FLOAT32, c, n)), x, dots);
    }
    V both[LANES] = {squares, dots};
    float sums[LANES];
    v_store(sums, v_sums(both));
    const float inverse = 1.0f / sqrtf(sums[0] / (float)r->columns + r->numbers[0]);
    const V by = v_set1(inverse), back = v_set1(sums[1] * inverse / (float)r->columns * inverse * inverse);
    EACH_VECTOR_OF_ROW {
        const V x = load_some(r->a, type, at + c, n), factor = load_some(r->b, FLOAT32, c, n);
        V out = v_mul(gradient ? v_mul(load_some(r->grad, type, at + c, n), factor) : x, by);
        if (!gradient && r->numbers[1] != 0.0f) { /* rounds before it multiplies */
            store_some(r->out[0], type, at + c, n, out);
            out = load_some(r->out[0], type, at + c, n);
        }
        store_some(r->out[0], type, at + c, n, gradient ? v_sub(out, v_mul(back, x)) : v_mul(out, factor));
    }
}

/* out = act(a) b, where act(a) = a sigmoid(z) and z = numbers[0] a + numbers[1] a^3 + ...; b is 1 if it is NULL. With
 * `gradient`: out[0] and out[1] = the gradients of a and b. */
INLINE void gated_row(const struct rowwise *r, int64_t row, const int gradient, const int type, const int wide)
{
    const V one = v_set1(1.0f);
    int last = 6;
    while (last && r->numbers[last] == 0.0f)
        last--;
    const int64_t at = row * r->step, out = row * r->columns, to = row * r->out_step;
    EACH_VECTOR_OF_ROW {
        const V a = load_some(r->a, type, at + c, n), b = r->b ? load_some(r->b, type, at + c, n) : one;
        const V x = v_within(a), square = v_mul(x, x);
        V sum = v_set1(r->numbers[last]), slope = v_set1(r->numbers[last] * (float)(2 * last + 1)); /* z / a, dz / da */
        for (int i = last; i--;) {
            sum = v_fma(sum, square, v_set1(r->numbers[i]));
            if (gradient)
                slope = v_fma(slope, square, v_set1(r->numbers[i] * (float)(2 * i + 1)));
        }
        const V z = v_within(v_mul(x, sum));
        const V s = v_div(one, v_add(one, v_exp(v_sub(v_zero(), z)))), act = v_mul(a, s);
        if (gradient) {
            const V g = load_some(r->grad, wide, out + c, n);
            store_some(r->out[0], wide, to + c, n, v_mul(v_mul(g, b), v_fma(v_mul(v_mul(x, s), v_sub(one, s)), slope, s)));
            if (r->out[1])
                store_some(r->out[1], wide, to + c, n, v_mul(g, act));
        } else {
            store_some(r->out[0], wide, to + c, n, v_mul(act, b));
        }
    }
}

#include "entropy.h"
#include "codes.h"
#include "columns.h"

/* Call a function with FLOAT32 or BFLOAT16 as its last argument, as a constant. */
#define OF_WIDE(type, f, ...) ((type) == FLOAT32 ? f(__VA_ARGS__, FLOAT32) : f(__VA_ARGS__, BFLOAT16))
#define GATED_ROW(gradient)                                                    \
    (r->type == FLOAT32 ? gated_row(r, row, gradient, FLOAT32, FLOAT32)        \
                        : OF_WIDE(r->wide, gated_row, r, row, gradient, BFLOAT16))

static void rowwise_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct rowwise *r = job->rowwise;
    struct lost lost = {0, 0, 0};
    int64_t row, to;
    if (r->operation == ROUNDING) {
        for (share(r->columns, LANES, parts, part, &row, &to); row < to; row += LANES)
            r->numbers[0] != 0.0f ? round_columns(r, row, 1) : round_columns(r, row, 0);
        return;
    }
    share(r->rows, 1, parts, part, &row, &to);
    for (; row < to; row++)
        switch (r->operation) {
        case NORM: OF_WIDE(r->type, norm_row, r, row, 0); break;
        case NORM_GRAD: OF_WIDE(r->type, norm_row, r, row, 1); break;
        case GATED: GATED_ROW(0); break;
        case GATED_GRAD: GATED_ROW(1); break;
        case ENTROPY: OF_TYPE(r->type, entropy_row, r, row); break;
        case CODE: OF_TYPE(r->type, code_block, r, row, &lost); break;
        case DECODE: OF_TYPE(r->wide, decode_block, r, row); break;
        case ROUNDING: break; /* done above, since parts are divided by columns of r */
        }
    if (r->operation == CODE)
        add_lost(&lost, (int64_t *)(intptr_t)r->b); /* b is the array of counts here, which is written */
}
