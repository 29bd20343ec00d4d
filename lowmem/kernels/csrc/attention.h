/* Attention of a few queries, and keys and values in 8 bits; lowmem/kernels/attention.py has the definitions. The softmax is computed
 * online, a block of keys at a time (Milakov and Gimelshein, arXiv 1805.02867). */
#pragma once
#include <float.h>

#include "saved8.h"

enum { KEYS = 32, QUERIES = 16, TOGETHER = 64 / LANES }; /* keys, rows of queries and vectors of values that are computed at a time */

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

/* Read a row as float32 in whole vectors, with zeros behind its last number. */
INLINE void read_typed(const struct states *s, int64_t at, float scale, int64_t width, float *out, const int type)
{
    EACH_VECTOR_OF_ROW(width)
        v_store(out + c, type == CODES8 ? v_mul(signed_some((const uint8_t *)s->numbers + at + c, n), v_set1(scale))
                                        : load_some(s->numbers, type, at + c, n));
}

static void read_row(const struct states *s, int64_t batch, int64_t head, int64_t row, int64_t width, float *out)
{
    const int64_t at = place_of(s->steps, batch, head, row);
    if (s->type == CODES8)
        read_typed(s, at, s->scales[place_of(s->scale_steps, batch, head, row)], width, out, CODES8);
    else
        OF_TYPE(s->type, read_typed, s, at, 0.0f, width, out);
}

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

/* What a thread holds: float32 in whole vectors. */
struct attending {
    int64_t wide, value_wide; /* floats of a row */
    float *keys, *values;     /* KEYS rows */
    float *queries, *sums;    /* QUERIES rows; sums: of the values so far */
    float *tops, *totals;     /* of each row of queries: the largest score so far, and the sum of e^(score - top) */
};

static void score(const struct attention *call, const struct attending *a, int64_t r, int64_t n, float *scores)
{
    for (int64_t j = 0; j < n; j += LANES) {
        V sums[LANES] = {{0}};
        for (int64_t c = 0; c < a->wide; c += LANES) {
            const V q = v_load(a->queries + r * a->wide + c);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                sums[i] = v_fma(q, v_load(a->keys + (j + i) * a->wide + c), sums[i]);
        }
        const V x = v_mul(v_sums(sums), v_set1(call->scaling));
        v_store(scores + j, call->softcap > 0.0f ? v_capped(x, call->softcap) : x);
    }
}

/* Add n keys and values, of which `scores` are those of row r, to the sums of the row. */
static void add_values(const struct attending *a, int64_t r, int64_t n, float *scores)
{
    V most = v_set1(a->tops[r]), total = v_zero();
    for (int64_t j = 0; j < KEYS; j += LANES)
        most = v_larger(v_load(scores + j), most);
    const float top = largest_of(most), keep = expf(a->tops[r] - top);
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const V p = v_exp_below(v_sub(v_load(scores + j), v_set1(top)));
        v_store(scores + j, p);
        total = v_add(total, p);
    }
    a->tops[r] = top;
    a->totals[r] = a->totals[r] * keep + sum_of(total);
    for (int64_t c = 0; c < a->value_wide; c += TOGETHER * LANES) {
        V sum[TOGETHER] = {{0}};
        for (int64_t i = 0; i < n; i++)
            EACH_VECTOR(TOGETHER)
                sum[n] = v_fma(v_set1(scores[i]), v_load(a->values + i * a->value_wide + c + n * LANES), sum[n]);
        float *out = a->sums + r * a->value_wide + c;
        EACH_VECTOR(TOGETHER) v_store(out + n * LANES, v_fma(v_load(out + n * LANES), v_set1(keep), sum[n]));
    }
}

INLINE void write_row(const struct attention *call, int64_t at, const float *sums, V by, const int type)
{
    EACH_VECTOR_OF_ROW(call->value_width) store_some(call->out, type, at + c, n, v_mul(v_load(sums + c), by));
}

/* Rows of queries that share a head of keys: row r of the head is query r % queries of the head's queries r / queries. */
static void attend_chunk(const struct attention *call, int64_t batch, int64_t head, int64_t from, int64_t rows, float *own)
{
    const int64_t wide = round_up(call->width, LANES), value_wide = round_up(call->value_width, TOGETHER * LANES);
    struct attending a = {wide, value_wide, own};
    a.values = a.keys + KEYS * wide;
    a.queries = a.values + KEYS * value_wide;
    a.sums = a.queries + QUERIES * wide;
    a.tops = a.sums + QUERIES * value_wide;
    a.totals = a.tops + QUERIES;
    memset(own, 0, sizeof(float) * (size_t)((KEYS + QUERIES) * (wide + value_wide))); /* and what pads rows and blocks */
    for (int64_t r = 0; r < rows; r++) {
        const int64_t of = head * call->shared + (from + r) / call->queries;
        read_row(&call->query, batch, of, (from + r) % call->queries, call->width, a.queries + r * wide);
        a.tops[r] = -FLT_MAX;
        a.totals[r] = 0.0f;
    }
    for (int64_t first = 0; first < call->keys; first += KEYS) {
        const int64_t n = smaller(KEYS, call->keys - first);
        for (int64_t i = 0; i < n; i++) {
            read_row(&call->key, batch, head, first + i, call->width, a.keys + i * wide);
            read_row(&call->value, batch, head, first + i, call->value_width, a.values + i * value_wide);
        }
        for (int64_t r = 0; r < rows; r++) {
            float scores[KEYS];
            score(call, &a, r, n, scores);
            const int64_t of = head * call->shared + (from + r) / call->queries;
            add_mask(call, batch, of, (from + r) % call->queries, first, n, scores);
            add_values(&a, r, n, scores);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t of = head * call->shared + (from + r) / call->queries, query = (from + r) % call->queries;
        const int64_t at = ((batch * call->queries + query) * call->heads * call->shared + of) * call->value_width;
        const V by = v_set1(a.totals[r] != 0.0f ? 1.0f / a.totals[r] : 0.0f); /* 0: every key is hidden */
        OF_TYPE(call->query.type, write_row, call, at, a.sums + r * value_wide, by);
    }
}

static void attention_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct attention *call = job->call;
    const int64_t rows = call->shared * call->queries, chunks = (rows + call->chunk - 1) / call->chunk;
    int64_t unit, to;
    for (share(call->batch * call->heads * chunks, 1, parts, part, &unit, &to); unit < to; unit++) {
        const int64_t from = unit % chunks * call->chunk, head = unit / chunks % call->heads;
        attend_chunk(call, unit / chunks / call->heads, head, from, smaller(call->chunk, rows - from), call->scratch + thread * call->own);
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
