/* Floats to 8-bit codes in blocks of 32 with one scale each, and back; lowmem/kernels/codes.py has the definition. */

enum { CODED = 32 };

/* Number of nonzero elements before coding and of nonzero codes, and whether a scale is not finite. */
struct lost {
    int64_t before, after, broken;
};

INLINE void code_block(const struct rowwise *r, int64_t block, struct lost *lost, const int type)
{
    const int64_t at = block * CODED, left = r->step - at;
    int8_t *codes = (int8_t *)r->out[0] + at;
    float x[CODED] = {0};
    V tops = v_zero(), broken = v_zero();
    for (int64_t c = 0; c < CODED && c < left; c += LANES) {
        const V v = load_some(r->a, type, at + c, left - c);
        tops = v_larger((V)((I)v & 0x7fffffffu), tops);
        broken = v_add(broken, v_mul(v, v_zero()));
        v_store(x + c, v);
    }
    const float scale = largest_of(tops) / 127.0f + sum_of(broken); /* NaN if an element is not finite */
    const float by = scale > 0x1p-126f ? scale : 0x1p-126f, shift = 0x1.8p23f; /* adding it rounds to even */
    int before = 0, after = 0;
    for (int c = 0; c < CODED; c++) {
        codes[c] = (int8_t)bits_of(x[c] / by + shift);
        before += x[c] != 0.0f;
        after += codes[c] != 0;
    }
    ((float *)r->out[1])[block] = scale;
    lost->before += before;
    lost->after += after;
    lost->broken |= scale != scale;
}

INLINE void decode_block(const struct rowwise *r, int64_t block, const int type)
{
    const int8_t *codes = (const int8_t *)r->a + block * CODED;
    const V scale = v_set1(((const float *)r->b)[block]);
    float x[CODED];
    for (int c = 0; c < CODED; c++)
        x[c] = (float)codes[c];
    for (int64_t c = 0; c < CODED; c += LANES)
        store_as(r->out[0], type, block * CODED + c, v_mul(v_load(x + c), scale));
}

static void add_lost(const struct lost *lost, int64_t *all)
{
    __atomic_fetch_add(all, lost->before, __ATOMIC_RELAXED);
    __atomic_fetch_add(all + 1, lost->after, __ATOMIC_RELAXED);
    __atomic_fetch_or(all + 2, lost->broken, __ATOMIC_RELAXED);
}
