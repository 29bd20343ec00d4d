/* Rows of a weight as float32 vectors: reading scales, decoding groups of codes, and dequantizing rows. Written over
 * a few vector operations that each ISA defines:
 *
 *   LANES; V, a vector of LANES float32, and W, of as many 32-bit words: types of GNU C, which have operators; v_set1(a)
 *   v_fma(a, b, c)           a * b + c
 *   v_transpose(v)           transposes LANES vectors in place
 *   v_sums(v)                lane i: the sum of v[i]; v may be overwritten
 *   words_load(p, left)      LANES 32-bit words from p, of which `left` bytes may be read; the rest is zero. Optional (OWN_WORDS)
 *   bytes_load(p)            LANES bytes, each widened to a word
 *   block_load(p)            LANES / 2 bytes, each widened to a word; then the same bytes shifted right by a nibble. Optional
 *                            (OWN_BLOCKS)
 *   T, table_load(levels), v_lookup(table, words, k)   the level of nibble k (0 to 7) of each word
 *   v_spread(a, index)       a[index[i]], where 0 <= index[i] < LANES
 *   B, boundaries_load(p), v_code(boundaries, a)   for each value, how many of 15 boundaries are less: its code
 *   codes_store(p, words)    LANES words, each below 256, stored as bytes
 *   bytes, a vector of 16 bytes; bytes_lookup(table, index); bytes_zip_low(a, b), bytes_zip_high(a, b): a[0], b[0], a[1], ...;
 *   bytes_low(a, b), bytes_high(a, b): of sixteen 16-bit words; low_nibbles(a), high_nibbles(a). Optional (OWN_BYTES)
 *   v_keep(a)                keeps a in a register; otherwise the compiler may load or compute it again for each use
 *   v_half(p), v_bfloat(p)   LANES float16 or bfloat16 as float32; one_half(bits)  a float16 as float32
 *   v_to_half(p, a)          LANES float32, rounded to float16 and stored */
#pragma once
#include "plan.h"
#ifndef LANES /* where a header is read on its own */
#include "portable.h"
#endif

#define INLINE static inline __attribute__((always_inline))
typedef uint32_t I __attribute__((vector_size(4 * LANES))); /* the bits of V */
typedef int32_t N __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
#define GROUP (LANES * 8) /* weights in a group of LANES words */
#define EACH_VECTOR(most) _Pragma("GCC unroll 16") for (int n = 0; n < most; n++)

/* Run call(M) for batch rows m to m + M, a constant of at most `most`; passes are of about one size. */
#define CASE_OF(most, n, call) \
    case n: if ((most) >= n) call(((most) >= n ? n : 1)); break;
#define IN_PASSES(batch, most, call)                                             \
    for (int m = 0, now; m < (int)(batch); m += now) {                           \
        const int left = (int)(batch) - m, passes = (left + (most) - 1) / (most); \
        now = (left + passes - 1) / passes;                                      \
        switch (now) {                                                           \
            CASE_OF(most, 1, call) CASE_OF(most, 2, call) CASE_OF(most, 3, call) CASE_OF(most, 4, call)     \
            CASE_OF(most, 5, call) CASE_OF(most, 6, call) CASE_OF(most, 7, call) CASE_OF(most, 8, call)     \
            CASE_OF(most, 9, call) CASE_OF(most, 10, call) CASE_OF(most, 11, call) CASE_OF(most, 12, call)  \
            CASE_OF(most, 13, call) CASE_OF(most, 14, call) CASE_OF(most, 15, call) CASE_OF(most, 16, call) \
        }                                                                        \
    }

/* Operations that all ISAs share, or that an ISA does not define itself. */
#define v_zero() ((V){0})
#define v_add(a, b) ((V)((a) + (b)))
#define v_sub(a, b) ((V)((a) - (b)))
#define v_mul(a, b) ((V)((a) * (b)))
#define v_div(a, b) ((V)((a) / (b)))
#define v_of_words(a) ((V)(a)) /* the same bits */
#define words_of_v(a) ((W)(a))
static inline V v_load(const float *p)
{
    V a;
    memcpy(&a, p, sizeof a);
    return a;
}
static inline void v_store(float *p, V a) { memcpy(p, &a, sizeof a); }
#ifndef OWN_WORDS
static inline W words_load(const uint8_t *p, int64_t left)
{
    W words = {0};
    if (left >= LANES * 4)
        memcpy(&words, p, sizeof words);
    else if (left > 0)
        memcpy(&words, p, (size_t)left);
    return words;
}
#endif

/* Lanes of a where `is` is all ones, of b where it is zero. */
INLINE V v_where(I is, V a, V b) { return (V)(((I)a & is) | ((I)b & ~is)); }

/* Store LANES float32 as bfloat16, rounded in integer arithmetic: vcvtneps2bf16 flushes subnormal numbers to zero. */
INLINE void v_to_bfloat(uint16_t *p, V a)
{
    const I bits = (I)a, rounded = (I)v_where((I)(a == a), (V)(bits + 0x7fff + (bits >> 16 & 1)), v_set1(NAN));
    const H words = __builtin_convertvector(rounded >> 16, H);
    memcpy(p, &words, sizeof words);
}

/* LANES bytes of steps (double quantization) as float32; those of SCALES_SIGNED have a sign bit and 7 bits. */
INLINE V v_steps(const uint8_t *p, int encoding)
{
    const I steps = (I)bytes_load(p), signs = -(steps >> 7);
    return __builtin_convertvector((N)(encoding == SCALES_SIGNED ? ((steps & 127) ^ signs) - signs : steps), V);
}

/* LANES scales of a row from scale `from` on (steps in double quantization), with zeros after the first n. */
INLINE V v_scales(const uint8_t *p, int64_t from, int64_t n, int encoding)
{
    const int size = encoding == SCALES_FLOAT32 ? 4 : encoding == SCALES_FLOAT16 ? 2 : 1;
    float rest[LANES];
    p += from * size;
    if (n < LANES) {
        v_store(rest, v_of_words(words_load(p, n * size)));
        p = (const uint8_t *)rest;
    }
    return size == 4 ? v_load((const float *)p) : size == 2 ? v_half((const uint16_t *)p) : v_steps(p, encoding);
}

/* LANES 16-bit floats of a type as float32. */
INLINE V sixteen(const uint16_t *p, const int type) { return type == BFLOAT16 ? v_bfloat(p) : v_half(p); }

/* LANES numbers of a type, from element i of p on, as float32. */
INLINE V load_as(const void *p, const int type, int64_t i)
{
    return type == FLOAT32 ? v_load((const float *)p + i) : sixteen((const uint16_t *)p + i, type);
}

/* Store LANES float32 as a type, from element i of out on. */
INLINE void store_as(void *out, const int type, int64_t i, V a)
{
    if (type == FLOAT32)
        v_store((float *)out + i, a);
    else if (type == BFLOAT16)
        v_to_bfloat((uint16_t *)out + i, a);
    else
        v_to_half((uint16_t *)out + i, a);
}

/* The first n numbers of a vector, from element i of p on; loads pad with zeros. Not inlined, so that loops stay small. */
static __attribute__((noinline)) V load_rest(const void *p, int type, int64_t i, int64_t n)
{
    float some[LANES] = {0};
    for (int64_t j = 0; j < n; j++)
        some[j] = read_as_float(p, type, i + j);
    return v_load(some);
}
static __attribute__((noinline)) void store_rest(void *p, int type, int64_t i, int64_t n, V v)
{
    float some[LANES];
    v_store(some, v);
    for (int64_t j = 0; j < n; j++)
        write_as(p, type, i + j, some[j]);
}
INLINE V load_some(const void *p, const int type, int64_t i, int64_t n)
{
    return n < LANES ? load_rest(p, type, i, n) : load_as(p, type, i);
}
INLINE void store_some(void *p, const int type, int64_t i, int64_t n, V v)
{
    n < LANES ? store_rest(p, type, i, n, v) : store_as(p, type, i, v);
}

/* Call a function with the type as a constant last argument. */
#define OF_SIXTEEN(type, f, ...) ((type) == BFLOAT16 ? f(__VA_ARGS__, BFLOAT16) : f(__VA_ARGS__, FLOAT16))
#define OF_TYPE(type, f, ...) ((type) == FLOAT32 ? f(__VA_ARGS__, FLOAT32) : OF_SIXTEEN(type, f, __VA_ARGS__))

/* n 16-bit floats of a type to float32. */
INLINE void widen_run(const uint16_t *p, int64_t n, float *out, const int type)
{
    for (int64_t i = 0; i < n; i += LANES)
        store_some(out, FLOAT32, i, n - i, load_some(p, type, i, n - i));
}

INLINE float sum_of(V v)
{
    float some[LANES], sum = 0.0f;
    v_store(some, v);
    for (int i = 0; i < LANES; i++)
        sum += some[i];
    return sum;
}

/* A row's float16, with which its steps are multiplied (double quantization). */
INLINE float row_scale(const struct weight *w, int64_t row)
{
    uint16_t bits;
    memcpy(&bits, row_scale_at(w, row), sizeof bits);
    return one_half(bits);
}

/* out[i] = the scale of block first + i of a row, for n blocks, in whole vectors. */
INLINE void row_scales(const struct weight *w, int64_t row, int64_t first, int64_t n, float *out)
{
    const int many = w->encoding >= SCALES_DOUBLE; /* double quantization */
    const V unit = v_set1(many ? row_scale(w, row) : 1.0f);
    for (int64_t i = 0; i < n; i += LANES) {
        const V stored = v_scales(w->scales + row * scale_bytes(w), first + i, n - i, w->encoding);
        v_store(out + i, many ? v_div(v_mul(stored, unit), v_set1(row_steps(w))) : stored);
    }
}

/* The words of a group of a row; zeros past its end. */
INLINE W words_of_group(const struct weight *w, int64_t row, int64_t group)
{
    const int64_t start = group * LANES * 4;
    return words_load(w->packed + row * w->row_bytes + start, w->row_bytes - start);
}

/* The scale of each word of a group; `scales` starts at the first block of group g0. */
INLINE V spread(const struct order *order, const float *scales, int64_t g0, int64_t group)
{
    return v_spread(v_load(scales + order->first_block[group] - order->first_block[g0]), order->block + group * LANES);
}

/* Columns from `from` on of a row of 16-bit floats as float32, padded with zeros to `floats` numbers. */
INLINE void widen(const struct weight *w, int64_t row, int64_t from, int64_t floats, float *out, const int type)
{
    const uint16_t *p = (const uint16_t *)w->packed + row * w->columns + from;
    const int64_t left = smaller(w->columns - from, floats);
    widen_run(p, left, out, type);
    for (int64_t c = left < 0 ? 0 : left; c < floats; c++)
        out[c] = 0.0f;
}

/* Dequantize a group of a row in the order of the words, and prefetch another. `scales` start at group g0. */
INLINE void decode_group(const struct weight *w, int64_t row, int64_t g, int64_t g0, T table, const float *scales,
                                float *out)
{
    const W words = words_of_group(w, row, g);
    prefetch(w->packed + (row + GRAD_ROWS) * w->row_bytes + g * LANES * 4);
    const V scale = spread(w->order, scales, g0, g);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        v_store(out + k * LANES, v_mul(v_lookup(table, words, k), scale));
}

#ifdef OWN_BYTES
/* Sixteen numbers, whose bytes are looked up, to out. They are stored in halves: GCC would join these in memory. */
INLINE void put_sixteen(bytes low, bytes high, bytes index, uint16_t *out)
{
    const bytes lows = bytes_lookup(low, index), highs = bytes_lookup(high, index);
    const bytes first = bytes_zip_low(lows, highs), second = bytes_zip_high(lows, highs);
    memcpy(out, &first, sizeof first);
    memcpy(out + 8, &second, sizeof second);
}

/* Dequantize a whole block of 4-bit codes to 16-bit floats: only its sixteen products are computed and rounded. */
INLINE void dequantize_sixteen(const struct weight *w, const uint8_t *p, V scale, uint16_t *out, const int type)
{
    const int64_t half = w->half;
    uint16_t numbers[16];
    bytes of[2], codes;
    EACH_VECTOR(16 / LANES) store_as(numbers, type, n * LANES, v_mul(v_load(w->levels + n * LANES), scale));
    memcpy(of, numbers, sizeof of);
    const bytes low = bytes_low(of[0], of[1]), high = bytes_high(of[0], of[1]);
    for (int64_t j = 0; j < half; j += 16) {
        memcpy(&codes, p + j, sizeof codes);
        put_sixteen(low, high, low_nibbles(codes), out + j);
        put_sixteen(low, high, high_nibbles(codes), out + half + j);
    }
}
#endif

/* Dequantize a block of 4-bit codes, of which `left` columns are left in the row, to out from element i on. */
INLINE void dequantize_block(const struct weight *w, const uint8_t *p, int64_t left, float one, T table, void *out, int64_t i,
                             const int type)
{
    const int64_t size = 2 * w->half, half = left < size ? (left + 1) / 2 : w->half;
    const V scale = v_set1(one);
    int64_t j = 0;
#ifdef OWN_BYTES
    if (type != FLOAT32 && left >= size && half % 16 == 0) {
        dequantize_sixteen(w, p, scale, (uint16_t *)out + i, type);
        return;
    }
#endif
#ifdef OWN_BLOCKS
    if (left >= size && half == LANES / 2) { /* the block is one vector */
        store_as(out, type, i, v_mul(v_lookup(table, block_load(p), 0), scale));
        j = half;
    }
#endif
    if (left >= size)
        for (; j + LANES <= half; j += LANES) {
            const W words = bytes_load(p + j);
            store_as(out, type, i + j, v_mul(v_lookup(table, words, 0), scale));
            store_as(out, type, i + half + j, v_mul(v_lookup(table, words, 1), scale));
        }
    for (; j < half; j++) {
        write_as(out, type, i + j, w->levels[p[j] & 15] * one);
        if (half + j < left) /* skips the code that pads an odd row */
            write_as(out, type, i + half + j, w->levels[p[j] >> 4] * one);
    }
}
