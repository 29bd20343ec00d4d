/* How the scratch of a product is laid out, and how many batch rows are packed at a time. */
#pragma once
#include "plan.h"
#include "threads.h"

/* How many batch rows are packed at a time: the batch is divided into pieces of about one size, multiples of `whole`. A batch
 * row takes `packed` bytes of the packed input, at most most_bytes in all, and `own` bytes of the threads' scratch; `others`
 * bytes of scratch are taken anyway. */
static int64_t piece_of(int64_t batch, int64_t most_bytes, int64_t packed, int64_t own, int64_t others, int64_t whole)
{
    const int64_t least = whole > 1 ? LEAST_BYTES / 2 : LEAST_BYTES;
    const int64_t room = SCRATCH_BYTES - others < least ? least : SCRATCH_BYTES - others;
    const int64_t most = smaller(smaller(most_bytes / packed, room / (packed + own)), MOST);
    const int64_t fits = most > whole ? most / whole * whole : whole, pieces = (batch + fits - 1) / fits;
    return pieces ? round_up((batch + pieces - 1) / pieces, whole) : 0;
}

/* Columns of x that are packed at a time, at most `wide`: whole chunks. */
static int64_t packed_width(const struct weight *w, int64_t wide) { return smaller(round_up(w->stride, CHUNK), wide); }

/* Whether x is packed in parts of its columns whose sums have to be kept in float32 (run_in_parts): the output has 16 bits. */
static int needs_parts(const struct kernel *k, const struct job *job)
{
    return k->operation != INPUT_GRAD && job->out_type != FLOAT32 && job->weight->columns > wide_of(job->batch);
}

/* The layout of scratch; sizes are in floats. First `shared` for all threads: the copies of the packed input, packed_step apart
 * (0: there is one), or the sums of grad @ W. Then `own` for each of `threads`. `piece` is the batch rows that are packed at a
 * time. */
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
    const int64_t bytes = !gradient ? packed_width(w, wide_of(batch)) * k->number
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
