/* x @ W.T for a small batch. Columns lie across the lanes, and each row of W is read once for all batch rows. */
#pragma once
#include "pairs.h"
#include "update.h"
#include "weights8.h"

/* Pack batch row m as float32 in the order of the codes; its vectors are `step` vectors apart. Padding is not written. */
INLINE void place_input(const struct job *job, int64_t m, float *out, int64_t step, const int type)
{
    const struct weight *w = job->weight;
    const int64_t before = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP, from = m * w->columns;
    if (!w->order) { /* codes of 8 bits and 16-bit weights keep the order of the columns */
        const int64_t end = smaller(w->columns, before + floats);
        for (int64_t c = before; c < end; c += LANES, out += step * LANES)
            v_store(out, load_some(job->x, type, from + c, end - c));
        return;
    }
    int64_t c, end;
    columns_between(w, job->g0, job->g1, GROUP, &c, &end);
    for (; c < end; c++) {
        const int64_t s = w->order->place[c] - before;
        if (s >= 0 && s < floats)
            out[s / LANES * step * LANES + s % LANES] = read_as_float(job->x, type, from + c);
    }
}

/* out[j * LANES + i] = row r + i times batch row j, as partial sums in the lanes, each block's times its scale. */
INLINE void few(const struct job *job, int64_t r, const int R, const int M, V *out)
{
    const struct weight *w = job->weight;
    const float *x = job->packed;
    const T table = table_load(w->levels);
    struct reading at;
    V acc[FEW_SUMS], sum[FEW_SUMS];
    begin_reading(&at, w, r, job->g0, R);
    EACH_ROW EACH_INPUT acc[AT] = v_zero();
    for (int64_t g = job->g0; g < job->g1; g++, x += M * GROUP) {
        read_group(&at, w, r, g, R);
        EACH_ROW EACH_INPUT sum[AT] = v_zero();
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            V level[4];
            EACH_ROW level[i] = v_lookup(table, at.words[i], k);
            EACH_INPUT {
                V value = v_load(x + (k * M + j) * LANES);
                if (M > 2)
                    v_keep(value);
                EACH_ROW sum[AT] = v_fma(level[i], value, sum[AT]);
            }
        }
        EACH_ROW EACH_INPUT acc[AT] = v_fma(sum[AT], at.scale[i], acc[AT]);
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = acc[AT];
}

/* The same for 16-bit weights. */
INLINE void few_sixteen(const struct job *job, int64_t r, const int R, const int M, V *out, const int type)
{
    const struct weight *w = job->weight;
    const int64_t from = job->g0 * GROUP, columns = smaller(w->columns - from, (job->g1 - job->g0) * GROUP);
    const int64_t whole = columns / LANES * LANES, stride = w->columns;
    const uint16_t *rows = (const uint16_t *)w->packed + r * stride + from;
    const float *x = job->packed;
    V sums[FEW_SUMS], acc[FEW_SUMS];
    EACH_ROW EACH_INPUT sums[AT] = v_zero();
    for (int64_t c = 0; c < whole;) {
        EACH_ROW EACH_INPUT acc[AT] = v_zero();
        for (const int64_t end = smaller(c + FEW_CHAIN * LANES, whole); c < end; c += LANES, x += M * LANES) {
            V row[4];
            EACH_ROW row[i] = sixteen(rows + i * stride + c, type);
            /* once per cache line; rows come from memory faster than the hardware prefetcher predicts */
            if (c % 32 == 0)
                EACH_ROW prefetch(rows + (i + 8 * R) * stride + c);
            EACH_INPUT {
                const V value = v_load(x + j * LANES);
                EACH_ROW acc[AT] = v_fma(row[i], value, acc[AT]);
            }
        }
        EACH_ROW EACH_INPUT sums[AT] = v_add(sums[AT], acc[AT]);
    }
    if (whole < columns) { /* x is padded with zeros */
        V rest[4];
        EACH_ROW rest[i] = load_some(rows + i * stride, type, whole, columns - whole);
        EACH_INPUT EACH_ROW sums[AT] = v_fma(rest[i], v_load(x + j * LANES), sums[AT]);
    }
    EACH_ROW EACH_INPUT out[j * LANES + i] = sums[AT];
}

ROWS_WITH_FEW(rows_codes, FEW_ROWS, few)
ROWS_WITH_MORE(rows_bfloat, FEW_ROWS, few_sixteen, , BFLOAT16)
ROWS_WITH_MORE(rows_half, FEW_ROWS, few_sixteen, , FLOAT16)
ROWS_WITH_MORE(rows_weights8, FEW_ROWS, few_weights8)

/* Sum batch rows m0 to m1 over the blocks of the weight, for its offsets. */
INLINE void put_sums(const struct job *job, const int type)
{
    const struct weight *w = job->weight;
    const int64_t size = 2 * w->half;
    float *sums = block_sums(job);
    for (int64_t m = job->m0; m < job->m1; m++, sums += padded_blocks(w)) {
        memset(sums, 0, (size_t)padded_blocks(w) * sizeof(float));
        for (int64_t b = 0; b < w->blocks; b++) {
            const int64_t from = b * size, end = smaller(w->columns, from + size);
            V sum = v_zero();
            for (int64_t c = from; c < end; c += LANES)
                sum = v_add(sum, load_some(job->x, type, m * w->columns + c, end - c));
            sums[b] = sum_of(sum);
        }
    }
}

static void sum_blocks(const struct job *job)
{
    if (job->weight->offsets && !job->g0)
        OF_TYPE(job->type, put_sums, job);
}

/* Pack a small batch as float32: vector by vector, all batch rows side by side. */
static void put_few(struct job *job)
{
    const int64_t floats = (job->g1 - job->g0) * GROUP, batch = job->m1 - job->m0;
    if (floats != job->weight->columns)
        memset(job->packed, 0, (size_t)(batch * floats) * sizeof(float));
    for (int64_t m = 0; m < batch; m++)
        OF_TYPE(job->type, place_input, job, job->m0 + m, job->packed + m * LANES, batch);
    sum_blocks(job);
}

/* The first part packs x; the others compute the narrow product of a low-rank update. */
static void pack_few(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    if (part == 0)
        put_few(job);
    if (job->update && !job->g0 && (part || parts == 1))
        narrow_body(job, part - (parts > 1), parts - (parts > 1), thread);
}

/* Multiply the rows of a part, by the function for the number of packed batch rows, and add the low-rank update. */
INLINE void few_rows(struct job *job, int64_t part, int64_t parts, rows_with *const *rows)
{
    int64_t r, to;
    share(job->weight->rows, SHARE_ROWS, parts, part, &r, &to);
    /* An update is added with the last groups of columns, when the sums are complete. */
    const struct update *u = job->g1 * GROUP < job->weight->columns ? NULL : job->update;
    for (int64_t end; r < to; r = end) {
        end = u ? smaller(r + UPDATE_ROWS, to) : to;
        /* prefetch rows of B: loading them takes longer than multiplying these rows of W */
        for (int64_t i = r; u && i < end; i++)
            for (int64_t k = 0; k < u->rank; k += 16)
                prefetch(u->b + i * u->rank + k);
        rows[job->m1 - job->m0 - 1](job, r, end);
        if (u)
            add_wide(job, r, end);
    }
}

/* The kernels for a small batch: NAME_body is the function of kernel NAME in the table of an ISA. */
static void few_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { few_rows(job, part, parts, rows_codes); }
static void few_weights8_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { few_rows(job, part, parts, rows_weights8); }
static void few_sixteen_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    few_rows(job, part, parts, job->weight->encoding == BFLOAT16 ? rows_bfloat : rows_half);
}

/* out = levels[code] * scale for rows r to `to` of W and blocks g0 to g1, in the order of the columns. */
INLINE void dequantize_rows(const struct job *job, int64_t r, int64_t to, const int bits, const int type)
{
    const struct weight *w = job->weight;
    const int64_t size = 2 * w->half, bytes = bits == 4 ? w->half : size;
    float scales[TILE_SCALES];
    const T table = table_load(bits == 4 ? w->levels : memset(scales, 0, sizeof scales)); /* not used for 8 bits */
    for (; r < to; r++) {
        const uint8_t *p = w->packed + r * w->row_bytes + job->g0 * bytes;
        int64_t out = r * job->out_step;
        for (int64_t b = job->g0; b < job->g1; b++, p += bytes, out += size) {
            const int64_t at = (b - job->g0) % (TILE_COLUMNS / 8), left = w->columns - b * size;
            if (at == 0)
                row_scales(w, r, b, smaller(job->g1 - b, TILE_COLUMNS / 8), scales);
            if (bits == 4)
                dequantize_block(w, p, left, scales[at], table, job->out, out, type);
            else
                dequantize_block8(w, p, smaller(size, left), scales[at], job->out, out, type);
        }
    }
}

static void dequantize_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    int64_t r, to;
    share(job->weight->rows, 1, parts, part, &r, &to);
    if (job->weight->levels)
        OF_TYPE(job->out_type, dequantize_rows, job, r, to, 4);
    else
        OF_TYPE(job->out_type, dequantize_rows, job, r, to, 8);
}
