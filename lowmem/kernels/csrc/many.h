/* x @ W.T with more than a few inputs. Rows lie across the lanes: LANES of them are decoded at a time, and each number
 * of an input is multiplied with all of them at once, so that no sum is taken across lanes, and results lie as the
 * output has them.
 *
 * What is multiplied is a unit: a column in float32, a pair of columns as bfloat16 where products are taken in it. The
 * input comes as pack.h packs it. */

#define UNITS(bf16) ((bf16) ? 4 : 8) /* of a word */
#define MANY_ROWS (LANES * MANY_VECTORS) /* of a tile */
_Static_assert(MANY_VECTORS <= MAX_VECTORS && MANY_INPUTS <= 16, "scratch and passes have room for them");
#define EACH_LANE _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
#define EACH_OF_MANY _Pragma("GCC unroll 16") for (int j = 0; j < M; j++)
#define EACH_ROWS for (int v = 0; v < MANY_VECTORS; v++)

/* A number, or a pair of numbers, in every lane. */
INLINE V spread_unit(const float *p, const int bf16)
{
#if ISA_BFLOAT16
    if (bf16)
        return (V)pair_of(p);
#endif
    (void)bf16;
    return v_set1(*p);
}

/* sum + a * b. */
INLINE V multiply_add(V a, V b, V sum, const int bf16)
{
#if ISA_BFLOAT16
    if (bf16)
        return (V)_mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)bf16;
    return v_fma(a, b, sum);
}

/* Words of one group of LANES rows: row by row they are read, word by word they are written, `step` floats apart. */
INLINE void words_across(const struct weight *w, int64_t r, int64_t group, const int step, float *out)
{
    const int64_t start = group * LANES * 4, left = w->row_bytes - start, last = w->rows - 1;
    const uint8_t *p = w->packed + start;
    V v[LANES];
    if (r + LANES <= w->rows && left >= LANES * 4) {
        p += r * w->row_bytes;
        EACH_LANE v[i] = v_of_words(words_load(p + i * w->row_bytes, LANES * 4));
    } else {
        EACH_LANE v[i] = v_of_words(words_load(p + smaller(r + i, last) * w->row_bytes, left));
    }
    v_transpose(v);
    EACH_LANE v_store(out + i * step, v[i]);
}

/* The scales of n blocks of LANES rows: block by block, `step` floats apart, row by row. Blocks beyond the row have zeros. */
INLINE void scales_across(const struct weight *w, int64_t r, int64_t first, int64_t n, const int step, float *out)
{
    const int64_t stride = scale_bytes(w), last = w->rows - 1;
    const int many = w->encoding >= SCALES_DOUBLE; /* steps of a float16 */
    V unit = v_zero();
    if (many) {
        float units[LANES];
        for (int64_t i = 0; i < LANES; i++)
            units[i] = row_scale(w, smaller(r + i, last));
        unit = v_load(units);
    }
    for (int64_t b = 0; b < n; b += LANES, out += LANES * step) {
        V v[LANES];
        const int64_t there = smaller(n, w->blocks - first) - b, next = step * stride + (first + b) * stride / w->blocks;
        for (int64_t i = 0; i < LANES; i++) {
            const uint8_t *p = w->scales + smaller(r + i, last) * stride;
            v[i] = v_scales(p, first + b, there, w->encoding);
            prefetch(p + next);
        }
        v_transpose(v);
        for (int64_t i = 0; i < smaller(n - b, LANES); i++) { /* rounded as the scales of a row are */
            if (many)
                v[i] = v_div(v_mul(v[i], unit), v_set1(row_steps(w)));
            v_store(out + i * step, v[i]);
        }
    }
}

/* Unit k of each word: a level, or two levels as bfloat16. */
INLINE V unit_levels(T table, W words, const int k, const int bf16)
{
#if ISA_BFLOAT16
    if (bf16)
        return (V)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * k), (W)table);
#endif
    (void)bf16;
    return v_lookup(table, words, k);
}

/* The bias of rows r and on, of which `rows` are there, as float32: where it lies, or in `widened`, which is zeros. */
INLINE const float *bias_of(const struct job *job, int64_t r, int64_t rows, float *widened)
{
    if (!job->bias || job->g0)
        return widened;
    if (job->bias_type == FLOAT32)
        return (const float *)job->bias + r;
    widen_run_typed((const uint16_t *)job->bias + r, rows, widened, job->bias_type);
    return widened;
}

/* Sums of `vectors` times LANES rows, of which `rows` are there, and what the parts of the columns before have made of them, or
 * the bias, to the output, or to what is added up there. */
INLINE void put_rows_as(const struct job *job, int64_t r, int64_t rows, const int vectors, const float *sums, void *out,
                               int64_t step, const int type)
{
    float widened[MAX_VECTORS * LANES] = {0};
    const float *bias = bias_of(job, r, rows, widened);
    const float *before = job->g0 ? job->partial + job->m0 * job->weight->rows + r : bias;
    const int64_t further = job->g0 ? job->weight->rows : 0, whole = rows / LANES * LANES, end = job->m1 * step + r;
    for (int64_t at = job->m0 * step + r; at < end; at += step, before += further, sums += vectors * LANES) {
        for (int64_t i = 0; i < whole; i += LANES)
            store_as(out, type, at + i, v_add(v_load(sums + i), v_load(before + i)));
        for (int64_t i = whole; i < rows; i++)
            write_as(out, type, at + i, sums[i] + before[i]);
    }
}

static void put_rows(const struct job *job, int64_t r, int64_t rows, const int vectors, const float *sums)
{
    if (job->g1 * GROUP < job->weight->columns)
        put_rows_as(job, r, rows, vectors, sums, job->partial, job->weight->rows, FLOAT32);
    else if (job->out_type == FLOAT32)
        put_rows_as(job, r, rows, vectors, sums, job->out, job->out_step, FLOAT32);
    else if (job->out_type == BFLOAT16)
        put_rows_as(job, r, rows, vectors, sums, job->out, job->out_step, BFLOAT16);
    else
        put_rows_as(job, r, rows, vectors, sums, job->out, job->out_step, FLOAT16);
}

/* The input at a column, counted from the first that is packed: the first of a piece. */
INLINE const float *packed_at(const struct job *job, int64_t c, const int bf16)
{
    const int64_t batch = job->m1 - job->m0;
    return job->packed + c / PART(bf16) * PART_FLOATS * batch + c % PART(bf16) / (bf16 ? 2 : 1);
}

/* The codes, or 16-bit floats, so many columns behind column c of a row; after the last one that is packed come the next
 * `rows`. */
INLINE const uint8_t *codes_behind(const struct job *job, int64_t r, int64_t c, int64_t columns, int64_t rows)
{
    const int64_t begin = job->g0 * GROUP, width = job->g1 * GROUP - begin, behind = c - begin + columns;
    r += behind / width * rows;
    c = begin + behind % width;
    return job->weight->packed + r * row_stride(job->weight) + (job->weight->order ? c / 2 : c * 2);
}

/* The scales of `vectors` times LANES rows, from a column on that a chunk starts at; where that of the first block is
 * counted from. */
INLINE int64_t chunk_scales(const struct job *job, int64_t r, int64_t start, const int vectors, float *scales)
{
    const struct weight *w = job->weight;
    const int64_t first = start / 2 / w->half, end = smaller(start + chunk_of(w), job->g1 * GROUP) / 2 - 1;
    for (int v = 0; v < vectors; v++)
        scales_across(w, r + v * LANES, first, end / w->half - first + 1, vectors * LANES, scales + v * LANES);
    return first;
}

#include "fused.h"
#include "tiled.h"

/* Rows of a part with all inputs of a piece, in registers. */
INLINE void fused_part(const struct job *job, int64_t part, int64_t parts, int64_t thread, const int bf16)
{
    float *own = job->own + thread * job->own_floats, *sums = own + SUMS_AT;
    const int64_t batch = job->m1 - job->m0;
    int64_t r, to;
    share(job->weight->rows, MANY_ROWS, parts, part, &r, &to);
    for (; r < to; r += LANES) {
        memset(sums, 0, (size_t)(batch * LANES) * sizeof(float));
        fused_rows(job, r, own, sums, bf16);
        put_rows(job, r, smaller(LANES, to - r), 1, sums);
    }
}

/* The same from tiles. */
INLINE void tiled_part(const struct job *job, int64_t part, int64_t parts, int64_t thread, const int bf16, const int fewer)
{
    int64_t r, to;
    share(job->weight->rows, MANY_ROWS, parts, part, &r, &to);
    if (r < to)
        tiled_rows(job, r, to, job->own + thread * job->own_floats, bf16, fewer);
}

static void fused_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { fused_part(job, part, parts, thread, 0); }
static void tiled_body(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    if (job->batch <= FEWER)
        tiled_part(job, part, parts, thread, 0, 1);
    else
        tiled_part(job, part, parts, thread, 0, 0);
}

#if ISA_BFLOAT16
static void fused_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { fused_part(job, part, parts, thread, 1); }
static void tiled_bf16_body(struct job *job, int64_t part, int64_t parts, int64_t thread) { tiled_part(job, part, parts, thread, 1, 0); }
#endif
