/* How the scratch of a product is laid out, and how many inputs are packed at a time. */
#ifndef LOWMEM_LAYOUT_H
#define LOWMEM_LAYOUT_H

#include "threads.h"

/* How many inputs of so many packed bytes, and so many of the threads' own, are packed at a time beside `others`, in `most_bytes`:
 * pieces of a batch that are about as large, and multiples of `whole`. */
static int64_t piece_of(int64_t batch, int64_t most_bytes, int64_t packed, int64_t own, int64_t others, int64_t whole)
{
    const int64_t least = whole > 1 ? LEAST_BYTES / 2 : LEAST_BYTES;
    const int64_t room = SCRATCH_BYTES - others < least ? least : SCRATCH_BYTES - others;
    const int64_t most = smaller(smaller(most_bytes / packed, room / (packed + own)), MOST);
    const int64_t fits = most > whole ? most / whole * whole : whole, pieces = (batch + fits - 1) / fits;
    return pieces ? round_up((batch + pieces - 1) / pieces, whole) : 0;
}

/* Whether inputs, more than a few, fill panels, or nearly: 16-bit weights gain more by them (panels.h), and bfloat16 gains only
 * where inputs are so few that transposing codes and scales counts. */
static int fill_panels(const struct weight *w, int64_t batch, int low)
{
    const int fill = 32 * round_up(batch, PANEL) <= (w->order ? 33 : 36) * batch;
    return fill && (!w->order || batch >= 2 * PANEL) && (!low || batch < 4 * PANEL);
}

/* Columns of an input that are packed, where there are more than a few: whole chunks. */
static int64_t packed_width(const struct weight *w, int64_t wide) { return smaller(round_up(w->stride, CHUNK), wide); }

/* Sizes in floats: what the threads share, then what each has of its own. */
struct layout {
    int64_t threads, piece, packed_step, shared, own;
    int few; /* whether inputs are so few that an update is added row by row, */
    int panels; /* or packed in panels */
};

#define MOST_COPIES 4 /* of a packed input: with more threads, packing it in all of them would take too long */

/* The layout for a product whose sums take `beside` bytes already. */
static struct layout layout_of(const struct weight *w, int64_t batch, long long threads, int transposed, int low, int int8,
                               int tiles, int64_t beside)
{
    const int few = !tiles && batch <= (int8 ? FEW_MORE : few_inputs(w, low));
    const int in_low = low && !transposed && (!few || w->order->whole_words) && !(batch == 1 && has_plain_codes(w, low));
    const int number = tiles ? 2 * tiles : in_low || (int8 && !few) ? 2 : 4; /* bytes of a packed one */
    const int64_t all = threads_for(threads, (double)w->rows * w->columns * batch);
    const int64_t part = smaller(round_up(w->rows, TILED_LINE), TILED_GRAD_PART); /* of the rows */
    const int64_t bytes = !transposed ? packed_width(w, tiles > 1 ? TILED_WIDE : wide_of(batch)) * number /* that an input takes */
                          : tiles     ? tiled_grad_columns(w, all) * 4 + (tiles > 1 ? part * number : 0)
                                      : smaller(all * grad_columns(w, batch, all), w->stride) * 4;
    const int64_t own = tiles ? (transposed ? TILED_GRAD_OWN(tiles) : TILED_OWN(tiles))
                        : transposed ? GRAD_ROWS * (2 * TILE_SCALES + MAX_GROUP) : few ? 0 : SUMS_AT;
    /* Whatever the threads are, or bits would depend on them: a panel is at least packed at a time. */
    const int fill = !tiles && !transposed && !few && fill_panels(w, batch, low) && PANEL * bytes <= LEAST_BYTES && !beside;
    const int panels = int8 ? !few : fill;
    const int64_t rows = int8 ? INT8_ROWS : panels ? PANEL_ROWS : MAX_VECTORS * MAX_LANES; /* whose sums a thread has */
    const int64_t own_of_input = transposed ? tiles ? 0 : GRAD_ROWS : few ? 0 : rows;
    const int64_t copies = transposed || tiles > 1 || all > MOST_COPIES ? 1 : all;
    const int64_t of_input = 4 * all * own_of_input, others = 4 * all * own + beside;
    int64_t most = PACKED_BYTES;
    if (tiles > 1) { /* terms take no more than vectors would */
        const struct layout vectors = layout_of(w, batch, threads, transposed, 0, 0, 0, beside);
        const int64_t room = 4 * (vectors.shared + vectors.threads * vectors.own - all * own);
        most = room / (bytes + of_input) * bytes;
    }
    const int64_t whole = tiles ? TILED_INPUTS : panels ? PANEL : 1;
    const int own_copies = copies > 1 && copies * bytes * round_up(batch, whole) <= most &&
                           piece_of(batch, most, copies * bytes, of_input, others, whole) >= batch;
    const int64_t piece = piece_of(batch, most, (own_copies ? copies : 1) * bytes, of_input, others, whole);
    const int64_t packed = piece * bytes / 4;
    const struct layout layout = {
        .threads = all,
        .piece = piece,
        .packed_step = own_copies ? packed : 0,
        .shared = own_copies ? copies * packed : packed,
        .own = own + own_of_input * piece,
        .few = few,
        .panels = panels,
    };
    return layout;
}

#endif
