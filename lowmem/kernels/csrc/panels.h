/* Many inputs that fill vectors, LANES of them a panel: inputs lie across the lanes, and each number of a row is multiplied with
 * all of a panel at once. Rows are restored as they lie (tiled.h, restore_row): neither codes nor scales are transposed, only
 * inputs, once a call, and what comes out. Units come in the order of the words: nibble k of LANES words, or pairs of these. */

_Static_assert(LANES == PANEL || MANY_ROWS <= PANEL_ROWS, "scratch for panels is enough where they are not used");
_Static_assert(PANEL_ROWS % LANES == 0 && PANEL_ROWS <= 16, "sums of rows are turned by whole vectors, and numbered up to 16");

INLINE int LEVEL(by_panels)(const struct job *job) { return LANES == PANEL && job->panels; }

/* Where unit n of the columns that are packed lies, in the panel that begins with input m: LANES inputs. */
INLINE float *LEVEL(unit_at)(const struct job *job, int64_t m, int64_t n)
{
    const int64_t batch = round_up(job->m1 - job->m0, LANES);
    return job->packed + (n / PART_FLOATS * batch + m - job->m0) * PART_FLOATS + n % PART_FLOATS * LANES;
}

/* LANES columns from c on of the panel that begins with input m, column by column: as float32, or in pairs as they are where
 * products are taken in bfloat16. What is not there is zero. */
INLINE void LEVEL(inputs_across)(const struct job *job, int64_t m, int64_t c, const int type, const int low, V *v)
{
    const int64_t columns = job->weight->columns, size = type == FLOAT32 ? 4 : 2, n = (low ? 2 : 1) * LANES;
    const char *x = (const char *)job->x + (m * columns + c) * size;
    const int64_t there = smaller(LANES, job->m1 - m), left = smaller(n, columns - c);
    if (there == LANES && left == n) {
        EACH_LANE v[i] = LEVEL(load_as)(x + i * columns * size, low ? FLOAT32 : type, 0);
    } else {
        for (int64_t i = 0; i < LANES; i++) {
            float row[LANES] = {0};
            if (i < there && (type == FLOAT32 || low))
                memcpy(row, x + i * columns * size, (size_t)(left * size));
            else if (i < there)
                LEVEL(widen_run)((const uint16_t *)(x + i * columns * size), left, row, type);
            v[i] = v_load(row);
        }
    }
    v_transpose(v);
}

/* Pack the panel that begins with input m: each column, where its code comes up. */
INLINE void LEVEL(pack_panel)(const struct job *job, int64_t m, const int type)
{
    const struct weight *w = job->weight;
    const int64_t before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP;
    for (int64_t n = w->columns < w->stride ? floats - GROUP : floats; n < floats; n++)
        v_store(LEVEL(unit_at)(job, m, n), v_zero());
    int64_t c, end;
    columns_between(w, job->g0, job->g1, GROUP, &c, &end);
    for (; c < end; c += LANES) {
        V v[LANES];
        LEVEL(inputs_across)(job, m, c, type, 0, v);
        for (int64_t i = 0; i < smaller(LANES, end - c); i++) {
            const int64_t n = (w->order ? w->order->place[c + i] : c + i) - before;
            if (n >= 0 && n < floats)
                v_store(LEVEL(unit_at)(job, m, n), v[i]);
        }
    }
}

#if LEVEL_LOW
/* Whether each of 2 * LANES columns from c on, a multiple of that, makes a unit with the one four columns behind it. */
INLINE int LEVEL(in_pairs)(const struct weight *w, int64_t c)
{
    const int32_t *place = w->order->place;
    for (int64_t i = c; i < c + 2 * LANES; i++)
        if (i % 8 < 4 && (place[i] % 2 || place[i + 4] != place[i] + 1))
            return 0;
    return 1;
}

/* The same as bfloat16, in pairs of columns whose codes come up side by side. */
static void LEVEL(pack_panel_low)(const struct job *job, int64_t m)
{
    const struct weight *w = job->weight;
    const int64_t before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP, there = smaller(LANES, job->m1 - m);
    const int32_t *place = w->order->place;
    const W front = _mm512_set1_epi32(0xffff);
    for (int64_t n = w->columns < w->stride ? floats - GROUP : floats; n < floats; n += 2)
        v_store(LEVEL(unit_at)(job, m, n / 2), v_zero());
    int64_t c, end;
    columns_between(w, job->g0, job->g1, GROUP, &c, &end);
    for (; c < end; c += 2 * LANES) {
        if (c + 2 * LANES <= w->columns && LEVEL(in_pairs)(w, c)) {
            V v[LANES];
            LEVEL(inputs_across)(job, m, c, BFLOAT16, 1, v);
            EACH_LANE if (i / 2 % 2 == 0) {
                const W a = (W)v[i], b = (W)v[i + 2]; /* columns c + 2 * i and the next, and those four columns behind */
                const int64_t n = place[c + 2 * i] - before, next = place[c + 2 * i + 1] - before;
                if (n >= 0 && n < floats)
                    v_store(LEVEL(unit_at)(job, m, n / 2), (V)_mm512_or_si512(_mm512_and_si512(a, front), _mm512_slli_epi32(b, 16)));
                if (next >= 0 && next < floats)
                    v_store(LEVEL(unit_at)(job, m, next / 2), (V)_mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_andnot_si512(front, b)));
            }
            continue;
        }
        for (int64_t k = c; k < smaller(c + 2 * LANES, end); k++) {
            const int64_t n = place[k] - before;
            for (int64_t i = 0; n >= 0 && n < floats && i < there; i++)
                memcpy((char *)(LEVEL(unit_at)(job, m, n / 2) + i) + n % 2 * 2, (const uint16_t *)job->x + (m + i) * w->columns + k, 2);
        }
    }
}
#endif

static void LEVEL(pack_panels)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    int64_t m, to;
    (void)thread;
    share(round_up(job->m1 - job->m0, LANES), LANES, parts, part, &m, &to);
    for (m += job->m0, to += job->m0; m < to; m += LANES)
#if LEVEL_LOW
        if (job->low)
            LEVEL(pack_panel_low)(job, m);
        else
#endif
            if (job->type == FLOAT32)
                LEVEL(pack_panel)(job, m, FLOAT32);
            else if (job->type == BFLOAT16)
                LEVEL(pack_panel)(job, m, BFLOAT16);
            else
                LEVEL(pack_panel)(job, m, FLOAT16);
}

/* Begin to restore PANEL_ROWS rows into a tile, from a column on. `units`: what steps of these rows' scales count. */
INLINE void LEVEL(begin_rows)(const struct job *job, int64_t r, int64_t c, int64_t columns, float *units, float *tile,
                              struct LEVEL(restoring) *to)
{
    const struct weight *w = job->weight;
    const struct LEVEL(restoring) rows = {
        .w = w, .tile = tile, .scales = units, .r = r, .g = c / GROUP, .count = (int)(columns / GROUP) * PANEL_ROWS,
    };
    for (int i = 0; w->order && w->encoding >= SCALES_DOUBLE && c == job->g0 * GROUP && i < PANEL_ROWS; i++)
        units[i] = LEVEL(row_scale)(w, smaller(r + i, w->rows - 1)) / row_steps(w);
    *to = rows;
}

/* Sums of so many rows, LANES inputs of each, as those of inputs, so many of each. */
INLINE void LEVEL(turn)(const float *sums, const int rows, float *out)
{
    for (int r = 0; r < rows; r += LANES) {
        V v[LANES];
        EACH_LANE v[i] = v_load(sums + (r + i) * LANES);
        v_transpose(v);
        EACH_LANE v_store(out + i * rows + r, v[i]);
    }
}

/* Rows r to `to` with all inputs of a piece: while a tile is multiplied with all panels, the next one is restored. */
INLINE void LEVEL(panel_rows)(const struct job *job, int64_t r, int64_t to, float *own, const int low)
{
    const int64_t batch = round_up(job->m1 - job->m0, LANES), begin = job->g0 * GROUP, end = job->g1 * GROUP;
    float *units = own, *sums = own + SUMS_AT, *turned = own + TILES_AT; /* of all inputs of a piece */
    float *tile = turned + MOST * PANEL_ROWS, *other = tile + PANEL_ROWS * PART_FLOATS;
    _Static_assert(TILES_AT + MOST * PANEL_ROWS + 2 * PANEL_ROWS * PART_FLOATS <= SUMS_AT, "there is room for them");
    int64_t columns = smaller(PART(low), end - begin);
    struct LEVEL(restoring) next;
    LEVEL(begin_rows)(job, r, begin, columns, units, tile, &next);
    const T table = table_load(job->weight->levels ? job->weight->levels : tile); /* any sixteen floats */
    while (next.vectors < next.count)
        LEVEL(restore_row)(&next, table, low);
    for (int64_t c = begin; r < to;) {
        const int64_t this_r = r, this_c = c, n = columns;
        c += columns;
        if (c == end)
            c = begin, r += PANEL_ROWS;
        columns = smaller(PART(low), end - c);
        if (this_c == begin)
            memset(sums, 0, (size_t)(batch * PANEL_ROWS) * sizeof(float));
        next.count = next.vectors = 0;
        if (r < to)
            LEVEL(begin_rows)(job, r, c, columns, units, other, &next);
        const uint8_t *fetch = LEVEL(codes_behind)(job, r, c, FETCH_PARTS * PART(low), PANEL_ROWS);
        for (int64_t m = 0; m < batch; m += LANES) {
            const float *x = LEVEL(unit_at)(job, job->m0 + m, (this_c - begin) / (low ? 2 : 1));
            LEVEL(multiply)(x, (int)n / 8, tile, PANEL_ROWS, sums + m * PANEL_ROWS, &next, (int)(next.count * (m + LANES) / batch),
                            m ? NULL : fetch, low, 1, 0);
            if (r != this_r)
                LEVEL(turn)(sums + m * PANEL_ROWS, PANEL_ROWS, turned + m * PANEL_ROWS);
        }
        float *done = tile;
        tile = other;
        other = done;
        if (r != this_r)
            LEVEL(put_rows)(job, this_r, smaller(PANEL_ROWS, to - this_r), PANEL_ROWS / LANES, turned);
    }
}
