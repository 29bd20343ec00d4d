/* The cross entropy of rows of logits, and its gradient in their place; lowmem/kernels/entropy.py has the definition. */

/* The larger one of each pair; a NaN in `a` is skipped. */
INLINE V v_larger(V a, V than) { return v_where((I)(a > than), a, than); }

INLINE float largest_of(V v)
{
    float some[LANES], top;
    v_store(some, v);
    top = some[0];
    for (int i = 1; i < LANES; i++)
        top = some[i] > top ? some[i] : top;
    return top;
}

INLINE float sum_of(V v)
{
    float some[LANES], sum = 0.0f;
    v_store(some, v);
    for (int i = 0; i < LANES; i++)
        sum += some[i];
    return sum;
}

/* e^x for x <= 0; zero below -87, so that no product has a subnormal factor. */
INLINE V v_exp_below(V x)
{
    return (V)((I)v_exp(v_within(x)) & ~(I)(x < v_set1(-87.0f)));
}

INLINE void entropy_row(const struct rowwise *r, int64_t row, const int type)
{
    const int64_t n = r->columns, whole = n / LANES * LANES, at = row * n, target = ((const int64_t *)r->b)[row];
    const float smoothing = r->numbers[0], spread = smoothing / (float)n;
    V tops = v_set1(-INFINITY), sums = v_zero(), shifts = v_zero();
    for (int64_t c = 0; c < whole; c += LANES)
        tops = v_larger(load_as(r->a, type, at + c), tops);
    float top = largest_of(tops), sum, shift;
    for (int64_t c = whole; c < n; c++) {
        const float x = read_as_float(r->a, type, at + c);
        top = x > top ? x : top;
    }
    const V most = v_set1(top);
    for (int64_t c = 0; c < whole; c += LANES) {
        const V x = v_sub(load_as(r->a, type, at + c), most);
        sums = v_add(sums, v_exp_below(x));
        shifts = v_add(shifts, x);
    }
    sum = sum_of(sums);
    shift = sum_of(shifts);
    for (int64_t c = whole; c < n; c++) {
        const float x = read_as_float(r->a, type, at + c) - top;
        sum += expf(x);
        shift += x;
    }
    const float log_sum = logf(sum), inverse = 1.0f / sum, own = read_as_float(r->a, type, at + target) - top;
    float loss = (1.0f - smoothing) * (log_sum - own);
    if (smoothing != 0.0f) /* else 0 * shift would be NaN if a logit is minus infinity */
        loss += smoothing * log_sum - spread * shift;
    ((float *)r->out[1])[row] = loss;
    if (r->numbers[1] == 0.0f)
        return;
    const V by = v_set1(inverse), less = v_set1(spread);
    for (int64_t c = 0; c < whole; c += LANES) {
        const V x = v_sub(load_as(r->a, type, at + c), most);
        store_as(r->out[0], type, at + c, v_sub(v_mul(v_exp_below(x), by), less));
    }
    for (int64_t c = whole; c < n; c++)
        write_as(r->out[0], type, at + c, expf(read_as_float(r->a, type, at + c) - top) * inverse - spread);
    write_as(r->out[0], type, at + target, expf(own) * inverse - (1.0f - smoothing) - spread);
}
