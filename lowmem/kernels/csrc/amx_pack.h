/* Inputs as x @ W.T by AMX multiplies them: in the order in which codes are restored, pairs of columns with sixteen inputs. */

/* How codes come into lines, whose 32 columns may be any, as long as those of the input are the same. */
enum kind {
    SIXTEEN, /* no codes: 16-bit floats */
    EIGHTS,  /* blocks of 16 and 32: nibbles 0 to 3 of the eight 16-bit words of 16 bytes. All others: a nibble of all 32 */
    FOURS,   /* blocks of which a group has two at most: 64, 128 and more */
    WORDS,   /* other blocks of whole words, whose weights are scaled one by one, */
    APART    /* and blocks that are not */
};

static enum kind kind_of(const struct weight *w)
{
    if (!w->order)
        return SIXTEEN;
    if (!w->order->whole_words)
        return APART;
    return w->half == 8 || w->half == 16 ? EIGHTS : w->half == 32 || w->half >= 64 ? FOURS : WORDS;
}

/* Where a column comes up that the order of the words has at `place`: in which line, and where in it. */
INLINE int64_t line_of(int64_t place, enum kind kind)
{
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return place / GROUP * LINES + (kind == EIGHTS ? word / 4 : nibble % 4);
}
INLINE int64_t at_in_line(int64_t place, enum kind kind)
{
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return 2 * (kind == EIGHTS ? nibble % 4 * 4 + word % 4 : word) + nibble / 4;
}

/* Columns c and on of an input as words, as many of LINE as are there: as they are, or as terms, `step` vectors apart. */
INLINE void load_line(const struct job *job, int64_t m, int64_t c, V factor, const int terms, W *out, int64_t step, W *most)
{
    const int64_t left = job->weight->columns - c, at = m * job->weight->columns + c;
    if (terms == 1) {
        *out = words_load((const uint8_t *)((const uint16_t *)job->x + at), 2 * left);
        return;
    }
    *most = load_terms((const float *)job->x + at, left, factor, terms, out, step, *most);
}

/* Pack sixteen inputs, of which `inputs` are there, from m on: line by line, pairs of columns with all sixteen. */
INLINE void pack_sixteen(const struct job *job, int64_t m, int64_t inputs, float *out, const int terms)
{
    const struct weight *w = job->weight;
    const enum kind kind = kind_of(w);
    const int64_t columns = w->columns, before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP;
    const int64_t term = floats / LINE * TILE_FLOATS;
    const V factor = v_set1(input_factor(w, terms));
    W words[TERMS * LANES], most[LANES];
    for (int i = 0; i < LANES; i++)
        most[i] = _mm512_setzero_si512();
    for (int i = 0; i < TERMS * LANES; i++)
        words[i] = _mm512_setzero_si512();
    if (kind == SIXTEEN) {
        for (int64_t c = before; c < before + floats; c += LINE, out += TILE_FLOATS) {
            for (int64_t i = 0; i < inputs; i++)
                load_line(job, m + i, c, factor, terms, words + i, LANES, most + i);
            for (int t = 0; t < terms; t++) {
                V v[LANES];
                EACH_LANE v[i] = v_of_words(words[t * LANES + i]);
                v_transpose(v);
                EACH_LANE v_store(out + t * term + i * LANES, v[i]);
            }
        }
    } else {
        /* Four columns that lie in one word are two pairs: those of its even bytes, and those of its odd ones. */
        const W pairs = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
        const int64_t odd = kind == EIGHTS ? 8 * LANES : 2 * TILE_FLOATS; /* floats from the even to the odd ones */
        const int64_t size = 2 * w->half, left = columns % size, end = smaller(columns, before + floats + size);
        const int64_t by_fours = kind == APART ? 0 : left % 8 ? columns - left : columns, whole = smaller(end, by_fours) / LINE * LINE;
        int64_t c = before > size ? (before - size) / LINE * LINE : 0;
        if (whole < before + floats)
            memset(out, 0, (size_t)(terms * term) * sizeof *out);
        for (; c < whole; c += LINE) {
            for (int64_t i = 0; i < inputs; i++)
                load_line(job, m + i, c, factor, terms, words + i, LANES, most + i);
            for (int t = 0; t < terms; t++) {
                V v[LANES];
                EACH_LANE v[i] = v_of_words(_mm512_shuffle_epi8(words[t * LANES + i], pairs));
                v_transpose(v);
                for (int i = 0; i < 8; i++) {
                    const int64_t place = w->order->place[c + 4 * i] - before;
                    if (place < 0 || place >= floats)
                        continue;
                    float *at = out + t * term + line_of(place, kind) * TILE_FLOATS + at_in_line(place, kind) / 2 * LANES;
                    v_store(at, v[2 * i]);
                    v_store(at + odd, v[2 * i + 1]);
                }
            }
        }
        for (; c < end; c++) {
            const int64_t place = w->order->place[c] - before;
            if (place < 0 || place >= floats)
                continue;
            const int64_t at = at_in_line(place, kind);
            uint16_t *pair = (uint16_t *)(out + line_of(place, kind) * TILE_FLOATS + at / 2 * LANES) + at % 2;
            for (int64_t i = 0; i < inputs; i++) {
                if (terms == 1) {
                    pair[2 * i] = ((const uint16_t *)job->x)[(m + i) * columns + c];
                    continue;
                }
                float value = ((const float *)job->x)[(m + i) * columns + c];
                most[i] = larger(most[i], v_set1(value));
                value *= input_factor(w, terms);
                for (int t = 0; t < terms; t++) {
                    const uint16_t bits = float_to_bfloat(value);
                    pair[2 * (t * term + i)] = bits;
                    value -= bfloat_to_float(bits);
                }
            }
        }
    }
    if (terms > 1)
        for (int64_t i = 0; i < inputs; i++)
            if (!input_has_terms((uint32_t)_mm512_reduce_max_epi32(most[i])))
                refuse(job);
}

/* Pack a piece of the batch. */
static void pack_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t batch = job->m1 - job->m0, floats = (job->g1 - job->g0) * LINES * TILE_FLOATS * job->tiles;
    int64_t m, to;
    (void)thread;
    share(batch, TILED_INPUTS, parts, part, &m, &to);
    for (; m < to; m += TILED_INPUTS) {
        const int64_t inputs = smaller(TILED_INPUTS, batch - m);
        float *out = job->packed + m / TILED_INPUTS * floats;
        if (job->tiles == 1)
            pack_sixteen(job, job->m0 + m, inputs, out, 1);
        else
            pack_sixteen(job, job->m0 + m, inputs, out, TERMS);
    }
}
