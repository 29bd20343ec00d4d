/* The ISA portable: vector operations (rows.h) in plain C, for any compiler and processor. */
#include "kernel.h"

#define LANES 8
typedef struct {
    float v[LANES];
} V;
typedef struct {
    uint32_t v[LANES];
} W;
typedef const float *T;

#define v_keep(a) ((void)0)
#define EACH for (int i = 0; i < LANES; i++)

static inline V v_set1(float value)
{
    V r;
    EACH r.v[i] = value;
    return r;
}
static inline V v_zero(void) { return v_set1(0.0f); }
static inline V v_load(const float *p)
{
    V r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline void v_store(float *p, V a) { memcpy(p, a.v, sizeof a.v); }
static inline V v_add(V a, V b)
{
    EACH a.v[i] += b.v[i];
    return a;
}
static inline V v_mul(V a, V b)
{
    EACH a.v[i] *= b.v[i];
    return a;
}
static inline V v_sub(V a, V b)
{
    EACH a.v[i] -= b.v[i];
    return a;
}
static inline V v_div(V a, V b)
{
    EACH a.v[i] /= b.v[i];
    return a;
}
static inline V v_fma(V a, V b, V c)
{
    EACH c.v[i] += a.v[i] * b.v[i];
    return c;
}
static inline float v_sum(V a)
{
    float sum = 0.0f;
    EACH sum += a.v[i];
    return sum;
}
static inline W words_load(const uint8_t *p, int64_t left)
{
    W r = {{0}};
    EACH for (int b = 0; b < 4; b++) /* byte by byte, since the byte order of the processor may differ */
        if (4 * i + b < left)
            r.v[i] |= (uint32_t)p[4 * i + b] << (8 * b);
    return r;
}
static inline V v_of_words(W a)
{
    V r;
    memcpy(r.v, a.v, sizeof r.v);
    return r;
}
static inline W words_of_v(V a)
{
    W r;
    memcpy(r.v, a.v, sizeof r.v);
    return r;
}
static inline W bytes_load(const uint8_t *p)
{
    W r;
    EACH r.v[i] = p[i];
    return r;
}
static inline W block_load(const uint8_t *p)
{
    W r;
    EACH r.v[i] = i < LANES / 2 ? p[i] : (uint32_t)p[i - LANES / 2] >> 4;
    return r;
}
static inline T table_load(const float *levels) { return levels; }
static inline V v_lookup(T table, W words, int k)
{
    V r;
    EACH r.v[i] = table[words.v[i] >> (4 * k) & 15];
    return r;
}
static inline V v_spread(V a, const int32_t *index)
{
    V r;
    EACH r.v[i] = a.v[index[i]];
    return r;
}
#define OWN_FROM_HALF
static inline void v_from_half(const uint16_t *p, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = half_to_float(p[i]);
}

typedef const float *B;
static inline B boundaries_load(const float *p) { return p; }
static inline W v_code(B boundaries, V a)
{
    W r = {{0}};
    for (int k = 0; k < 15; k++)
        EACH r.v[i] += a.v[i] > boundaries[k];
    return r;
}
static inline void codes_store(uint8_t *p, W codes) { EACH p[i] = (uint8_t)codes.v[i]; }

#define one_half half_to_float
static inline V v_half(const uint16_t *p)
{
    V r;
    v_from_half(p, LANES, r.v);
    return r;
}
static inline V v_bfloat(const uint16_t *p)
{
    V r;
    EACH {
        const uint32_t wide = (uint32_t)p[i] << 16;
        memcpy(&r.v[i], &wide, 4);
    }
    return r;
}

static inline void v_to_half(uint16_t *p, V a) { EACH p[i] = float_to_half(a.v[i]); }
static inline void v_to_bfloat(uint16_t *p, V a) { EACH p[i] = float_to_bfloat(a.v[i]); }

#define FUSED_BATCH 8
#define FUSED_INPUTS 4
#define MANY_VECTORS 1
#define MANY_INPUTS 4
#define FEW_ROWS(M) 2
#define TILE_VECTORS 2
#define GRAD_CODES 1
#define GRAD_SIXTEEN 3
#define GRAD_VECTORS 4

#define ISA_NAME portable
#include "floats.h"
