/* The input gradient in bfloat16: pairs of rows side by side, so that vdpbf16ps sums over the two. */

/* M rows of the gradient with pairs of restored rows: `grad` holds bfloat16, of which a pair is one float here. */
INLINE void LEVEL(accumulate_low)(const float *grad, int64_t grad_stride, const int M, const float *tile, int pairs,
                                  float *sums, int64_t stride)
{
    V acc[3][8];
    for (int j = 0; j < M; j++)
        for (int n = 0; n < 8; n++)
            acc[j][n] = v_load(sums + j * stride + n * LANES);
    for (int r = 0; r < pairs; r++) {
        __m512bh row[8];
        for (int n = 0; n < 8; n++)
            row[n] = (__m512bh)_mm512_loadu_si512(tile + r * GROUP + n * LANES);
        for (int j = 0; j < M; j++) {
            const __m512bh factor = (__m512bh)v_set1(grad[j * grad_stride + r]);
            for (int n = 0; n < 8; n++)
                acc[j][n] = _mm512_dpbf16_ps(acc[j][n], row[n], factor);
        }
    }
    for (int j = 0; j < M; j++)
        for (int n = 0; n < 8; n++)
            v_store(sums + j * stride + n * LANES, acc[j][n]);
}

static void LEVEL(grad_tile_low)(const struct job *job, int64_t r0, int64_t r1, int64_t g, float *scales, float *tile,
                                 float *sums)
{
    const struct weight *w = job->weight;
    float pair[2][GROUP];
    for (int64_t r = r0; r < r1; r += 2) {
        LEVEL(decode)(w, r, g, g + 1, scales, pair[0]);
        if (r + 1 < r1)
            LEVEL(decode)(w, r + 1, g, g + 1, scales, pair[1]);
        else
            memset(pair[1], 0, sizeof pair[1]);
        for (int n = 0; n < GROUP; n += LANES)
            _mm512_storeu_si512(tile + (r - r0) / 2 * GROUP + n, LEVEL(pairs)(v_load(pair[0] + n), v_load(pair[1] + n)));
    }
    const int64_t stride = round_up(w->rows, 2) / 2, batch = job->m1 - job->m0;
    const float *grad = (const float *)job->x + job->m0 * stride + r0 / 2;
    const int pairs = (int)((r1 - r0 + 1) / 2);
    int64_t m = 0;
    for (; m + 3 <= batch; m += 3)
        LEVEL(accumulate_low)(grad + m * stride, stride, 3, tile, pairs, sums + m * w->stride, w->stride);
    for (; m < batch; m++)
        LEVEL(accumulate_low)(grad + m * stride, stride, 1, tile, pairs, sums + m * w->stride, w->stride);
}
