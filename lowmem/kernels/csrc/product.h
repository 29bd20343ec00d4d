/* The driver of products: lays out the scratch of the kernel that the plan selected, and runs it piece by piece. */
#pragma once
#include "row_calls.h"
#include "threads.h"
#include "weights.h"

/* How many batch rows are packed at a time: multiples of `whole`. A batch row takes `packed` bytes of the packed input, at most
 * most_bytes in all, and `own` bytes of the threads' scratch; `others` bytes of scratch are taken anyway. */
static int64_t piece_of(int64_t batch, int64_t most_bytes, int64_t packed, int64_t own, int64_t others, int64_t whole)
{
    const int64_t least = whole > 1 ? LEAST_BYTES / 2 : LEAST_BYTES;
    const int64_t room = SCRATCH_BYTES - others < least ? least : SCRATCH_BYTES - others;
    const int64_t most = smaller(smaller(most_bytes / packed, room / (packed + own)), MOST);
    const int64_t fits = most > whole ? most / whole * whole : whole, pieces = (batch + fits - 1) / fits;
    return pieces ? round_up((batch + pieces - 1) / pieces, whole) : 0;
}

/* Whether x is packed in parts of its columns whose sums have to be kept in float32 (run_in_parts): the output has 16 bits. */
static int needs_parts(const struct kernel *k, const struct job *job)
{
    return k->operation != INPUT_GRAD && job->out_type != FLOAT32 && job->weight->columns > wide_of(job->batch);
}

/* The layout of scratch, in floats. First `shared` for all threads: copies of the packed input, packed_step apart (0: one), or
 * the sums of grad @ W. Then `own` for each of `threads`. `piece` batch rows are packed at a time. */
struct layout {
    int64_t threads, piece, packed_step, shared, own;
};

/* Most copies of the packed input. With more threads, packing it in each of them would take too long. */
#define MOST_COPIES 4

/* The layout for a product, beside scratch of `beside` bytes that is taken already. */
static struct layout layout_of(const struct kernel *k, const struct weight *w, int64_t batch, long long threads, int64_t beside)
{
    const int gradient = k->operation == INPUT_GRAD;
    const int64_t all = threads_for(threads, (double)w->rows * w->columns * batch);
    /* Bytes of a packed batch row, or, in grad @ W, of the sums of a batch row. */
    const int64_t bytes = !gradient ? smaller(round_up(w->stride, CHUNK), wide_of(batch)) * k->number + w->offsets * 4 * padded_blocks(w)
                          : k->amx  ? tiled_grad_columns(w, all) * 4
                                    : smaller(all * grad_columns(w, all), w->stride) * 4;
    const int64_t copies = gradient || all > MOST_COPIES ? 1 : all;
    const int64_t of_input = 4 * all * k->own_of_input, others = 4 * all * k->own + beside;
    const int own_copies = copies > 1 && copies * bytes * round_up(batch, k->whole) <= PACKED_BYTES &&
                           piece_of(batch, PACKED_BYTES, copies * bytes, of_input, others, k->whole) >= batch;
    const int64_t piece = piece_of(batch, PACKED_BYTES, (own_copies ? copies : 1) * bytes, of_input, others, k->whole);
    const int64_t packed = piece * bytes / 4;
    return (struct layout){
        .threads = all,
        .piece = piece,
        .packed_step = own_copies ? packed : 0,
        .shared = own_copies ? copies * packed : packed,
        .own = k->own + k->own_of_input * piece,
    };
}

/* Run the kernel for the current piece and groups. One thread packs a small batch; others multiply by A meanwhile. */
static void run_piece(struct job *job)
{
    const struct kernel *k = job->kernel;
    if (k->operation == INPUT_GRAD)
        parallel(job, k->multiply, 1, NULL, 0);
    else if (k->few)
        parallel(job, k->pack, !job->update ? 0 : job->packed_step ? 1 : 2, k->multiply, job->batch > FEW ? PARTS : 1);
    else
        parallel(job, k->pack, job->packed_step || job->m1 - job->m0 <= PACKED_ALONE ? 0 : PARTS, k->multiply, PARTS);
}

/* The two products of a low-rank update, each in parts. */
static void run_update(const struct isa *isa, struct job *job) { parallel(job, base_of(isa)->narrow, 1, base_of(isa)->widen, 1); }

/* Run a kernel, beside `beside` bytes of scratch. Returns 1, 0 if it refuses what it reads, -1 with a Python error. */
static int run_kernel(const struct isa *isa, const struct kernel *k, struct job *job, struct update *update, long long threads,
                      int64_t beside)
{
    const struct weight *w = job->weight;
    const struct layout layout = layout_of(k, w, job->batch, threads, beside);
    const int64_t floats = layout.shared + layout.threads * layout.own, narrow = update ? job->batch * update->rank : 0;
    /* larger batches compute the narrow product at the end, and reuse the memory of packed x for it */
    const int64_t narrow_at = k->few ? floats : 0;
    const int64_t group = isa->lanes * 8, groups = w->stride / group;
    struct scratch scratch;
    int refused = 0;
    if (take_scratch(4 * (narrow_at + narrow > floats ? narrow_at + narrow : floats), &scratch))
        return -1;
    if (update)
        update->narrow = scratch.memory + narrow_at;
    job->kernel = k;
    job->refused = &refused;
    job->update = update;
    job->threads = layout.threads;
    job->packed = scratch.memory;
    job->packed_step = layout.packed_step;
    job->own = scratch.memory + layout.shared;
    job->own_floats = layout.own;
    job->piece = layout.piece;
    Py_BEGIN_ALLOW_THREADS
    in_pieces(job, groups, k->operation != INPUT_GRAD ? wide_of(job->batch) / group : k->amx ? tiled_grad_columns(w, job->threads) / group : groups,
              run_piece);
    if (update && !k->few && !refused) {
        job->packed_step = 0; /* the threads share the parts of an update */
        run_update(isa, job);
    }
    Py_END_ALLOW_THREADS
    free_scratch(&scratch);
    return !refused;
}

/* The same if x has to be packed in parts of its columns and the output has 16 bits: sums are kept in float32, for some batch
 * rows and rows of the weight at a time, so that each result is rounded once. */
static int run_in_parts(const struct isa *isa, const struct kernel *k, const struct job *job, long long threads)
{
    const struct weight *w = job->weight;
    const int64_t pieces = (job->batch + SUMMED - 1) / SUMMED, step = (job->batch + pieces - 1) / pieces;
    /* what the scratch of the threads and the packed input leave */
    const int64_t left = SCRATCH_BYTES - LEAST_BYTES - 4 * SUMS_AT * threads;
    const int64_t most = smaller(job->batch <= FEW_MORE ? SUMS_BYTES_OF_FEW : SUMS_BYTES, left > LEAST_SUMS ? left : LEAST_SUMS);
    const int64_t fit = most / 4 / step / SUMMED_ROWS * SUMMED_ROWS, parts = (w->rows + fit - 1) / fit;
    const int64_t rows = round_up((w->rows + parts - 1) / parts, SUMMED_ROWS), bytes = 4 * step * rows;
    const int64_t bias_size = job->bias_type == FLOAT32 ? 4 : 2;
    struct scratch sums;
    if (take_scratch(bytes, &sums))
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
            done = run_kernel(isa, plan(isa, w->kind, part.batch, part.type, k->operation), &part, NULL, threads, bytes);
        }
    free_scratch(&sums);
    return done;
}

/* Run a product in one go or in parts. Returns as run_kernel. */
static int run_product(const struct isa *isa, const struct kernel *k, struct job *job, struct update *update, long long threads)
{
    return needs_parts(k, job) ? run_in_parts(isa, k, job, threads) : run_kernel(isa, k, job, update, threads, 0);
}

/* Products of one input with several weights as a part of each: `call` has the jobs. */
struct together {
    int64_t count;
    struct job *jobs;
    int64_t packed_at[MOST_TOGETHER]; /* floats from the start of a copy of packed x to that of a job */
};

/* Job i of several, where and for what `job` runs now. */
static struct job job_of(const struct job *job, const struct together *all, int64_t i)
{
    struct job one = all->jobs[i];
    one.packed = job->packed + all->packed_at[i];
    one.own = job->own;
    one.own_floats = job->own_floats;
    one.m0 = job->m0;
    one.m1 = job->m1;
    one.g0 = job->g0;
    one.g1 = job->g1;
    return one;
}

static void pack_each(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct together *all = job->call;
    for (int64_t i = 0; i < all->count; i++) {
        struct job one = job_of(job, all, i);
        if (!i || all->packed_at[i] != all->packed_at[i - 1])
            one.kernel->pack(&one, part, parts, thread);
    }
}

static void multiply_each(struct job *job, int64_t part, int64_t parts, int64_t thread)
{
    const struct together *all = job->call;
    for (int64_t i = 0; i < all->count; i++) {
        struct job one = job_of(job, all, i);
        one.kernel->multiply(&one, part, parts, thread);
    }
}

/* Whether two jobs with one input can share what is packed of it. */
static int packs_alike(const struct job *a, const struct job *b)
{
    const struct weight *v = a->weight, *w = b->weight;
    return a->kernel == b->kernel && v->order == w->order && !v->offsets && !w->offsets && v->inputs8_zero == w->inputs8_zero &&
           (a->kernel->operation == LINEAR || (v->half == w->half && v->inputs8_step == w->inputs8_step));
}

/* Whether products of one input run in one region of threads: all rows of a small batch are packed at once; of a larger one, what is
 * packed is the same for all. */
static int can_run_together(const struct job *jobs, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        const struct job *one = jobs + i;
        const struct kernel *k = one->kernel;
        const struct weight *w = one->weight;
        if (k->few ? w->columns > wide_of(one->batch) || layout_of(k, w, one->batch, 1, 0).piece < one->batch
                   : needs_parts(k, one) || !packs_alike(jobs, one))
            return 0;
        if (k->few != jobs->kernel->few)
            return 0;
    }
    return 1;
}

static void run_pieces_together(struct job *job)
{
    const int few = job->kernel->few;
    parallel(job, pack_each, few || job->packed_step || job->m1 - job->m0 <= PACKED_ALONE ? 0 : PARTS, multiply_each,
             !few || job->batch > FEW ? PARTS : 1);
}

/* Run products of one input in one region of threads. Returns as run_kernel. */
static int run_together(const struct isa *isa, struct job *jobs, int64_t count, long long threads)
{
    struct together all = {count, jobs, {0}};
    const struct weight *first = jobs->weight;
    struct weight rows = *first; /* of all of them */
    const int few = jobs->kernel->few;
    int64_t floats = 0, last = 0;
    int refused = 0;
    rows.rows = 0;
    for (int64_t i = 0; i < count; i++) {
        struct job *one = jobs + i;
        one->refused = &refused;
        rows.rows += one->weight->rows;
        if (!few)
            continue;
        all.packed_at[i] = i && packs_alike(one - 1, one) ? last : floats;
        last = all.packed_at[i];
        if (last == floats)
            floats += round_up(layout_of(one->kernel, one->weight, one->batch, 1, 0).shared, MAX_LANES);
    }
    struct layout layout = layout_of(jobs->kernel, &rows, jobs->batch, threads, 0);
    if (few) {
        const int own = layout.threads > 1 && layout.threads <= MOST_COPIES && 4 * layout.threads * floats <= PACKED_BYTES;
        layout = (struct layout){layout.threads, jobs->batch, own ? floats : 0, floats * (own ? layout.threads : 1), 0};
    }
    struct scratch scratch;
    if (take_scratch(4 * (layout.shared + layout.threads * layout.own), &scratch))
        return -1;
    struct job job = {
        .call = &all, .kernel = jobs->kernel, .weight = first, .refused = &refused, .batch = jobs->batch, .threads = layout.threads,
        .packed = scratch.memory, .packed_step = layout.packed_step, .own = scratch.memory + layout.shared, .own_floats = layout.own,
        .piece = layout.piece,
    };
    const int64_t group = isa->lanes * 8;
    Py_BEGIN_ALLOW_THREADS
    in_pieces(&job, first->stride / group, wide_of(job.batch) / group, run_pieces_together);
    Py_END_ALLOW_THREADS
    free_scratch(&scratch);
    return !refused;
}
