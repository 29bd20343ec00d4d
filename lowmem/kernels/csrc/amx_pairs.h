/* Rows of the weight as grad @ W by AMX multiplies them: pairs of rows side by side, in tiles of 16 pairs by 16 columns. */

#define GRADIENT_LINES (TILED_GRAD_ROWS / LINE) /* of a part of the gradient */
#define STRIP (GRADIENT_LINES * 2 * TILE_FLOATS) /* floats of two tiles' columns, for all rows of a part */
#define GROUP_TILES (GROUP / 16)
#define GRADIENT_STRIPS (GROUP / LINE)
_Static_assert(TILED_GRAD_OWN(1) == GRADIENT_STRIPS * STRIP + TILED_GRAD_ROWS * LANES + TILED_INPUTS * TILED_GRAD_ROWS &&
                   TILED_GRAD_OWN(TERMS) == TERMS * STRIP + TILED_GRAD_ROWS * LANES,
               "restored rows, scales, and inputs that are padded");

/* Blocks of which eight bytes are a part: sixteen columns of one block, nibble 0 to 3 of four 16-bit words. Others: nibble k of
 * all words of a group. */
static int by_eights(const struct weight *w) { return w->order && w->half % 8 == 0; }

/* What follows restores pairs of rows, r and the next, which may be missing (r1 is the last): so many strips of 32 columns of group
 * g, each two tiles, from the one at `strip` on. `out` is where the pair lies in the first tile. Strips are STRIP apart where
 * there is one term, terms where there is one strip. `scales` are those of both rows, a vector each. */

/* 16-bit weights. Whether an input may be multiplied with them term by term. */
INLINE int copy_pair(const struct weight *w, int64_t r, int64_t r1, int64_t g, int strip, const int strips, float *out, const int type)
{
    int have = 1;
#pragma GCC unroll 4
    for (int k = 0; k < strips; k++, out += STRIP) {
        const int64_t c = g * GROUP + (strip + k) * LINE, left = w->columns - c;
        const uint16_t *p = (const uint16_t *)w->packed + r * w->columns + c;
        const W one = words_load((const uint8_t *)p, 2 * left);
        const W two = words_load((const uint8_t *)(p + w->columns), r + 1 < r1 ? 2 * left : 0);
        prefetch_far(p + TILED_ROWS * w->columns);
        prefetch_far(p + (TILED_ROWS + 1) * w->columns);
        have &= weights_have_terms(one, type) & weights_have_terms(two, type);
        if (type == FLOAT16) {
            put_pairs(_mm512_cvtph_ps(_mm512_castsi512_si256(one)), _mm512_cvtph_ps(_mm512_castsi512_si256(two)), 2, out, STRIP);
            put_pairs(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(one, 1)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(two, 1)), 2,
                      out + TILE_FLOATS, STRIP);
            continue;
        }
        const W front = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
        v_store(out, v_of_words(_mm512_permutex2var_epi16(one, front, two)));
        v_store(out + TILE_FLOATS, v_of_words(_mm512_permutex2var_epi16(one, _mm512_add_epi16(front, _mm512_set1_epi16(16)), two)));
    }
    return have;
}

/* Codes of which eight bytes are a tile's columns. */
INLINE void restore_eights(const struct weight *w, int64_t r, int64_t r1, int64_t g, int strip, const int strips, const float *scales,
                           float *out, const int terms)
{
    const int bit = terms == 1 ? 4 : 0, down = terms == 1 ? 0 : 1; /* as restore_four */
    const int64_t from = g * LANES * 4 + strip * 16, left = w->row_bytes - from;
    const uint8_t *p = w->packed + r * w->row_bytes + from;
    const int32_t *block = w->order->block + g * 4 * LANES + 4 * strip;
    const V levels = levels_of(w, terms);
    W nibble = _mm512_set1_epi16((short)(15 << down)), second = _mm512_set1_epi32(1 << (16 + bit)), tables[TERMS];
    W shifts = _mm512_sub_epi64(_mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0), _mm512_set1_epi64(down));
    v_keep(nibble);
    v_keep(shifts);
    v_keep(second);
    __m128i words[2][4]; /* of eight bytes of either row side by side: those of even eights, those of odd ones */
    if (strips > 1) {
        const W one = words_load(p, left), two = words_load(p + w->row_bytes, r + 1 < r1 ? left : 0);
        _mm512_storeu_si512(words[0], _mm512_unpacklo_epi16(one, two));
        _mm512_storeu_si512(words[1], _mm512_unpackhi_epi16(one, two));
    } else {
        const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        const __m128i one = _mm_maskz_loadu_epi8(there, p), two = _mm_maskz_loadu_epi8(r + 1 < r1 ? there : 0, p + w->row_bytes);
        words[0][0] = _mm_unpacklo_epi16(one, two);
        words[1][0] = _mm_unpackhi_epi16(one, two);
    }
    if (!strip) {
        prefetch_far(p + TILED_ROWS * w->row_bytes);
        prefetch_far(p + (TILED_ROWS + 1) * w->row_bytes);
    }
#pragma GCC unroll 8
    for (int q = 0; q < 2 * strips; q++) {
        if (!q || block[2 * q] != block[2 * q - 2])
            two_tables(levels, scales + block[2 * q], scales + LANES + block[2 * q], terms, tables);
        look_up(_mm512_rorv_epi64(_mm512_broadcast_i32x4(words[q % 2][q / 2]), shifts), nibble, second, tables, terms,
                out + q / 2 * STRIP + q % 2 * TILE_FLOATS, STRIP);
    }
}

/* All others: nibble k of all words is tile k. */
INLINE void restore_nibbles(const struct weight *w, int64_t r, int64_t r1, int64_t g, int strip, const int strips, const float *scales,
                            float *out, const int terms)
{
    const int64_t from = g * LANES * 4, left = w->row_bytes - from;
    const uint8_t *p = w->packed + r * w->row_bytes + from;
    const W one = words_load(p, left), two = words_load(p + w->row_bytes, r + 1 < r1 ? left : 0);
    const V levels = levels_of(w, terms), scale = v_load(scales), next = v_load(scales + LANES);
    if (!strip) {
        prefetch_far(p + TILED_ROWS * w->row_bytes);
        prefetch_far(p + (TILED_ROWS + 1) * w->row_bytes);
    }
    for (int k = 2 * strip; k < 2 * (strip + strips); k++) {
        const int32_t *block = w->order->block + g * 4 * LANES + (w->order->whole_words ? 0 : k / 2 * LANES);
        const __m128i shift = _mm_cvtsi32_si128(4 * k);
        const V even = v_mul(_mm512_permutexvar_ps(_mm512_srl_epi32(one, shift), levels), v_spread(scale, block));
        const V odd = v_mul(_mm512_permutexvar_ps(_mm512_srl_epi32(two, shift), levels), v_spread(next, block));
        put_pairs(even, odd, terms, out + (k / 2 - strip) * STRIP + k % 2 * TILE_FLOATS, STRIP);
    }
}

/* Restore strips of rows r0 to r1: all four of one term, or one of several. Pairs behind the last are zeros, up to a whole tile. */
static void restore_strips(const struct job *job, int64_t r0, int64_t r1, int64_t g, int strip, const float *scales, float *out)
{
    const struct weight *w = job->weight;
    const int terms = weight_terms(w, job->tiles), eights = by_eights(w);
    int have = 1;
    int64_t r = r0, pair = 0;
#define EACH_PAIR for (; r < r1; r += 2, pair++, scales += 2 * LANES)
#define AT_PAIR (out + pair / LANES * 2 * TILE_FLOATS + pair % LANES * LANES)
#define RESTORE(strips, terms)                                                               \
    if (eights)                                                                              \
        EACH_PAIR restore_eights(w, r, r1, g, strip, strips, scales, AT_PAIR, terms);        \
    else                                                                                     \
        EACH_PAIR restore_nibbles(w, r, r1, g, strip, strips, scales, AT_PAIR, terms)
    if (!w->order && job->tiles == 1)
        EACH_PAIR copy_pair(w, r, r1, g, 0, GRADIENT_STRIPS, AT_PAIR, BFLOAT16);
    else if (!w->order && terms == 1)
        EACH_PAIR have &= copy_pair(w, r, r1, g, strip, 1, AT_PAIR, BFLOAT16);
    else if (!w->order)
        EACH_PAIR have &= copy_pair(w, r, r1, g, strip, 1, AT_PAIR, FLOAT16);
    else if (terms == 1)
        RESTORE(GRADIENT_STRIPS, 1);
    else if (terms == 2)
        RESTORE(1, 2);
    else
        RESTORE(1, TERMS);
#undef RESTORE
    for (const int64_t end = r0 + round_up(r1 - r0, LINE); r < end; r += 2, pair++)
        for (int t = 0; t < (job->tiles == 1 ? GRADIENT_STRIPS : terms); t++) {
            v_store(AT_PAIR + t * STRIP, v_zero());
            v_store(AT_PAIR + t * STRIP + TILE_FLOATS, v_zero());
        }
    if (!have)
        refuse(job);
}
