/* How a product is taken: in what arithmetic, with what scratch, and in which parts. */
#ifndef LOWMEM_PRODUCT_H
#define LOWMEM_PRODUCT_H

#include "layout.h"
#include "weights.h"

/* Whether vectors take products with an input of a type in bfloat16, or with two digits for it. */
static int is_low(const struct level *level, const struct weight *w, int64_t batch, int type, int transposed)
{
    if (type != BFLOAT16 || !w->order || level->low == NONE_LOW)
        return 0;
    return level->low == ALL_LOW || (batch == 1 && !transposed && has_plain_codes(w, 1));
}

/* Whether levels are zeros or large enough that none of their terms is lost. */
static int levels_have_terms(const struct weight *w)
{
    for (int c = 0; w->order && c < 16; c++)
        if (w->levels[c] != 0.0f && !(fabsf(w->levels[c]) >= 0x1p-10f && fabsf(w->levels[c]) <= 0x1p10f))
            return 0;
    return 1;
}

/* Whether products with more than a few inputs are taken by AMX, and of how many terms an input is the sum, then. */
static int in_tiles(const struct level *level, const struct weight *w, int64_t batch, int type, int transposed)
{
    const int is_bfloat = !w->order && w->encoding == BFLOAT16;
    if (!level->tiles || type == FLOAT16 || (type == BFLOAT16 && !w->order && !is_bfloat))
        return 0;
    if (type == FLOAT32) {
        const int64_t few = transposed ? TILED_FEW_TERMS_GRAD : is_bfloat ? TILED_FEW_SIXTEEN : TILED_FEW_TERMS;
        return batch > few && levels_have_terms(w) ? TERMS : 0;
    }
    return batch > (is_bfloat ? TILED_FEW_SIXTEEN : TILED_FEW);
}

/* Take a product that is known but for how, with scratch for it; beside it, so many bytes are taken already. 1: it is done.
 * 0: it is refused. -1, with an error: there is no scratch. */
static int take_product(const struct level *level, struct job *job, struct update *update, int transposed, int int8,
                        long long threads, PyObject *like, int64_t beside)
{
    const struct weight *w = job->weight;
    const int64_t narrow = update ? job->batch * update->rank : 0;
    int refused;
    job->tiles = int8 ? 0 : in_tiles(level, w, job->batch, job->type, transposed);
    job->refused = &refused;
    for (;; job->tiles = 0) { /* where terms are refused */
        refused = 0;
        job->low = !int8 && (job->tiles == 1 || is_low(level, w, job->batch, job->type, transposed));
        const struct layout layout = layout_of(w, job->batch, threads, transposed, job->low, int8, job->tiles, beside);
        const int64_t floats = layout.shared + layout.threads * layout.own;
        const int64_t narrow_at = layout.few ? floats : 0; /* of more inputs it is made when all rows are done */
        struct scratch scratch;
        if (take_scratch(like, job->type == FLOAT32 ? 4 : 2, 4 * (narrow_at + narrow > floats ? narrow_at + narrow : floats), &scratch))
            return -1;
        if (update)
            update->narrow = scratch.memory + narrow_at;
        job->update = update;
        job->panels = layout.panels;
        job->threads = layout.threads;
        job->packed = scratch.memory;
        job->packed_step = layout.packed_step;
        job->own = scratch.memory + layout.shared;
        job->own_floats = layout.own;
        job->piece = layout.piece;
        Py_BEGIN_ALLOW_THREADS
        (transposed ? level->input_grad : int8 ? level->linear_int8 : level->linear)(job);
        Py_END_ALLOW_THREADS
        free_scratch(&scratch);
        if (!refused || int8)
            return !refused;
    }
}

/* The same of inputs whose columns come in parts, for an output of 16 bits: these are added up in float32, for some inputs and
 * rows of the weight at a time, and rounded once. */
static int take_in_parts(const struct level *level, const struct job *job, int int8, long long threads, PyObject *like)
{
    const struct weight *w = job->weight;
    const int64_t pieces = (job->batch + SUMMED - 1) / SUMMED, step = (job->batch + pieces - 1) / pieces;
    const int64_t left = SCRATCH_BYTES - LEAST_BYTES - 4 * SUMS_AT * threads; /* beside what threads have, and an input */
    const int64_t most = smaller(job->batch <= FEW_MORE ? SUMS_BYTES_OF_FEW : SUMS_BYTES, left > LEAST_SUMS ? left : LEAST_SUMS);
    const int64_t fit = most / 4 / step / SUMMED_ROWS * SUMMED_ROWS, parts = (w->rows + fit - 1) / fit;
    const int64_t rows = round_up((w->rows + parts - 1) / parts, SUMMED_ROWS), bytes = 4 * step * rows;
    const int64_t bias_size = job->bias_type == FLOAT32 ? 4 : 2;
    struct scratch sums;
    if (take_scratch(like, 2, bytes, &sums))
        return -1;
    int done = 1;
    for (int64_t m = 0; m < job->batch && done == 1; m += step)
        for (int64_t r = 0; r < w->rows && done == 1; r += rows) {
            const struct weight some = rows_of(w, r, smaller(rows, w->rows - r));
            struct job part = *job;
            part.weight = &some;
            part.x = (const uint16_t *)job->x + m * w->columns;
            part.bias = job->bias ? (const char *)job->bias + r * bias_size : NULL;
            part.out = (uint16_t *)job->out + m * w->rows + r;
            part.partial = sums.memory;
            part.batch = smaller(step, job->batch - m);
            done = take_product(level, &part, NULL, 0, int8, threads, like, bytes);
        }
    free_scratch(&sums);
    return done;
}

#endif
