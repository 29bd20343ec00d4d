/* Columns of a weight, rounded one after the other; each is first corrected for the errors of those before it.
 * lowmem/kernels/columns.py has the definition. */

enum { MOST_COLUMNS = 64 }; /* most columns of a call */

/* Round all columns for up to LANES rows of the weight, from row `at` on. Arrays are transposed: row i has column i
 * of the weight. a: values, replaced by changes; b: levels, boundaries, pivots and the matrix; grad: scales. */
INLINE void round_columns(const struct rowwise *r, int64_t at, const int descends)
{
    const float *levels = r->b, *pivots = levels + 32, *matrix = pivots + r->rows;
    const T table = table_load(levels);
    const B boundaries = boundaries_load(levels + 16);
    const int64_t n = r->columns - at;
    V changes[MOST_COLUMNS];
    uint8_t codes[MAX_LANES];
    for (int64_t i = 0; i < r->rows; i++, at += r->columns) {
        const V scale = load_some(r->grad, FLOAT32, at, n), pivot = v_set1(pivots[i]);
        const V divisor = v_where((I)(scale == v_zero()), v_set1(float_of(0x7f800000)), scale);
        V left = load_some(r->a, FLOAT32, at, n);
        for (int64_t j = 0; j < i; j++)
            left = v_fma(v_set1(-matrix[i * r->rows + j]), changes[j], left);
        const V before = load_some(r->out[0], FLOAT32, at, n);
        const W code = v_code(boundaries, v_div(descends ? v_add(before, v_div(left, pivot)) : left, divisor));
        const V near = v_mul(v_lookup(table, code, 0), scale);
        changes[i] = descends ? v_sub(near, before) : v_div(v_sub(left, near), pivot);
        store_some((void *)(intptr_t)r->a, FLOAT32, at, n, changes[i]); /* a is written, too */
        store_some(r->out[0], FLOAT32, at, n, near);
        codes_store(codes, code);
        memcpy((uint8_t *)r->out[1] + at, codes, (size_t)smaller(n, LANES));
    }
}
