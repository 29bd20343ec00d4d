/* Vector operations (rows.h) in GNU C, for any processor. */
#pragma once
#include "kernel.h"

#define LANES 4
typedef float V __attribute__((vector_size(16)));
typedef uint32_t W __attribute__((vector_size(16)));
typedef const float *T;

#define v_keep(a) ((void)0)
#define v_fma(a, b, sum) ((a) * (b) + (sum))
#define EACH for (int i = 0; i < LANES; i++)

static inline V v_set1(float a) { return (V){a, a, a, a}; }
static inline void v_transpose(V *v)
{
    const V old[4] = {v[0], v[1], v[2], v[3]};
    EACH for (int j = 0; j < LANES; j++)
        v[i][j] = old[j][i];
}
static inline V v_sums(V *v)
{
    v_transpose(v);
    return (v[0] + v[1]) + (v[2] + v[3]);
}
static inline W bytes_load(const uint8_t *p) { return (W){p[0], p[1], p[2], p[3]}; }
static inline T table_load(const float *levels) { return levels; }
static inline V v_lookup(T table, W words, int k)
{
    const W index = words >> (4 * k) & 15;
    return (V){table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
static inline V v_spread(V a, const int32_t *index) { return (V){a[index[0]], a[index[1]], a[index[2]], a[index[3]]}; }

typedef const float *B;
static inline B boundaries_load(const float *p) { return p; }
static inline W v_code(B boundaries, V a)
{
    W code = {0};
    for (int k = 0; k < 15; k++)
        code -= (W)(a > v_set1(boundaries[k])); /* a comparison that is true is all ones, or -1 */
    return code;
}
static inline void codes_store(uint8_t *p, W codes) { EACH p[i] = (uint8_t)codes[i]; }

#define one_half half_to_float
static inline V v_half(const uint16_t *p)
{
    return (V){half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
static inline V v_bfloat(const uint16_t *p) { return (V)((W){p[0], p[1], p[2], p[3]} << 16); }
static inline void v_to_half(uint16_t *p, V a) { EACH p[i] = float_to_half(a[i]); }

#define FUSED_BATCH FEW /* decoding in registers was slower than tiles, for 5 and for 8 batch rows */
#define FUSED_INPUTS 4
#define MANY_VECTORS 1
#define MANY_INPUTS 4
#define FEW_ROWS(M) 2
#define TILE_VECTORS 2
#define GRAD_SIXTEEN 3

/* Products in 8-bit integers (inputs8.h), in 16 bits: a sum of two is at most 2 * 128 * 127. */
#define INPUTS8_SHIFTED 0
#define INPUTS8_SHIFTS_CODES 0
#define IS_SHIFTED(w) 0
#define QUADS(is_shifted) 2
#define INPUTS8_INPUTS 4
typedef int16_t P __attribute__((vector_size(16)));
struct steps {
    P even, odd; /* bytes in 16 bits each */
};
static inline W steps_load(const uint8_t *p)
{
    W table;
    memcpy(&table, p, sizeof table);
    return table;
}
static inline W steps_lookup(W table, W index)
{
    uint8_t of[16], at[16];
    memcpy(of, &table, sizeof of);
    memcpy(at, &index, sizeof at);
    for (int i = 0; i < 16; i++)
        at[i] = of[at[i]];
    memcpy(&index, at, sizeof at);
    return index;
}
static inline struct steps steps_of(W bytes, int is_shifted) { return (struct steps){(P)((P)bytes << 8) >> 8, (P)bytes >> 8}; }
static inline W add_products(W sum, const struct steps *w, const W *x, int n, int is_shifted)
{
    typedef int32_t S __attribute__((vector_size(16)));
    for (int k = 0; k < n; k++) {
        const struct steps of = steps_of(x[k], 0);
        const P pairs = w[k].even * of.even + w[k].odd * of.odd;
        sum += (W)(((S)pairs << 16 >> 16) + ((S)pairs >> 16));
    }
    return sum;
}
