/* Batches of medium size (many.h): codes are decoded in registers and multiplied there with up to FUSED_INPUTS batch rows. */
#pragma once
#include "pack.h"

#define FETCH_GROUPS 3 /* codes are prefetched this many groups of columns ahead */
/* Most words whose products are added in one chain; in longer chains too much rounding error accumulates. */
#define FUSED_CHAIN 8

/* sums (M, LANES) += a group of words of LANES rows times M batch rows. Products of a block, or of `chain` words, are summed before
 * they are scaled. `scales` begin with the block of the first word, which started `ahead` words before the group. */
INLINE void fused(const struct weight *w, const float *words, const float *scales, int64_t ahead, const float *x,
                         const int M, float *sums, const uint8_t *fetch, int64_t chain, const int bf16)
{
    const int64_t size = w->half / 4;
    const int units = UNITS(bf16);
    const T table = bf16 ? table_bf16(w->levels) : table_load(w->levels);
    V acc[FUSED_INPUTS];
    EACH_OF_MANY acc[j] = v_zero();
    for (int64_t word = 0, next = size - ahead; word < LANES;) { /* the next block begins at word `next` */
        const int64_t end = smaller(smaller(next, word + chain), LANES);
        V sum[FUSED_INPUTS];
        EACH_OF_MANY sum[j] = v_zero();
        for (; word < end; word++, x += units) {
            W codes = words_of_v(v_load(words + word * LANES));
            if (fetch)
                prefetch(fetch + word * w->row_bytes);
            if (bf16)
                codes = adjacent(codes);
#pragma GCC unroll 8
            for (int k = 0; k < units; k++) {
                const V level = bf16 ? pair_levels(table, codes, k) : v_lookup(table, codes, k);
                const int64_t at = k % 2 * (units / 2) + k / 2;
                EACH_OF_MANY sum[j] = multiply_add(level, spread_unit(x + j * PART_FLOATS + at, bf16), sum[j], bf16);
            }
        }
        const V scale = v_load(scales);
        EACH_OF_MANY acc[j] = v_fma(sum[j], scale, acc[j]);
        if (word == next) {
            next += size;
            scales += LANES;
        }
    }
    EACH_OF_MANY v_store(sums + j * LANES, v_add(v_load(sums + j * LANES), acc[j]));
}

/* sums (batch, LANES) += LANES rows from r on times all batch rows of a piece. `own` is the thread's scratch. */
INLINE void fused_rows(const struct job *job, int64_t r, float *own, float *sums, const int bf16)
{
    const struct weight *w = job->weight;
    const int64_t begin = job->g0 * GROUP;
    float *scales = own, *words = own + TILES_AT; /* in the place of the tiles of tiled.h */
    const int64_t chain = bf16 ? LANES : job->batch <= FEWER ? FEWER_CHAIN : FUSED_CHAIN;
    int64_t first = 0;
    for (int64_t c = begin; c < job->g1 * GROUP; c += GROUP) {
        const int64_t at = c / 2, block = at / w->half, ahead = (at - block * w->half) / 4;
        if ((c - begin) % chunk_of(w) == 0)
            first = chunk_scales(job, r, c, 1, scales);
        words_across(w, r, c / GROUP, LANES, words);
        const float *of_block = scales + (block - first) * LANES, *x = packed_at(job, c - begin, bf16);
        const uint8_t *fetch = codes_behind(job, r, c, FETCH_GROUPS * GROUP, LANES);
#define CALL(M) fused(w, words, of_block, ahead, x + m * PART_FLOATS, M, sums + m * LANES, m ? NULL : fetch, chain, bf16)
        IN_PASSES(job->m1 - job->m0, FUSED_INPUTS, CALL)
#undef CALL
    }
}

/* Multiply the rows of a part with all batch rows of a piece, decoding codes in registers. */
INLINE void fused_part(const struct job *job, int64_t part, int64_t parts, int64_t thread, const int bf16)
{
    float *own = job->own + thread * job->own_floats, *sums = own + SUMS_AT;
    const int64_t batch = job->m1 - job->m0;
    int64_t r, to;
    share(job->weight->rows, MANY_ROWS, parts, part, &r, &to);
    for (; r < to; r += LANES) {
        memset(sums, 0, (size_t)(batch * LANES) * sizeof(float));
        fused_rows(job, r, own, sums, bf16);
        put_rows(job, r, smaller(LANES, to - r), 1, sums);
    }
}

static void fused_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { fused_part(job, part, parts, thread, 0); }
static void fused_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { fused_part(job, part, parts, thread, 1); }
