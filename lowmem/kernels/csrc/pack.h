/* Packs rows of x for many.h, in the order of the words of a row of codes, or, with 16-bit weights, of the columns:
 *
 *   column of byte b, low nibble: 8 * word + b        high nibble: 8 * word + 4 + b
 *
 * A part of PART columns of one batch row is contiguous, as float32 or bfloat16, and the parts are (parts, batch, PART). */
#pragma once
#include "many.h"

/* n columns of batch row m from column c on, as float32: in place, or widened into scratch. */
INLINE const float *floats_of(const struct job *job, int64_t m, int64_t c, int64_t n, float *scratch, const int type)
{
    const int64_t from = m * job->weight->columns + c;
    if (type == FLOAT32)
        return (const float *)job->x + from;
    widen_run((const uint16_t *)job->x + from, n, scratch, type);
    return scratch;
}

/* Pack a part that is whole blocks: four columns of a block's first half, four of its second half, and so on. */
INLINE void interleave(const char *x, char *out, const int half, const int bytes)
{
    for (int block = 0; block < 2 * PART_FLOATS / bytes; block += half, x += 2 * half * bytes)
#pragma GCC unroll 8
        for (int j = 0; j < half; j += 4, out += 8 * bytes) {
            memcpy(out, x + j * bytes, (size_t)(4 * bytes));
            memcpy(out + 4 * bytes, x + (half + j) * bytes, (size_t)(4 * bytes));
        }
}

/* Pack batch row m in the order of the words: as float32, or unchanged for bfloat16. `scratch` holds a part as float32. */
INLINE void pack_input(const struct job *job, int64_t m, float *scratch, const int bf16, const int type)
{
    const struct weight *w = job->weight;
    const int64_t batch = job->m1 - job->m0, begin = job->g0 * GROUP, floats = (job->g1 - job->g0) * GROUP, bytes = bf16 ? 2 : 4;
    const int64_t size = PART(bf16), last = (floats - 1) / size * size;
#define PLACE(s) ((char *)job->packed + bytes * ((s) / size * size * batch + (m - job->m0) * size + (s) % size))
    if (floats != w->columns)
        memset(PLACE(last), 0, (size_t)((floats - last) * bytes));
    if (!w->order) {
        for (int64_t s = 0, n; s < floats && begin + s < w->columns; s += size) {
            n = smaller(smaller(size, floats - s), w->columns - begin - s);
            memcpy(PLACE(s), floats_of(job, m, begin + s, n, scratch, type), (size_t)n * sizeof(float));
        }
        return;
    }
    const int64_t end = smaller((begin + floats) / 2, w->row_bytes), half = w->half;
    int64_t block = begin / 2 / half;
    if (size / 2 % half == 0) /* a part is whole blocks */
        for (; (block + 1) * half <= end && block * half * 2 + size <= w->columns; block += size / 2 / half) {
            const int64_t start = block * 2 * half;
            const char *x = bf16 ? (const char *)((const uint16_t *)job->x + m * w->columns + start)
                                : (const char *)floats_of(job, m, start, size, scratch, type);
            char *place = PLACE(start - begin);
            /* in each case the size is a constant */
            switch (half) {
            case 8: interleave(x, place, 8, (int)bytes); break;
            case 16: interleave(x, place, 16, (int)bytes); break;
            case 32: interleave(x, place, 32, (int)bytes); break;
            default: interleave(x, place, (int)half, (int)bytes);
            }
        }
    for (; block * half < end; block++) {
        const int64_t start = block * 2 * half, columns = smaller(w->columns - start, 2 * half), lower = (columns + 1) / 2;
        const char *lows = bf16 ? (const char *)((const uint16_t *)job->x + m * w->columns + start)
                               : (const char *)floats_of(job, m, start, columns, scratch, type);
        const char *highs = lows + lower * bytes;
        int64_t j = block * half < begin / 2 ? begin / 2 - block * half : 0;
        const int64_t to = smaller(lower, end - block * half);
        for (; j + 4 <= smaller(to, columns - lower); j += 4) {
            char *place = PLACE(2 * (block * half + j) - begin);
            memcpy(place, lows + j * bytes, (size_t)(4 * bytes));
            memcpy(place + 4 * bytes, highs + j * bytes, (size_t)(4 * bytes));
        }
        for (; j < to; j++) {
            const int64_t byte = block * half + j;
            char *place = PLACE(byte / 4 * 8 - begin) + byte % 4 * bytes;
            memcpy(place, lows + j * bytes, (size_t)bytes);
            if (lower + j < columns)
                memcpy(place + 4 * bytes, highs + j * bytes, (size_t)bytes);
        }
    }
#undef PLACE
}

/* Pack the batch rows of a piece. */
INLINE void pack_rows(const struct job *job, int64_t part, int64_t parts, int64_t thread, const int bf16)
{
    float *scratch = job->own + thread * job->own_floats;
    int64_t m, to;
    share(job->m1 - job->m0, 1, parts, part, &m, &to);
    for (m += job->m0, to += job->m0; m < to; m++)
        if (bf16)
            pack_input(job, m, scratch, 1, BFLOAT16);
        else
            OF_TYPE(job->type, pack_input, job, m, scratch, 0);
}
static void pack_many(struct job *job, int64_t part, int64_t parts, int64_t thread) { pack_rows(job, part, parts, thread, 0); }
static void pack_many_bf16(struct job *job, int64_t part, int64_t parts, int64_t thread) { pack_rows(job, part, parts, thread, 1); }
