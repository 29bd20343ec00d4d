/* Saved activations in 8 bits: codes in blocks of 32 with one scale each, and back (lowmem/kernels/codes_8bit.py). */
#pragma once
#include "row_calls.h"
#include "vector_math.h"

enum { CODED = 32 };

/* Nonzero elements before coding and nonzero codes, counted in lanes, and whether a scale is not finite. */
struct lost {
    N before, after;
    int64_t broken;
};

#define LARGEST_SCALE 0x1.020406p+121f /* of lowmem/kernels/codes_8bit.py: its product with 127 is finite */

/* scale = min(max |x| / 127, LARGEST_SCALE), code = round(x / scale), of `count` numbers from element `at` on. Adds nonzero codes to
 * the lanes of `kept`. Returns the scale; NaN if a number is not finite. */
INLINE float encode8(const void *numbers, int64_t at, int64_t count, int8_t *codes, N *kept, const int type)
{
    V tops = v_zero(), broken = v_zero();
    EACH_VECTOR_OF_ROW(count) {
        const V x = load_some(numbers, type, at + c, n);
        tops = v_larger((V)((I)x & 0x7fffffffu), tops);
        broken = v_add(broken, v_mul(x, v_zero()));
    }
    const float wanted = largest_of(tops) / 127.0f + sum_of(broken), scale = wanted > LARGEST_SCALE ? LARGEST_SCALE : wanted;
    const V by = v_set1(scale > 0x1p-126f ? scale : 0x1p-126f), shift = v_set1(0x1.8p23f); /* adding it rounds to even */
    EACH_VECTOR_OF_ROW(count) {
        uint8_t some[LANES], *to = n < LANES ? some : (uint8_t *)codes + c;
        const I code = (I)v_add(v_div(load_some(numbers, type, at + c, n), by), shift) & 255;
        *kept -= (N)(code != 0);
        codes_store(to, words_of_v(code));
        if (n < LANES)
            memcpy(codes + c, some, (size_t)n);
    }
    return scale;
}

INLINE void encode8_block(const struct saved8 *call, int64_t block, struct lost *lost, const int type)
{
    const int64_t at = block * CODED, left = call->length - at;
    float x[CODED] = {0};
    for (int64_t c = 0; c < CODED && c < left; c += LANES) {
        const V v = load_some(call->numbers, type, at + c, left - c);
        lost->before -= (N)(v != v_zero());
        v_store(x + c, v);
    }
    const float scale = call->scales[block] = encode8(x, 0, CODED, call->codes + at, &lost->after, FLOAT32);
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
    struct lost lost = {{0}};
    int64_t block, to;
    for (share(call->blocks, 1, parts, part, &block, &to); block < to; block++)
        OF_TYPE(call->type, encode8_block, call, block, &lost);
    for (int i = 0; i < LANES; i++) {
        __atomic_fetch_add(call->counts, lost.before[i], __ATOMIC_RELAXED);
        __atomic_fetch_add(call->counts + 1, lost.after[i], __ATOMIC_RELAXED);
    }
    __atomic_fetch_or(call->counts + 2, lost.broken, __ATOMIC_RELAXED);
}

static void decode8_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct saved8 *call = job->call;
    int64_t block, to;
    for (share(call->blocks, 1, parts, part, &block, &to); block < to; block++)
        OF_TYPE(call->type, decode8_block, call, block);
}
