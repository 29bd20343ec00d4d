/* Saved activations in 8 bits: codes in blocks of 32 with one scale each, and back (lowmem/kernels/codes.py). */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

enum { CODED = 32 };

/* Number of nonzero elements before coding and of nonzero codes, and whether a scale is not finite. */
struct lost {
    int64_t before, after, broken;
};

INLINE void encode8_block(const struct saved8 *call, int64_t block, struct lost *lost, const int type)
{
    const int64_t at = block * CODED, left = call->length - at;
    int8_t *codes = call->codes + at;
    float x[CODED] = {0};
    V tops = v_zero(), broken = v_zero();
    for (int64_t c = 0; c < CODED && c < left; c += LANES) {
        const V v = load_some(call->numbers, type, at + c, left - c);
        tops = v_larger((V)((I)v & 0x7fffffffu), tops);
        broken = v_add(broken, v_mul(v, v_zero()));
        v_store(x + c, v);
    }
    const float scale = largest_of(tops) / 127.0f + sum_of(broken); /* NaN if an element is not finite */
    const float by = scale > 0x1p-126f ? scale : 0x1p-126f, shift = 0x1.8p23f; /* adding it rounds to even */
    int before = 0, after = 0;
    for (int c = 0; c < CODED; c++) {
        codes[c] = (int8_t)bits_of(x[c] / by + shift);
        before += x[c] != 0.0f;
        after += codes[c] != 0;
    }
    call->scales[block] = scale;
    lost->before += before;
    lost->after += after;
    lost->broken |= scale != scale;
}

INLINE void decode8_block(const struct saved8 *call, int64_t block, const int type)
{
    const int8_t *codes = call->codes + block * CODED;
    const V scale = v_set1(call->scales[block]);
    float x[CODED];
    for (int c = 0; c < CODED; c++)
        x[c] = (float)codes[c];
    for (int64_t c = 0; c < CODED; c += LANES)
        store_as(call->numbers, type, block * CODED + c, v_mul(v_load(x + c), scale));
}

static void encode8_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct saved8 *call = job->call;
    struct lost lost = {0, 0, 0};
    int64_t block, to;
    for (share(call->blocks, 1, parts, part, &block, &to); block < to; block++)
        OF_TYPE(call->type, encode8_block, call, block, &lost);
    __atomic_fetch_add(call->counts, lost.before, __ATOMIC_RELAXED);
    __atomic_fetch_add(call->counts + 1, lost.after, __ATOMIC_RELAXED);
    __atomic_fetch_or(call->counts + 2, lost.broken, __ATOMIC_RELAXED);
}

static void decode8_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct saved8 *call = job->call;
    int64_t block, to;
    for (share(call->blocks, 1, parts, part, &block, &to); block < to; block++)
        OF_TYPE(call->type, decode8_block, call, block);
}
