/* Rows of the weight as x @ W.T by AMX multiplies them: as they lie, 32 columns a line.
 *
 * What 16 weights of a block are, as bfloat16, is looked up in their levels times the scale. A lookup takes one of 32
 * numbers, so that a line may have two blocks: a bit beside the code says which. */

/* The scales of TILED_ROWS rows from a block on, a vector a row; behind the last row they are its own. */
static void put_scales(const struct job *job, int64_t r, int64_t first, float *out)
{
    const struct weight *w = job->weight;
    const int64_t bytes = scale_bytes(w);
    const uint8_t *soon = w->scales + (r + TILED_ROWS) * bytes + first * bytes / w->blocks;
    V unit[4], scale[4];
    int have = 1;
    for (const int64_t end = r + TILED_ROWS; r < end; r += 4, soon += 4 * bytes, out += 4 * LANES) {
        if (r + 4 <= w->rows) {
            LEVEL(row_units)(w, r, 4, unit);
            LEVEL(few_scales)(w, r, 1, first, 4, unit, scale);
        } else
            for (int i = 0; i < 4; i++) {
                const int64_t row = smaller(r + i, w->rows - 1);
                LEVEL(row_units)(w, row, 1, unit);
                LEVEL(few_scales)(w, row, 1, first, 1, unit, scale + i);
            }
        for (int i = 0; i < 4; i++) {
            prefetch_far(soon + i * bytes);
            v_store(out + i * LANES, scale[i]);
            have &= job->tiles == 1 || scales_have_terms(scale[i]);
        }
    }
    if (!have)
        refuse(job);
}

/* Levels times two scales, as bfloat16: side by side, or their terms in turns. */
INLINE void two_tables(V levels, const float *one, const float *two, const int terms, W *out)
{
    const V first = v_mul(levels, v_set1(*one)), second = v_mul(levels, v_set1(*two));
    if (terms == 1)
        *out = (W)_mm512_cvtne2ps_pbh(second, first);
    else
        split_pairs(first, second, terms, out);
}

/* Nibble k of 16-bit words where tables are looked up with it: one bit further up where they stand in turns. */
INLINE W nibble_at(W words, int k, const int terms)
{
    return terms == 1 ? _mm512_srli_epi16(words, 4 * k) : k ? _mm512_srli_epi16(words, 4 * k - 1) : _mm512_slli_epi16(words, 1);
}

/* What 16-bit words, of which `nibble` counts, are in the tables of each term; `second` has the bit that says in which of two. */
INLINE void look_up(W words, W nibble, W second, const W *tables, const int terms, float *out, int64_t step)
{
    const W index = _mm512_ternarylogic_epi32(words, nibble, second, 0xea); /* a & b | c */
    for (int t = 0; t < terms; t++)
        v_store(out + t * step, v_of_words(_mm512_permutexvar_epi16(index, tables[t])));
}

/* Four rows of group g, of which the first is there: LANES floats a row and line, `scales` of block first_block[g] on. */
INLINE void restore_four(const struct weight *w, int64_t r, int64_t g, const enum kind kind, const float *scales, float *out,
                         const int terms)
{
    const int64_t left = w->row_bytes - g * LANES * 4, last = w->rows - 1 - r;
    const int32_t *block = w->order->block + g * 4 * LANES;
    const V levels = levels_of(w, terms);
    const int bit = terms == 1 ? 4 : 0, down = terms == 1 ? 0 : 1; /* the bit that says which table; bits that nibbles stand further up */
    W nibble = _mm512_set1_epi16((short)(15 << down));
    W shifts = _mm512_sub_epi64(_mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0), _mm512_set1_epi64(down));
    W second = _mm512_slli_epi32(_mm512_set4_epi32(0x00010001, 0x00010001, 0, 0), bit);
    if (kind == FOURS) {
        /* words behind the row have block 0: they must not be taken for those of a block that may not be there */
        const W is = _mm512_max_epi32(_mm512_sub_epi32(_mm512_loadu_si512(block), _mm512_set1_epi32(block[0])), _mm512_setzero_si512());
        second = _mm512_or_si512(_mm512_slli_epi32(is, bit), _mm512_slli_epi32(is, bit + 16));
    }
    v_keep(nibble); /* the compiler would make them anew for every row */
    v_keep(shifts);
    v_keep(second);
    for (int i = 0; i < 4; i++, scales += LANES, out += LANES) {
        const uint8_t *p = w->packed + (r + smaller(i, last)) * w->row_bytes + g * LANES * 4;
        uint8_t padded[LANES * 4];
        W tables[TERMS];
        prefetch_far(p + TILED_ROWS * w->row_bytes);
        if (kind == EIGHTS) {
            if (left < LANES * 4) {
                _mm512_storeu_si512(padded, words_load(p, left));
                p = padded;
            }
#pragma GCC unroll 4
            for (int k = 0; k < LINES; k++) { /* sixteen bytes, four times */
                const W codes = _mm512_rorv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p + k)), shifts);
                two_tables(levels, scales + block[4 * k], scales + block[4 * k + 2], terms, tables);
                look_up(codes, nibble, second, tables, terms, out + 2 * k * TILE_FLOATS, TERM);
            }
            continue;
        }
        const W words = words_load(p, left);
        if (kind == FOURS) {
            two_tables(levels, scales + block[0], scales + block[0] + 1, terms, tables);
#pragma GCC unroll 4
            for (int k = 0; k < LINES; k++)
                look_up(nibble_at(words, k, terms), nibble, second, tables, terms, out + 2 * k * TILE_FLOATS, TERM);
            continue;
        }
#pragma GCC unroll 4
        for (int k = 0; k < LINES; k++) {
            const int32_t *low = block + (kind == APART ? k / 2 : 0) * LANES, *high = low + (kind == APART ? 2 : 0) * LANES;
            const V scale = v_load(scales);
            const V even = v_mul(v_lookup(levels, words, k), v_spread(scale, low));
            const V odd = v_mul(v_lookup(levels, words, k + 4), v_spread(scale, high));
            put_pairs(even, odd, terms, out + 2 * k * TILE_FLOATS, TERM);
        }
    }
}

/* The same of 16-bit floats; `float16` are two terms. Whether an input may be multiplied with them term by term. */
INLINE int copy_four(const struct weight *w, int64_t r, int64_t g, float *out, const int type)
{
    int have = 1;
    for (int64_t i = 0; i < 4; i++, out += LANES)
        for (int64_t k = 0, c = g * GROUP; k < LINES; k++, c += LINE) {
            const uint16_t *p = (const uint16_t *)w->packed + smaller(r + i, w->rows - 1) * w->columns + c;
            prefetch_far(p + TILED_ROWS * w->columns);
            W terms[2] = {words_load((const uint8_t *)p, 2 * (w->columns - c))};
            have &= weights_have_terms(terms[0], type);
            if (type == FLOAT16) {
                split_line(_mm512_cvtph_ps(_mm512_castsi512_si256(terms[0])), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(terms[0], 1)),
                           2, terms);
                v_store(out + 2 * k * TILE_FLOATS + TERM, v_of_words(terms[1]));
            }
            v_store(out + 2 * k * TILE_FLOATS, v_of_words(terms[0]));
        }
    return have;
}

/* Restore TILED_ROWS rows of groups g to g1: two tiles a line. `scales` are those from block `from` on, or of other rows (-1). */
static void restore_tiles(const struct job *job, int64_t r, int64_t g, int64_t g1, float *scales, int64_t *from, float *out)
{
    const struct weight *w = job->weight;
    const enum kind kind = kind_of(w);
    const int terms = weight_terms(w, job->tiles);
    int have = 1;
    for (; g < g1; g++, out += TERM) {
        if (w->order && w->order->first_block[g] != *from)
            put_scales(job, r, *from = w->order->first_block[g], scales);
        for (int row = 0; row < TILED_ROWS && r + row < w->rows; row += 4) {
            const float *of = scales + row * LANES;
            float *at = out + row * LANES;
#define RESTORE(kind)                                               \
    if (terms == 1)                                                 \
        restore_four(w, r + row, g, kind, of, at, 1);               \
    else if (terms == 2)                                            \
        restore_four(w, r + row, g, kind, of, at, 2);               \
    else                                                            \
        restore_four(w, r + row, g, kind, of, at, TERMS);           \
    break
            switch (kind) {
            case SIXTEEN:
                have &= w->encoding == FLOAT16 ? copy_four(w, r + row, g, at, FLOAT16) : copy_four(w, r + row, g, at, BFLOAT16);
                break;
            case EIGHTS: RESTORE(EIGHTS);
            case FOURS: RESTORE(FOURS);
            case WORDS: RESTORE(WORDS);
            case APART: RESTORE(APART);
            }
#undef RESTORE
        }
    }
    if (!have && job->tiles > 1)
        refuse(job);
}
