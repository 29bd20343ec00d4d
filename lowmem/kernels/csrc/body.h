/* One level of the kernel: the same code for every instruction set, over the few vector operations that the
 * file that includes this has defined:
 *
 *   LANES, LEVEL(name), V, v_zero, v_set1, v_load, v_store, v_mul, v_fma, v_sum
 *   W, words_load(p, left)   LANES 32-bit words from p, of which `left` bytes may be read; the rest is zero
 *   bytes_load(p)            LANES bytes, each widened to a word
 *   block_load(p)            LANES / 2 bytes, each widened to a word; then the same, shifted by a nibble
 *   T, table_load(levels), v_lookup(table, words, k)   the level of nibble k, 0 to 7, of each word
 *   v_spread(p, index)       p[index[i]], where 0 <= index[i] < LANES
 *   v_from_half(p, n, out)   n float16 to float32
 *   v_half(p), v_bfloat(p)   LANES float16 or bfloat16 as float32
 *
 * A 32-bit word of a row holds eight codes: the low nibble of a byte is a weight of the block's first half, the
 * high nibble the one half a block later. Rather than sort the codes of every row, the input is sorted once a
 * call into the order in which shifts bring them up: for a group of LANES words, nibble k of every word.
 */

#define GROUP (LANES * 8) /* weights in a group of words */
#define TILE_GROUPS (TILE_COLUMNS / GROUP)

static void LEVEL(scales)(const struct weight *w, int64_t row, float *out)
{
    const int64_t blocks = w->blocks;
    if (w->encoding == SCALES_FLOAT32) {
        memcpy(out, (const float *)w->scales + row * blocks, (size_t)blocks * sizeof *out);
    } else if (w->encoding == SCALES_FLOAT16) {
        v_from_half((const uint16_t *)w->scales + row * blocks, blocks, out);
    } else {
        const uint8_t *p = w->scales + row * (blocks + 2);
        uint16_t bits;
        memcpy(&bits, p + blocks, 2);
        const float row_scale = half_to_float(bits);
        for (int64_t i = 0; i < blocks; i++)
            out[i] = (float)p[i] * row_scale / 255.0f;
    }
}

static inline W LEVEL(words)(const struct weight *w, int64_t row, int64_t group)
{
    const int64_t start = group * LANES * 4;
    return words_load(w->packed + row * w->row_bytes + start, w->row_bytes - start);
}

static inline V LEVEL(spread)(const struct job *job, const float *scales, int64_t group)
{
    return v_spread(scales + job->first_block[group], job->lane_block + group * LANES);
}

/* R rows of the product with M sorted inputs, decoded in registers. */
static inline __attribute__((always_inline)) void LEVEL(few)(const struct job *job, int64_t r, const int R, int64_t m0,
                                                             const int M, float *scales)
{
    const struct weight *w = &job->weight;
    const T table = table_load(w->levels);
    V acc[4][4];
    for (int i = 0; i < R; i++) {
        LEVEL(scales)(w, r + i, scales + i * job->scale_stride);
        for (int m = 0; m < M; m++)
            acc[i][m] = v_zero();
    }
    for (int64_t g = 0; g < job->groups; g++) {
        const float *x = job->sorted + m0 * job->sorted_stride + g * GROUP;
        for (int i = 0; i < R; i++) {
            const W words = LEVEL(words)(w, r + i, g);
            V sum[4];
            for (int m = 0; m < M; m++)
                sum[m] = v_zero();
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                const V level = v_lookup(table, words, k);
                for (int m = 0; m < M; m++)
                    sum[m] = v_fma(level, v_load(x + m * job->sorted_stride + k * LANES), sum[m]);
            }
            const V scale = LEVEL(spread)(job, scales + i * job->scale_stride, g);
            for (int m = 0; m < M; m++)
                acc[i][m] = v_fma(sum[m], scale, acc[i][m]);
        }
    }
    for (int i = 0; i < R; i++)
        for (int m = 0; m < M; m++)
            job->out[(m0 + m) * w->rows + r + i] = v_sum(acc[i][m]) + (job->bias ? job->bias[r + i] : 0.0f);
}

/* 4 rows of a tile with M inputs. */
static inline __attribute__((always_inline)) void LEVEL(multiply)(const struct job *job, const float *tile,
                                                                  int64_t floats, int64_t column, int64_t r, const int R,
                                                                  int64_t m0, const int M)
{
    V acc[4][4];
    for (int i = 0; i < R; i++)
        for (int m = 0; m < M; m++)
            acc[i][m] = v_zero();
    const float *x = job->sorted + m0 * job->sorted_stride + column;
    for (int64_t c = 0; c < floats; c += LANES) {
        V row[4];
        for (int i = 0; i < R; i++)
            row[i] = v_load(tile + i * (TILE_GROUPS * GROUP) + c);
        for (int m = 0; m < M; m++) {
            const V value = v_load(x + m * job->sorted_stride + c);
            for (int i = 0; i < R; i++)
                acc[i][m] = v_fma(row[i], value, acc[i][m]);
        }
    }
    for (int i = 0; i < R; i++)
        for (int m = 0; m < M; m++) {
            float *out = job->out + (m0 + m) * job->weight.rows + r + i;
            const float before = column ? *out : job->bias ? job->bias[r + i] : 0.0f;
            *out = before + v_sum(acc[i][m]);
        }
}

/* The rows of a tile, from row r, with the whole batch. */
static void LEVEL(multiply_tile)(const struct job *job, const float *tile, int rows, int64_t floats, int64_t column, int64_t r)
{
    int i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float *part = tile + i * (TILE_GROUPS * GROUP);
        int64_t m = 0;
        for (; m + 4 <= job->batch; m += 4)
            LEVEL(multiply)(job, part, floats, column, r + i, 4, m, 4);
        for (; m < job->batch; m++)
            LEVEL(multiply)(job, part, floats, column, r + i, 4, m, 1);
    }
    for (; i < rows; i++)
        for (int64_t m = 0; m < job->batch; m++)
            LEVEL(multiply)(job, tile + i * (TILE_GROUPS * GROUP), floats, column, r + i, 1, m, 1);
}

/* Rows r to `to` with the whole batch: restored into a tile that stays in the first cache. */
static void LEVEL(many)(const struct job *job, int64_t r, int64_t to, float *scratch)
{
    const struct weight *w = &job->weight;
    const T table = table_load(w->levels);
    const int rows = (int)(to - r);
    float *tile = scratch + TILE_ROWS * job->scale_stride;
    for (int i = 0; i < rows; i++)
        LEVEL(scales)(w, r + i, scratch + i * job->scale_stride);
    for (int64_t g0 = 0; g0 < job->groups; g0 += TILE_GROUPS) {
        const int64_t g1 = g0 + TILE_GROUPS < job->groups ? g0 + TILE_GROUPS : job->groups;
        for (int i = 0; i < rows; i++)
            for (int64_t g = g0; g < g1; g++) {
                const W words = LEVEL(words)(w, r + i, g);
                const V scale = LEVEL(spread)(job, scratch + i * job->scale_stride, g);
                float *out = tile + i * (TILE_GROUPS * GROUP) + (g - g0) * GROUP;
#pragma GCC unroll 8
                for (int k = 0; k < 8; k++)
                    v_store(out + k * LANES, v_mul(v_lookup(table, words, k), scale));
            }
        const int64_t floats = (g1 - g0) * GROUP, column = g0 * GROUP;
        LEVEL(multiply_tile)(job, tile, rows, floats, column, r);
    }
}

static void LEVEL(linear)(const struct job *job, int64_t thread, float *scratch)
{
    int64_t r, to;
    share(job->weight.rows, TILE_ROWS, job->threads, thread, &r, &to);
    if (job->batch >= FEW_ROWS) {
        for (; r < to; r += TILE_ROWS)
            LEVEL(many)(job, r, r + TILE_ROWS < to ? r + TILE_ROWS : to, scratch);
        return;
    }
    for (; r + 4 <= to; r += 4) {
        if (job->batch == 1)
            LEVEL(few)(job, r, 4, 0, 1, scratch);
        else if (job->batch == 2)
            LEVEL(few)(job, r, 4, 0, 2, scratch);
        else if (job->batch == 3)
            LEVEL(few)(job, r, 4, 0, 3, scratch);
    }
    for (; r < to; r++)
        for (int64_t m = 0; m < job->batch; m++)
            LEVEL(few)(job, r, 1, m, 1, scratch);
}

/* grad @ W into `sorted`: a thread takes groups of columns, and for each of them all rows in order. */
static void LEVEL(input_grad)(const struct job *job, int64_t thread, float *scratch)
{
    const struct weight *w = &job->weight;
    const T table = table_load(w->levels);
    int64_t g0, g1;
    share(job->groups, 1, job->threads, thread, &g0, &g1);
    for (int64_t m = 0; m < job->batch; m++)
        memset(job->sorted + m * job->sorted_stride + g0 * GROUP, 0, (size_t)((g1 - g0) * GROUP) * sizeof(float));
    for (int64_t r0 = 0; r0 < w->rows && g0 < g1; r0 += GRAD_ROWS) {
        const int64_t r1 = r0 + GRAD_ROWS < w->rows ? r0 + GRAD_ROWS : w->rows;
        for (int64_t r = r0; r < r1; r++)
            LEVEL(scales)(w, r, scratch + (r - r0) * job->scale_stride);
        for (int64_t g = g0; g < g1; g++)
            for (int64_t m = 0; m < job->batch; m++) {
                float *out = job->sorted + m * job->sorted_stride + g * GROUP;
                V acc[8];
                for (int k = 0; k < 8; k++)
                    acc[k] = v_load(out + k * LANES);
                for (int64_t r = r0; r < r1; r++) {
                    const W words = LEVEL(words)(w, r, g);
                    const V scale = LEVEL(spread)(job, scratch + (r - r0) * job->scale_stride, g);
                    const V factor = v_mul(scale, v_set1(job->x[m * w->rows + r]));
#pragma GCC unroll 8
                    for (int k = 0; k < 8; k++)
                        acc[k] = v_fma(v_lookup(table, words, k), factor, acc[k]);
                }
                for (int k = 0; k < 8; k++)
                    v_store(out + k * LANES, acc[k]);
            }
    }
}

/* The rows of W in their own order. */
static void LEVEL(restore)(const struct job *job, int64_t thread, float *scratch)
{
    const struct weight *w = &job->weight;
    const T table = table_load(w->levels);
    const int64_t size = 2 * w->half;
    int64_t r, to;
    share(w->rows, 1, job->threads, thread, &r, &to);
    for (; r < to; r++) {
        const uint8_t *p = w->packed + r * w->row_bytes;
        float *out = job->out + r * w->columns;
        LEVEL(scales)(w, r, scratch);
        for (int64_t b = 0; b < w->blocks; b++) {
            const int64_t left = w->columns - b * size, half = left < size ? (left + 1) / 2 : w->half;
            const V scale = v_set1(scratch[b]);
            int64_t j = 0;
            if (left >= size && half == LANES / 2) { /* a block is one vector */
                v_store(out, v_mul(v_lookup(table, block_load(p), 0), scale));
                j = half;
            } else if (left >= size)
                for (; j + LANES <= half; j += LANES) {
                    const W words = bytes_load(p + j);
                    v_store(out + j, v_mul(v_lookup(table, words, 0), scale));
                    v_store(out + half + j, v_mul(v_lookup(table, words, 1), scale));
                }
            for (; j < half; j++) {
                out[j] = w->levels[p[j] & 15] * scratch[b];
                if (half + j < left) /* not the code that pads an odd row */
                    out[half + j] = w->levels[p[j] >> 4] * scratch[b];
            }
            p += half;
            out += size;
        }
    }
}

static inline __attribute__((always_inline)) V LEVEL(sixteen)(const uint16_t *p, const int bfloat)
{
    return bfloat ? v_bfloat(p) : v_half(p);
}

static inline float LEVEL(one_sixteen)(uint16_t bits, const int bfloat)
{
    if (!bfloat)
        return half_to_float(bits);
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* R rows of 16-bit floats with M inputs, widened in registers. */
static inline __attribute__((always_inline)) void LEVEL(half_few)(const struct job *job, int64_t r, const int R, int64_t m0,
                                                                  const int M, const int bfloat)
{
    const struct weight *w = &job->weight;
    const uint16_t *rows = (const uint16_t *)w->packed + r * w->columns;
    const float *x = job->x + m0 * w->columns;
    const int64_t whole = w->columns / LANES * LANES;
    V acc[4][4];
    for (int i = 0; i < R; i++)
        for (int m = 0; m < M; m++)
            acc[i][m] = v_zero();
    for (int64_t c = 0; c < whole; c += LANES)
        for (int i = 0; i < R; i++) {
            const V row = LEVEL(sixteen)(rows + i * w->columns + c, bfloat);
            for (int m = 0; m < M; m++)
                acc[i][m] = v_fma(row, v_load(x + m * w->columns + c), acc[i][m]);
        }
    for (int i = 0; i < R; i++)
        for (int m = 0; m < M; m++) {
            float sum = v_sum(acc[i][m]) + (job->bias ? job->bias[r + i] : 0.0f);
            for (int64_t c = whole; c < w->columns; c++)
                sum += LEVEL(one_sixteen)(rows[i * w->columns + c], bfloat) * x[m * w->columns + c];
            job->out[(m0 + m) * w->rows + r + i] = sum;
        }
}

/* Rows r to `to` with the whole batch, widened into a tile; `sorted` holds the inputs, padded with zeros. */
static inline __attribute__((always_inline)) void LEVEL(half_many)(const struct job *job, int64_t r, int64_t to, float *tile,
                                                                   const int bfloat)
{
    const struct weight *w = &job->weight;
    const int rows = (int)(to - r);
    for (int64_t column = 0; column < w->columns; column += TILE_COLUMNS) {
        const int64_t left = w->columns - column < TILE_COLUMNS ? w->columns - column : TILE_COLUMNS;
        const int64_t whole = left / LANES * LANES, floats = whole == left ? whole : whole + LANES;
        for (int i = 0; i < rows; i++) {
            const uint16_t *p = (const uint16_t *)w->packed + (r + i) * w->columns + column;
            float *out = tile + i * (TILE_GROUPS * GROUP);
            for (int64_t c = 0; c < whole; c += LANES)
                v_store(out + c, LEVEL(sixteen)(p + c, bfloat));
            for (int64_t c = whole; c < floats; c++)
                out[c] = c < left ? LEVEL(one_sixteen)(p[c], bfloat) : 0.0f;
        }
        LEVEL(multiply_tile)(job, tile, rows, floats, column, r);
    }
}

static inline __attribute__((always_inline)) void LEVEL(half)(const struct job *job, int64_t r, int64_t to, float *scratch,
                                                              const int bfloat)
{
    if (job->batch >= FEW_ROWS) {
        for (; r < to; r += TILE_ROWS)
            LEVEL(half_many)(job, r, r + TILE_ROWS < to ? r + TILE_ROWS : to, scratch, bfloat);
        return;
    }
    for (; r + 4 <= to; r += 4)
        for (int64_t m = 0; m < job->batch; m++)
            LEVEL(half_few)(job, r, 4, m, 1, bfloat);
    for (; r < to; r++)
        for (int64_t m = 0; m < job->batch; m++)
            LEVEL(half_few)(job, r, 1, m, 1, bfloat);
}

static void LEVEL(half_linear)(const struct job *job, int64_t thread, float *scratch)
{
    int64_t r, to;
    share(job->weight.rows, TILE_ROWS, job->threads, thread, &r, &to);
    if (job->weight.encoding == HALF_BFLOAT16)
        LEVEL(half)(job, r, to, scratch, 1);
    else
        LEVEL(half)(job, r, to, scratch, 0);
}
