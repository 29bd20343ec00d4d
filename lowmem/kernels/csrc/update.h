/* A low-rank update of a small batch, in float32: out = base + scaling * (x @ A.T) @ B.T. */

/* Rows r to r + R of a matrix (rows, columns) with M inputs (batch, columns): R * M sums. */
INLINE void LEVEL(dots)(const float *matrix, int64_t columns, const int R, const float *x, const int M, float *out)
{
    V acc[FEW_SUMS];
    const int64_t whole = columns / LANES * LANES;
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t c = 0; c < whole; c += LANES) {
        V row[4];
        EACH_ROW row[i] = v_load(matrix + i * columns + c);
        EACH_INPUT {
            const V value = v_load(x + j * columns + c);
            EACH_ROW acc[AT] = v_fma(row[i], value, acc[AT]);
        }
    }
    for (int j = 0; j < M; j++) {
        if (R == 4)
            v_sum4(acc[j], acc[M + j], acc[2 * M + j], acc[3 * M + j], out + j * R);
        else
            out[j * R] = v_sum(acc[j]);
        for (int i = 0; i < R; i++)
            for (int64_t c = whole; c < columns; c++)
                out[j * R + i] += matrix[i * columns + c] * x[j * columns + c];
    }
}

INLINE void LEVEL(dots_of)(const float *matrix, int64_t columns, const int R, const float *x, int64_t M, float *out)
{
    switch (M) {
    case 1: LEVEL(dots)(matrix, columns, R, x, 1, out); break;
    case 2: LEVEL(dots)(matrix, columns, R, x, 2, out); break;
    case 3: LEVEL(dots)(matrix, columns, R, x, 3, out); break;
    default: LEVEL(dots)(matrix, columns, R, x, FEW, out); break;
    }
}

/* out = base + scale * (x @ matrix.T), or without a base: rows r to `to` of a matrix (rows, columns). Groups of four start
 * at every fourth row, so that parts of a matrix make the same sums as the whole. */
INLINE void LEVEL(small_product)(int64_t batch, int64_t r, int64_t to, const float *matrix, int64_t rows, int64_t columns,
                                 const float *x, const float *base, float scale, float *out)
{
    for (int64_t R; r < to; r += R) {
        R = to - r >= 4 ? 4 : 1;
        for (int64_t m = 0; m < batch; m += FEW) {
            const int64_t M = smaller(FEW, batch - m);
            float sums[FEW_SUMS];
            if (R == 4)
                LEVEL(dots_of)(matrix + r * columns, columns, 4, x + m * columns, M, sums);
            else
                LEVEL(dots_of)(matrix + r * columns, columns, 1, x + m * columns, M, sums);
            for (int64_t j = 0; j < M; j++)
                for (int64_t i = 0; i < R; i++) {
                    const int64_t at = (m + j) * rows + r + i;
                    out[at] = (base ? base[at] : 0.0f) + sums[j * R + i] * scale;
                }
        }
    }
}

/* narrow = scaling * (x @ A.T): a part of its columns. */
static void LEVEL(narrow_body)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    (void)thread;
    const struct update *u = job->update;
    int64_t r, to;
    share(u->rank, 4, parts, part, &r, &to);
    LEVEL(small_product)(job->batch, r, to, u->a, u->rank, u->columns, u->x, NULL, u->scaling, u->narrow);
}

/* out = base + narrow @ B.T: rows r to `to` of B. */
static void LEVEL(add_wide)(const struct job *job, int64_t r, int64_t to)
{
    const struct update *u = job->update;
    LEVEL(small_product)(job->batch, r, to, u->b, u->rows, u->rank, u->narrow, u->base, 1.0f, u->out);
}

static void LEVEL(wide_body)(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    (void)thread;
    int64_t r, to;
    share(job->update->rows, 4, parts, part, &r, &to);
    LEVEL(add_wide)(job, r, to);
}

static void LEVEL(update)(struct job *job) { parallel(job, LEVEL(narrow_body), 1, LEVEL(wide_body), 1); }
