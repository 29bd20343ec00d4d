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

/* Where a column comes up that the order of the words has at `place`, or that is the one at `place`: in which line, and where in it. */
INLINE int64_t line_of(int64_t place, enum kind kind)
{
    if (kind == SIXTEEN)
        return place / LINE;
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return place / GROUP * LINES + (kind == EIGHTS ? word / 4 : nibble % 4);
}
INLINE int64_t at_in_line(int64_t place, enum kind kind)
{
    if (kind == SIXTEEN)
        return place % LINE;
    const int64_t nibble = place % GROUP / LANES, word = place % LANES;
    return 2 * (kind == EIGHTS ? nibble % 4 * 4 + word % 4 : word) + nibble / 4;
}

/* Where its pair lies among those of sixteen inputs, in floats. */
INLINE int64_t pair_at(int64_t place, enum kind kind)
{
    return line_of(place, kind) * TILE_FLOATS + at_in_line(place, kind) / 2 * LANES;
}

/* Pack sixteen bfloat16 inputs, of which `inputs` are there, from m on: line by line, pairs of columns with all sixteen. */
static void pack_sixteen(const struct job *job, int64_t m, int64_t inputs, float *out)
{
    const struct weight *w = job->weight;
    const enum kind kind = kind_of(w);
    const int64_t columns = w->columns, before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP;
    const uint16_t *x = (const uint16_t *)job->x + m * columns;
    if (kind == SIXTEEN) {
        for (int64_t c = before; c < before + floats; c += LINE, out += TILE_FLOATS) {
            V v[LANES];
            EACH_LANE v[i] = v_of_words(words_load((const uint8_t *)(x + i * columns + c), i < inputs ? 2 * (columns - c) : 0));
            v_transpose(v);
            EACH_LANE v_store(out + i * LANES, v[i]);
        }
        return;
    }
    /* Four columns that lie in one word are two pairs: those of its even bytes, and those of its odd ones. */
    const W pairs = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
    const int64_t odd = kind == EIGHTS ? 8 * LANES : 2 * TILE_FLOATS; /* floats from the even to the odd ones */
    const int64_t size = 2 * w->half, left = columns % size, end = smaller(columns, before + floats + size);
    const int64_t by_fours = kind == APART ? 0 : left % 8 ? columns - left : columns, whole = smaller(end, by_fours) / LINE * LINE;
    int64_t c = before > size ? (before - size) / LINE * LINE : 0;
    if (whole < before + floats)
        memset(out, 0, (size_t)(floats / LINE * TILE_FLOATS) * sizeof *out);
    for (; c < whole; c += LINE) {
        V v[LANES];
        for (int i = 0; i < LANES; i++) {
            const W of = i < inputs ? _mm512_loadu_si512(x + i * columns + c) : _mm512_setzero_si512();
            v[i] = v_of_words(_mm512_shuffle_epi8(of, pairs));
        }
        v_transpose(v);
        for (int i = 0; i < 8; i++) {
            const int64_t place = w->order->place[c + 4 * i] - before;
            if (place < 0 || place >= floats)
                continue;
            float *at = out + pair_at(place, kind);
            v_store(at, v[2 * i]);
            v_store(at + odd, v[2 * i + 1]);
        }
    }
    for (; c < end; c++) {
        const int64_t place = w->order->place[c] - before;
        if (place < 0 || place >= floats)
            continue;
        uint16_t *pair = (uint16_t *)(out + pair_at(place, kind)) + at_in_line(place, kind) % 2;
        for (int64_t i = 0; i < inputs; i++)
            pair[2 * i] = x[i * columns + c];
    }
}

/* The same of float32 inputs, as terms: all lines of one term, then those of the next. */
static void pack_sixteen_terms(const struct job *job, int64_t m, int64_t inputs, float *out)
{
    const struct weight *w = job->weight;
    const enum kind kind = kind_of(w);
    const int64_t columns = w->columns, before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP;
    const int64_t term = floats / LINE * TILE_FLOATS, odd = kind == EIGHTS ? 8 * LANES : 2 * TILE_FLOATS;
    const int64_t size = 2 * w->half, left = size ? columns % size : 0, end = smaller(columns, before + floats + size);
    const int64_t by_fours = kind == APART ? 0 : left % 8 ? columns - left : columns, whole = smaller(end, by_fours) / LANES * LANES;
    const float *x = (const float *)job->x + m * columns, step = input_factor(w, TERMS);
    const V factor = v_set1(step);
    W most = _mm512_setzero_si512();
    int64_t c = before > size ? (before - size) / LINE * LINE : 0;
    if (whole < before + floats)
        memset(out, 0, (size_t)(TERMS * term) * sizeof *out);
    for (; c < whole; c += LANES) {
        V v[LANES];
        EACH_LANE v[i] = i < inputs ? v_load(x + i * columns + c) : v_zero();
        v_transpose(v); /* a column of all inputs each */
        EACH_LANE
        {
            most = larger(most, v[i]);
            v[i] = v_mul(v[i], factor);
        }
        if (kind == SIXTEEN) {
            float *at = out + pair_at(c - before, kind);
            for (int i = 0; i < LANES; i += 2, at += LANES)
                put_pairs(v[i], v[i + 1], TERMS, at, term);
            continue;
        }
        for (int i = 0; i < LANES; i += 4) {
            const int64_t place = w->order->place[c + i] - before;
            if (place < 0 || place >= floats)
                continue;
            float *at = out + pair_at(place, kind);
            put_pairs(v[i], v[i + 2], TERMS, at, term);
            put_pairs(v[i + 1], v[i + 3], TERMS, at + odd, term);
        }
    }
    for (; c < end; c++) {
        const int64_t place = (w->order ? w->order->place[c] : c) - before;
        float column[LANES] = {0};
        for (int64_t i = 0; i < inputs; i++)
            column[i] = x[i * columns + c];
        most = larger(most, v_load(column));
        if (place < 0 || place >= floats)
            continue;
        uint16_t *pair = (uint16_t *)(out + pair_at(place, kind)) + at_in_line(place, kind) % 2;
        for (int64_t i = 0; i < inputs; i++) {
            float value = column[i] * step;
            for (int t = 0; t < TERMS; t++) { /* as split_pairs */
                const uint16_t bits = (uint16_t)(bits_of(value) >> 16);
                pair[2 * (t * term + i)] = bits;
                value -= bfloat_to_float(bits);
            }
        }
    }
    if (!inputs_have_terms(most))
        refuse(job);
}

/* Pack a piece of the batch. */
static void pack_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const int64_t batch = job->m1 - job->m0, floats = (job->g1 - job->g0) * LINES * TILE_FLOATS * job->tiles;
    int64_t m, to;
    (void)thread;
    share(batch, TILED_INPUTS, parts, part, &m, &to);
    for (; m < to && !is_refused(job); m += TILED_INPUTS) {
        const int64_t inputs = smaller(TILED_INPUTS, batch - m);
        float *out = job->packed + m / TILED_INPUTS * floats;
        if (job->tiles == 1)
            pack_sixteen(job, job->m0 + m, inputs, out);
        else
            pack_sixteen_terms(job, job->m0 + m, inputs, out);
    }
}
