/* Attention of a few queries, and keys and values in 8 bits; lowmem/kernels/cached_attention.py has the definitions. The softmax is computed
 * online, a block of keys at a time (Milakov and Gimelshein, arXiv 1805.02867). */
#pragma once
#include <float.h>

#include "saved8.h"

enum { KEYS = 32 }; /* keys that are computed at a time */
enum { AT_ONCE = 4, TOGETHER = LANES == 8 ? 2 : 4 }; /* rows and vectors of values whose sums are in registers */

/* The numbers of n signed bytes, then zeros. */
INLINE V signed_some(const uint8_t *p, int64_t n)
{
    uint8_t some[LANES] = {0};
    if (n < LANES)
        p = memcpy(some, p, (size_t)n);
    return __builtin_convertvector((N)((I)bytes_load(p) << 24) >> 24, V);
}

INLINE int64_t place_of(const int64_t *steps, int64_t batch, int64_t head, int64_t row)
{
    return batch * steps[0] + head * steps[1] + row * steps[2];
}

/* The next numbers of a row, of which n are left, and zeros behind them; 8-bit codes without their scale. */
INLINE V load_states(const struct states *s, int64_t at, int64_t n, const int type)
{
    return type == CODES8 ? signed_some((const uint8_t *)s->numbers + at, n) : load_some(s->numbers, type, at, n);
}
#define OF_STATES(type, f, ...) ((type) == CODES8 ? f(__VA_ARGS__, CODES8) : OF_TYPE(type, f, __VA_ARGS__))

/* cap tanh(x / cap) */
INLINE V v_capped(V x, float cap)
{
    const V e = v_exp(v_within(v_mul(x, v_set1(2.0f / cap))));
    return v_mul(v_set1(cap), v_sub(v_set1(1.0f), v_div(v_set1(2.0f), v_add(e, v_set1(1.0f)))));
}

/* Add the mask to the scores of n keys from `first` on; scores behind them become -infinity, which no sum counts. */
static void add_mask(const struct attention *call, int64_t batch, int64_t head, int64_t query, int64_t first, int64_t n, float *scores)
{
    const struct states *mask = &call->mask;
    for (int64_t i = n; i < KEYS; i++)
        scores[i] = -INFINITY;
    if (!mask->numbers)
        return;
    const int64_t at = place_of(mask->steps, batch, head, query) + first;
    for (int64_t i = 0; i < n; i++)
        if (mask->type != CODES8)
            scores[i] += read_as_float(mask->numbers, mask->type, at + i);
        else if (!((const uint8_t *)mask->numbers)[at + i])
            scores[i] = -INFINITY;
}

#define EACH_OF(R) _Pragma("GCC unroll 4") for (int k = 0; k < (R); k++)

/* What a thread holds of QUERIES rows: queries and sums in whole vectors of float32, with zeros behind a query. */
struct attending {
    int64_t batch, head, wide, value_wide; /* wide, value_wide: floats of a row */
    float *queries, *sums;                 /* sums: of the values so far */
    float tops[QUERIES], totals[QUERIES];  /* the largest score so far, and the sum of e^(score - top) */
    float keep[QUERIES];                   /* what sums are multiplied with once the largest score has changed */
    float scores[QUERIES * KEYS];
    float key_scales[KEYS], value_scales[KEYS]; /* 1 where states are not in 8 bits */
};

/* Scores of R rows from row m on, before they are scaled, and of `keys` keys from `first` on. */
INLINE void score(const struct attention *call, struct attending *a, int m, const int R, int64_t first, int64_t keys, const int type)
{
    for (int64_t j = 0; j < keys; j += LANES) {
        V parts[AT_ONCE * LANES];
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t at = place_of(call->key.steps, a->batch, a->head, first + j + i);
            if (j + i >= keys) {
                EACH_OF(R) parts[k * LANES + i] = v_zero();
                continue;
            }
            const float *q = a->queries + m * a->wide;
            V sums[AT_ONCE] = {{0}};
            EACH_VECTOR_OF_ROW(call->width) {
                const V key = load_states(&call->key, at + c, n, type);
                EACH_OF(R) sums[k] = v_fma(v_load(q + k * a->wide + c), key, sums[k]);
            }
            EACH_OF(R) parts[k * LANES + i] = sums[k];
        }
        EACH_OF(R) v_store(a->scores + (m + k) * KEYS + j, v_sums(parts + k * LANES));
    }
}

/* Add to the sums of R rows from row m on `keys` values, of T vectors from column c on. */
INLINE void add_vectors(const struct attention *call, struct attending *a, int m, const int R, int64_t first, int64_t keys, int64_t c,
                        const int T, const int type)
{
    V sums[AT_ONCE * TOGETHER] = {{0}};
    for (int64_t i = 0; i < keys; i++) {
        const int64_t at = place_of(call->value.steps, a->batch, a->head, first + i) + c;
        EACH_VECTOR(T) {
            const V value = load_states(&call->value, at + n * LANES, T == 1 ? call->value_width - c : LANES, type);
            EACH_OF(R) sums[k * T + n] = v_fma(v_set1(a->scores[(m + k) * KEYS + i]), value, sums[k * T + n]);
        }
    }
    EACH_OF(R) EACH_VECTOR(T) {
        float *to = a->sums + (m + k) * a->value_wide + c + n * LANES;
        v_store(to, v_fma(v_load(to), v_set1(a->keep[m + k]), sums[k * T + n]));
    }
}

INLINE void score_keys(const struct attention *call, struct attending *a, int64_t rows, int64_t first, int64_t keys, const int type)
{
#define SCORE(R) score(call, a, m, R, first, keys, type)
    IN_PASSES(rows, AT_ONCE, SCORE)
}

INLINE void add_values(const struct attention *call, struct attending *a, int64_t rows, int64_t first, int64_t keys, const int type)
{
    int64_t c = 0;
#define ADD_WHOLE(R) add_vectors(call, a, m, R, first, keys, c, TOGETHER, type)
#define ADD_ONE(R) add_vectors(call, a, m, R, first, keys, c, 1, type)
    for (; c + TOGETHER * LANES <= call->value_width; c += TOGETHER * LANES)
        IN_PASSES(rows, AT_ONCE, ADD_WHOLE)
    for (; c < call->value_width; c += LANES)
        IN_PASSES(rows, AT_ONCE, ADD_ONE)
}

/* Scales of `keys` rows of states from `first` on, where they are codes. */
static void read_scales(const struct states *s, const struct attending *a, int64_t first, int64_t keys, float *scales)
{
    for (int64_t i = 0; s->type == CODES8 && i < keys; i++)
        scales[i] = s->scales[place_of(s->scale_steps, a->batch, a->head, first + i)];
}

/* Scores of row r to weights of the values, e^(score - top). */
static void weigh(const struct attention *call, struct attending *a, int64_t r, int64_t of, int64_t query, int64_t first, int64_t keys)
{
    float *scores = a->scores + r * KEYS;
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const V x = v_mul(v_mul(v_load(scores + j), v_load(a->key_scales + j)), v_set1(call->scaling));
        v_store(scores + j, call->softcap > 0.0f ? v_capped(x, call->softcap) : x);
    }
    add_mask(call, a->batch, of, query, first, keys, scores);
    V most = v_set1(a->tops[r]), total = v_zero();
    for (int64_t j = 0; j < KEYS; j += LANES)
        most = v_larger(v_load(scores + j), most);
    const float top = largest_of(most);
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const V p = v_exp_below(v_sub(v_load(scores + j), v_set1(top)));
        total = v_add(total, p);
        v_store(scores + j, v_mul(p, v_load(a->value_scales + j)));
    }
    a->keep[r] = expf(a->tops[r] - top);
    a->tops[r] = top;
    a->totals[r] = a->totals[r] * a->keep[r] + sum_of(total);
}

INLINE void write_row(const struct attention *call, int64_t at, const float *sums, V by, const int type)
{
    EACH_VECTOR_OF_ROW(call->value_width) store_some(call->out, type, at + c, n, v_mul(v_load(sums + c), by));
}

INLINE void read_query(const struct attention *call, int64_t at, float *to, const int type)
{
    EACH_VECTOR_OF_ROW(call->width) v_store(to + c, load_some(call->query.numbers, type, at + c, n));
}

/* Rows of queries that share a head of keys: row r of the head is query r % queries of the head's queries r / queries. */
static void attend_chunk(const struct attention *call, int64_t batch, int64_t head, int64_t from, int64_t rows, float *own)
{
    struct attending a = {batch, head, round_up(call->width, LANES), round_up(call->value_width, LANES), own};
    a.sums = a.queries + QUERIES * a.wide;
    for (int64_t i = 0; i < KEYS; i++)
        a.key_scales[i] = a.value_scales[i] = 1.0f;
    memset(a.sums, 0, sizeof(float) * (size_t)(rows * a.value_wide));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t of = head * call->shared + (from + r) / call->queries;
        OF_TYPE(call->query.type, read_query, call, place_of(call->query.steps, batch, of, (from + r) % call->queries), a.queries + r * a.wide);
        a.tops[r] = -FLT_MAX;
        a.totals[r] = 0.0f;
    }
    for (int64_t first = 0; first < call->keys; first += KEYS) {
        const int64_t n = smaller(KEYS, call->keys - first);
        read_scales(&call->key, &a, first, n, a.key_scales);
        read_scales(&call->value, &a, first, n, a.value_scales);
        OF_STATES(call->key.type, score_keys, call, &a, rows, first, n);
        for (int64_t r = 0; r < rows; r++)
            weigh(call, &a, r, head * call->shared + (from + r) / call->queries, (from + r) % call->queries, first, n);
        OF_STATES(call->value.type, add_values, call, &a, rows, first, n);
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t of = head * call->shared + (from + r) / call->queries, query = (from + r) % call->queries;
        const int64_t at = ((batch * call->queries + query) * call->heads * call->shared + of) * call->value_width;
        const V by = v_set1(a.totals[r] != 0.0f ? 1.0f / a.totals[r] : 0.0f); /* 0: every key is hidden */
        OF_TYPE(call->query.type, write_row, call, at, a.sums + r * a.value_wide, by);
    }
}

static void attention_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct attention *call = job->call;
    const int64_t rows = call->shared * call->queries, chunks = (rows + job->piece - 1) / job->piece;
    int64_t unit, to;
    for (share(call->batch * call->heads * chunks, 1, parts, part, &unit, &to); unit < to; unit++) {
        const int64_t from = unit % chunks * job->piece, head = unit / chunks % call->heads;
        attend_chunk(call, unit / chunks / call->heads, head, from, smaller(job->piece, rows - from), job->own + thread * job->own_floats);
    }
}

static void encode_states_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct coding *call = job->call;
    const struct states *from = &call->from, *into = &call->into;
    const int64_t size = from->type == FLOAT32 ? 4 : 2; /* of a number */
    int64_t unit, to;
    for (share(call->batch * call->heads * call->rows, 1, parts, part, &unit, &to); unit < to; unit++) {
        const int64_t batch = unit / call->rows / call->heads, head = unit / call->rows % call->heads, row = unit % call->rows;
        const int64_t at = place_of(from->steps, batch, head, row), place = place_of(into->steps, batch, head, row);
        if (into->type == CODES8)
            into->scales[place_of(into->scale_steps, batch, head, row)] =
                OF_TYPE(from->type, encode8, from->numbers, at, call->width, (int8_t *)into->numbers + place, &(N){0});
        else
            memcpy((char *)into->numbers + place * size, (const char *)from->numbers + at * size, (size_t)(call->width * size));
    }
}
