/* What the kernels and their Python binding share. */
#ifndef LOWMEM_KERNEL_H
#define LOWMEM_KERNEL_H

/* Whether the compiler knows AMX, and the system lets us ask for it. */
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define HAS_NEON 1
#else
#define HAS_NEON 0
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Sizes of scratch, the same for every ISA, so that memory is the same on every processor. */
#define MAX_LANES 16
#define MAX_GROUP (MAX_LANES * 8)
#define FEW 4                     /* inputs that are few */
#define FEW_MORE 8                /* in bfloat16, in 8-bit integers, and with 16-bit weights */
#define SHARE_ROWS 8              /* of a thread, at least */
#define UPDATE_ROWS 16            /* rows after which an update is added */
#define UPDATED 128               /* inputs that an update is added for; for more, torch's own products are as fast */
#define PARTS 4                   /* of a thread, where work is long: a thread that is held up leaves them to others */
#define CHUNK 256                 /* columns whose scales are read at a time, at least */
#define CHUNK_SCALES (CHUNK / 8 + MAX_LANES) /* the scales of a row there, and as much as may be read behind */
#define PART(bf16) ((bf16) ? 256 : 128) /* columns of a tile, which stays in the first cache, as bfloat16 or float32: */
#define PART_FLOATS 128           /* as large as so many floats, for each row */
#define MAX_VECTORS 2             /* of rows, in a tile */
#define TILES_AT (MAX_VECTORS * MAX_LANES * CHUNK_SCALES)              /* two of them, behind the scales of a chunk; */
#define SUMS_AT (TILES_AT + MAX_VECTORS * MAX_LANES * 2 * PART_FLOATS) /* behind those */
#define PANEL MAX_LANES           /* inputs, and */
#define INT8_ROWS 32              /* rows that are multiplied with them, in int8.h */
#define INT8_ZERO 128             /* the step of a level that is zero there */
#define WIDE 8192                 /* columns of the input that are packed at a time, at most; */
#define WIDE_OF_FEW 49152         /* of FEW inputs at most, whose rows of the weight are read as they lie: those of all inputs */
#define SUMMED 128                /* inputs at a time, where columns come in parts and results are rounded, at most; */
#define SUMMED_ROWS 32            /* rows are multiples of this then, */
#define SUMS_BYTES (256 * 1024)   /* all sums take this at most, */
#define SUMS_BYTES_OF_FEW (64 * 1024) /* those of up to FEW_MORE inputs this, */
#define LEAST_SUMS (4 * SUMMED * SUMMED_ROWS) /* and this, however many threads have scratch of their own */
#define PACKED_ALONE 16           /* inputs that one thread packs for all */
#define PACKED_BYTES (704 * 1024) /* the most that a packed input takes, */
#define MOST 256                  /* and the most inputs in it; */
#define SCRATCH_BYTES (1008 * 1024) /* fewer, where scratch of many threads would be more with it, */
#define LEAST_BYTES (256 * 1024)  /* but no less of it */
#define TILE_ROWS (MAX_VECTORS * MAX_LANES) /* whose sums a thread has, for each input */
#define GRAD_ROWS 32              /* rows, or pairs of them, of a tile of the gradient, a group of columns wide */
#define TORCH_ROWS 512            /* rows of a bfloat16 input from which torch multiplies dequantized weights faster, */
#define TORCH_GRAD_ROWS 192       /* in the gradient, too, */
#define TORCH_SIXTEEN_ROWS 16     /* and with bfloat16 weights */
#define TILED_INPUTS 16           /* of a tile of AMX, */
#define TILED_LINE 32             /* and its columns */
#define TILED_FEW 4               /* inputs that AMX leaves to others, */
#define TILED_FEW_SIXTEEN 8       /* and those with bfloat16 weights */
#define TILED_ROWS 32             /* rows of the weight that are dequantized at a time then, */
#define TILED_GROUPS 2            /* of so many groups of columns; */
#define TILED_OWN (TILED_ROWS * (MAX_LANES + TILED_GROUPS * MAX_GROUP / 2)) /* floats, with scales. */
#define TILED_GRAD_ROWS 128       /* rows in the gradient, at most, of a group of columns, */
#define TILED_GRAD_OWN (TILED_GRAD_ROWS * (MAX_GROUP / 2 + MAX_LANES + TILED_INPUTS)) /* floats, with scales and padded inputs */
#define TILED_GRAD_COLUMNS 1024   /* columns whose sums are taken at a time then, but a group for each thread */
#define TILE_COLUMNS 256          /* columns whose scales are read at a time in the gradient, and whose sums a thread takes; */
#define GRAD_COLUMNS 2048         /* whose sums it takes where inputs may be few: */
#define GRAD_MOST(coded) ((coded) ? 16 : 32) /* the most that are for any ISA, with codes or 16-bit weights */
#define TILE_SCALES (TILE_COLUMNS / 8 + 2 * MAX_LANES)

/* Types of inputs, outputs and 16-bit weights. */
enum type { FLOAT32, BFLOAT16, FLOAT16 };

enum encoding { SCALES_FLOAT32, SCALES_FLOAT16, SCALES_DOUBLE, SCALES_SIGNED /* double with a sign */ };

/* Where the columns of a row of codes come up, for one number of columns, block and number of lanes: column c in
 * vector place[c] / lanes, lane place[c] % lanes. The block of a group's word i, byte b, counted from first_block[g], is
 * block[(g * 4 + b) * lanes + i]: the same for all four bytes where blocks are whole words. */
struct order {
    int64_t lanes, groups, whole_words;
    const int32_t *place, *block, *first_block;
    int32_t tables[];
};

/* A matrix (rows, columns): 4-bit, as lowmem/quant/packing.py and lowmem/quant/scales.py lay it out, or of 16-bit floats. */
struct weight {
    const uint8_t *packed; /* (rows, row_bytes); the 16-bit floats, where there are no codes */
    const uint8_t *scales;
    const float *levels; /* 16 */
    const struct order *order; /* NULL for 16-bit floats, which keep their own order */
    int64_t rows, columns, row_bytes, blocks;
    int64_t half; /* bytes of a whole block */
    int64_t stride; /* columns, padded to whole groups of words for every ISA */
    int encoding; /* enum encoding; enum type for 16-bit floats */
    int kind; /* enum kind of plan.h */
    float int8_step; /* levels[c] = int8_step * (steps[c] - INT8_ZERO), where levels were rounded for 8-bit products; else 0 */
    uint8_t steps[16];
};

/* A low-rank update: A (rank, columns), B (rows, rank), x (batch, columns), base and out (batch, rows), which may be one. */
struct update {
    const float *x, *a, *b, *base;
    float *narrow, *out; /* narrow: scratch (batch, rank) */
    float scaling;
    int64_t rank, rows, columns;
};

/* What rows of float32 are quantized to, and how the scales of their blocks are chosen. */
struct quantizing {
    const struct weight *weight; /* of what is made: its levels, encoding and sizes */
    const struct isa *isa;
    const float *x;          /* (rows, columns) */
    const float *boundaries; /* 15 */
    const float *candidates; /* scales to try, in units of a block's largest weight; none: that weight is the scale */
    const float *importance; /* (columns,): what squared errors count, or NULL: all count alike */
    int64_t tried;           /* number of candidates */
    float largest;           /* magnitude that a scale can have */
    int zero;                /* the zero code */
    int has_sign;            /* whether a scale has one */
    uint8_t *packed, *scales, *scratch;
    int64_t own, scale_bytes; /* of a thread's scratch, of a row's scales */
    int failed; /* only ever set */
};

/* One call. All threads read it. */
struct job {
    const struct weight *weight;
    const void *x; /* (batch, columns) of linear, (batch, rows) of input_grad */
    const void *bias;
    void *out;
    int64_t out_step; /* from a row of it to the next, in linear */
    float *partial;   /* (batch, rows of the weight) there: what the parts of the columns make until the last is there; out, if it is float32 */
    int type, out_type, bias_type; /* enum type of x, out and the bias */
    const struct kernel *kernel;
    int *refused; /* set where 8-bit integers would not do for what is read: nothing that is written counts */
    int64_t batch, threads;
    float *packed; /* the input, or sums of the gradient, in the order of the words, or in tiles; */
    int64_t packed_step; /* each thread packs its own copy, so many floats behind the one before; 0: they share one */
    float *own; /* scratch of the threads */
    int64_t own_floats;
    int64_t piece; /* inputs that are packed at a time */
    /* What is multiplied now: a piece of the batch, groups of columns, and rows. */
    int64_t m0, m1, g0, g1, r0, r1;
    struct quantizing *quantizing;
    const struct update *update; /* or NULL */
};

static inline void refuse(const struct job *job) { __atomic_store_n(job->refused, 1, __ATOMIC_RELAXED); }
static inline int is_refused(const struct job *job) { return __atomic_load_n(job->refused, __ATOMIC_RELAXED); }

/* One of so many parts of a job's work, by one of its threads: which one changes no bit. */
typedef void (*body)(struct job *, int64_t part, int64_t parts, int64_t thread);

/* Run bodies for as many parts a thread of the job each, or for one part in all (0). Who is done takes the next part; no
 * part of `then`, which may be NULL, begins before all of `first` are done. Threads that pack copies of their own
 * all run part 0 of `first`, which comes on top of the others then. */
void parallel(struct job *, body first, int64_t first_parts, body then, int64_t then_parts);

/* Run something for each piece of the batch and, of so many groups of columns, each part of at most `wide`, unless it is refused. */
void in_pieces(struct job *, int64_t groups, int64_t wide, void (*run)(struct job *));

/* Columns that packing has looked at, in all calls: a test holds that their number is linear in those of the inputs. */
extern int64_t visited_columns;

#if defined(__GNUC__)
#define prefetch(p) __builtin_prefetch(p)
#define prefetch_far(p) __builtin_prefetch(p, 0, 2) /* to the second cache */
#else
#define prefetch(p) ((void)0)
#define prefetch_far(p) ((void)0)
#endif

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Columns whose sums of a gradient AMX takes at a time: parts about as large, of whole groups, so that all threads have some. */
static inline int64_t tiled_grad_columns(const struct weight *w, int64_t threads)
{
    const int64_t most = threads * MAX_GROUP > TILED_GRAD_COLUMNS ? threads * MAX_GROUP : TILED_GRAD_COLUMNS;
    const int64_t parts = (w->stride + most - 1) / most;
    return round_up((w->stride + parts - 1) / parts, MAX_GROUP);
}

/* Columns of so many inputs that are packed at a time: fewer of more than a few, so that small batches take little scratch. */
static inline int64_t wide_of(int64_t batch)
{
    return batch > FEW_MORE ? WIDE : batch > FEW ? WIDE / 2 : WIDE_OF_FEW / batch;
}

/* Columns whose sums of a gradient a thread takes at a time, without AMX. */
static inline int64_t grad_columns(const struct weight *w, int64_t batch, int64_t threads)
{
    const int64_t groups = w->stride / MAX_GROUP, most = (groups + threads - 1) / threads * MAX_GROUP;
    return smaller(batch <= GRAD_MOST(w->order != NULL) ? GRAD_COLUMNS : TILE_COLUMNS, most);
}

/* Columns whose scales are read at a time: whole parts, of about MAX_LANES blocks where these are not small. */
static inline int64_t chunk_of(const struct weight *w)
{
    const int64_t most = 2 * w->half * MAX_LANES / CHUNK * CHUNK;
    return most > CHUNK ? most : CHUNK;
}

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x0400)
        return float_of(sign | ((rest << 13) + ((rest >= 0x7c00 ? 224u : 112u) << 23))); /* 224: infinity, NaN */
    const float value = (float)rest * 0x1p-24f;
    return sign ? -value : value;
}

/* What a byte of SCALES_SIGNED counts: a sign and 7 bits. No branch: signs are foreseen by no processor. */
static inline float signed_steps(uint8_t byte)
{
    const int sign = -(byte >> 7);
    return (float)(((byte & 127) ^ sign) - sign);
}

static inline float bfloat_to_float(uint16_t b) { return float_of((uint32_t)b << 16); }

/* Scale i of a row at p, or the steps that it counts. */
static inline float scale_as_stored(const uint8_t *p, int64_t i, int encoding)
{
    if (encoding == SCALES_FLOAT32)
        return ((const float *)p)[i];
    if (encoding == SCALES_FLOAT16)
        return half_to_float(((const uint16_t *)p)[i]);
    return encoding == SCALES_SIGNED ? signed_steps(p[i]) : (float)p[i];
}

/* Bytes from a row to the next. */
static inline int64_t row_stride(const struct weight *w) { return w->order ? w->row_bytes : 2 * w->columns; }

/* Bytes of the scales of a row. */
static inline int64_t scale_bytes(const struct weight *w)
{
    return w->encoding >= SCALES_DOUBLE ? w->blocks + 2 : w->blocks * (w->encoding == SCALES_FLOAT16 ? 2 : 4);
}

/* Where the float16 behind the steps of a row lies, and how many steps it counts: a scale is steps * that / row_steps. */
static inline const uint8_t *row_scale_at(const struct weight *w, int64_t row)
{
    return w->scales + row * scale_bytes(w) + w->blocks;
}
static inline float row_steps(const struct weight *w) { return w->encoding == SCALES_SIGNED ? 127.0f : 255.0f; }

/* To the nearest, ties to even; a NaN stays one. */
static inline uint16_t float_to_bfloat(float value)
{
    const uint32_t bits = bits_of(value);
    const uint16_t rounded = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

static inline uint16_t float_to_half(float value)
{
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: the addition rounds to units of 2^-24 */
        return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

/* Towards zero, for magnitudes that are not above 65504. */
static inline uint16_t float_to_half_below(float value)
{
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t below = magnitude < 0x38800000 ? (uint32_t)(float_of(magnitude) * 0x1p24f) : (magnitude - 0x38000000) >> 13;
    return (uint16_t)(sign | below);
}

static inline float read_as_float(const void *p, int type, int64_t i)
{
    if (type == FLOAT32)
        return ((const float *)p)[i];
    const uint16_t bits = ((const uint16_t *)p)[i];
    return type == BFLOAT16 ? bfloat_to_float(bits) : half_to_float(bits);
}

static inline void write_as(void *p, int type, int64_t i, float value)
{
    if (type == FLOAT32)
        ((float *)p)[i] = value;
    else
        ((uint16_t *)p)[i] = type == BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

/* The range of columns that packing groups g0 to g1, of `group` columns each, has to look at: whole blocks, from a multiple of
 * two vectors on. To look at all columns for each part of them would take time that is quadratic in their number. */
static inline void columns_between(const struct weight *w, int64_t g0, int64_t g1, int64_t group, int64_t *from, int64_t *to)
{
    const int64_t size = w->order ? 2 * w->half : 1;
    *from = g0 * group / size * size / (2 * MAX_LANES) * (2 * MAX_LANES);
    *to = smaller(round_up(g1 * group, size), w->columns);
    __atomic_fetch_add(&visited_columns, *to - *from, __ATOMIC_RELAXED);
}

/* One of the parts of n, in steps. */
static inline void share(int64_t n, int64_t step, int64_t parts, int64_t part, int64_t *from, int64_t *to)
{
    const int64_t steps = (n + step - 1) / step;
    *from = steps * part / parts * step;
    *to = steps * (part + 1) / parts * step;
    if (*to > n)
        *to = n;
}

#endif
