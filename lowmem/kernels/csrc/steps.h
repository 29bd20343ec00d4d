/* Small steps of a transformer's block: sums and rotary embeddings, in float32, rounded once (lowmem/kernels/native_program.py). */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

INLINE void add_some(const struct adding *call, int64_t from, int64_t to, const int type)
{
    for (int64_t c = from, n; (n = to - c) > 0; c += LANES)
        store_some(call->out, type, c, n, v_add(load_some(call->a, type, c, n), load_some(call->b, type, c, n)));
}

static void add_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct adding *call = job->call;
    int64_t from, to;
    share(call->count, LANES, parts, part, &from, &to);
    OF_TYPE(call->type, add_some, call, from, to);
}

/* Rotate the head that begins at element `at`, by the angles from element `angle` on. */
INLINE void rotate_head(const struct rotation *call, int64_t at, int64_t angle, const int type)
{
    const int64_t half = call->width / 2;
    EACH_VECTOR_OF_ROW(half) {
        const V x = load_some(call->x, type, at + c, n), y = load_some(call->x, type, at + half + c, n);
        const V cos = load_some(call->cos, type, angle + c, n), sin = load_some(call->sin, type, angle + c, n);
        const V cos_y = load_some(call->cos, type, angle + half + c, n), sin_y = load_some(call->sin, type, angle + half + c, n);
        store_some(call->x, type, at + c, n, v_sub(v_mul(x, cos), v_mul(y, sin)));
        store_some(call->x, type, at + half + c, n, v_add(v_mul(y, cos_y), v_mul(x, sin_y)));
    }
}

static void rotate_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct rotation *call = job->call;
    int64_t unit, to;
    for (share(call->batch * call->tokens, 1, parts, part, &unit, &to); unit < to; unit++) {
        const int64_t sequence = unit / call->tokens, token = unit % call->tokens;
        for (int64_t head = 0; head < call->heads; head++)
            OF_TYPE(call->type, rotate_head, call, sequence * call->sequence + token * call->token + head * call->head,
                    sequence * call->angles + token * call->width);
    }
}
