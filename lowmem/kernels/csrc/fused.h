/* More than a few inputs, but not many: what was decoded in registers is multiplied there with all of them (many.h). */

#define FETCH_GROUPS 3 /* of columns: how far behind what is decoded codes are fetched */
#define FUSED_CHAIN 8  /* the most words whose products are summed in one chain: more, all rounded one way, lose too much */
#define FEWER 12       /* inputs, for which torch's chains are short, too (MKL's are), have */
#define FEWER_CHAIN 2  /* words in one, here and in tiles */

/* Add to `sums`, LANES an input, what M inputs make with a group of words. A block's products, or those of half
 * a group, or of `chain` words, are summed before its scale is applied. `scales` are those of the block of the first word, which
 * has `ahead` words in front of it. */
INLINE void fused(const struct weight *w, const float *words, const float *scales, int64_t ahead, const float *x,
                         const int M, float *sums, const uint8_t *fetch, int64_t chain, const int bf16)
{
    const int64_t size = w->half / 4;
    const int units = UNITS(bf16);
#if ISA_BFLOAT16
    const T table = bf16 ? (T)table_bf16(w->levels) : table_load(w->levels);
#else
    const T table = table_load(w->levels);
#endif
    V acc[FUSED_INPUTS];
    EACH_OF_MANY acc[j] = v_zero();
    for (int64_t word = 0, next = size - ahead; word < LANES;) { /* the block after this one begins at word `next` */
        const int64_t end = smaller(smaller(next, word + chain), LANES);
        V sum[FUSED_INPUTS];
        EACH_OF_MANY sum[j] = v_zero();
        for (; word < end; word++, x += units) {
            W codes = words_of_v(v_load(words + word * LANES));
            if (fetch)
                prefetch(fetch + word * w->row_bytes);
#if ISA_BFLOAT16
            if (bf16) /* bytes 0 2 1 3: so that the halves of a word hold neighbours */
                codes = _mm512_shuffle_epi8(codes, _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200));
#endif
#pragma GCC unroll 8
            for (int k = 0; k < units; k++) {
                const V level = unit_levels(table, codes, k, bf16);
                const int64_t at = k % 2 * (units / 2) + k / 2;
                EACH_OF_MANY sum[j] =
                    multiply_add(level, spread_unit(x + j * PART_FLOATS + at, bf16), sum[j], bf16);
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

/* LANES rows with all inputs of a piece, codes decoded in registers. */
INLINE void fused_rows(const struct job *job, int64_t r, float *own, float *sums, const int bf16)
{
    const struct weight *w = job->weight;
    const int64_t begin = job->g0 * GROUP;
    float *scales = own, *words = own + TILES_AT; /* where others have tiles */
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
