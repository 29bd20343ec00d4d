/* What kernels and their binding share: sizes of scratch, the structs of a weight and a call, and conversions of floats. */
#pragma once
#pragma GCC diagnostic ignored "-Wunused-parameter" /* bodies and methods have one signature each, whatever they need */

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are read as little-endian words: plain torch serves where the processor has others"
#endif
/* Whether the compiler supports AMX, and the system is one on which the binding can request it (isas.h). */
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX 1 /* else #if reads 0 */
#endif
/* Whether the compiler supports AVX-VNNI. */
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AVX_VNNI 1
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define HAS_NEON 1
#else
#define HAS_NEON 0
#endif
/* TARGET(features) compiles what follows for a processor that has them, up to END_TARGET. */
#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)
#define PRAGMA_OF(...) _Pragma(#__VA_ARGS__)
#define PRAGMA(...) PRAGMA_OF(__VA_ARGS__)
#if defined(__clang__)
#define TARGET(...) PRAGMA(clang attribute push(__attribute__((target(TEXT(__VA_ARGS__)))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define TARGET(...) PRAGMA(GCC target(TEXT(__VA_ARGS__)))
#define END_TARGET
#endif
#define AVX2 avx2,fma,f16c
#define AVX512 AVX2,avx512f,avx512bw,avx512vl,avx512dq
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Sizes, which are the same for every ISA. A "batch row" is a row of x or of grad; a "row" alone is a row of the weight. */
#define MAX_LANES 16              /* float32 lanes of the widest ISA */
#define MAX_GROUP (MAX_LANES * 8) /* codes in a group of MAX_LANES words */
#define FEW 4                     /* most batch rows for which columns lie across the lanes (few.h) */
#define FEW_MORE 8                /* the same in bfloat16, in 8-bit integers and with 8- and 16-bit weights */
#define SHARE_ROWS 8              /* granularity in rows of a thread's share there */
#define UPDATE_ROWS 16            /* rows after which a low-rank update is added there */
#define UPDATED 128               /* most batch rows whose low-rank update C adds; beyond, torch's own products are as fast */
#define PARTS 4                   /* parts per thread of long work: a delayed thread leaves its remaining parts to the others */
#define CHUNK 256                 /* fewest columns whose scales are read at a time */
/* Floats for a row's scales of a chunk (blocks have 8 columns or more), and MAX_LANES to read whole vectors. */
#define CHUNK_SCALES (CHUNK / 8 + MAX_LANES)
#define PART(bf16) ((bf16) ? 256 : 128) /* columns of a tile of dequantized rows, in bfloat16 or float32; it stays in L1 */
#define PART_FLOATS 128           /* the size of a row of such a tile in floats, for both types */
#define MAX_VECTORS 2             /* most vectors of rows in a tile */
/* Offsets in a thread's scratch, in floats: the scales of a chunk come first, then two tiles, then sums. */
#define TILES_AT (MAX_VECTORS * MAX_LANES * CHUNK_SCALES)
#define SUMS_AT (TILES_AT + MAX_VECTORS * MAX_LANES * 2 * PART_FLOATS)
#define WIDE 8192                 /* columns of x that are packed at a time, for more than FEW_MORE batch rows: see wide_of */
#define WIDE_OF_FEW 49152         /* columns times batch rows, for up to FEW batch rows, where rows are read as stored */
/* Where x is packed in parts of its columns and the output has 16 bits, float32 partial sums are kept (run_in_parts): */
#define SUMMED 128                /* most batch rows at a time */
#define SUMMED_ROWS 32            /* rows at a time are multiples of this */
#define SUMS_BYTES (256 * 1024)   /* most bytes of all sums */
#define SUMS_BYTES_OF_FEW (64 * 1024) /* most bytes of all sums of up to FEW_MORE batch rows */
#define LEAST_SUMS (4 * SUMMED * SUMMED_ROWS) /* bytes that the sums may always take, however much scratch the threads have */
#define PACKED_ALONE 16           /* most batch rows that one thread packs for all */
#define PACKED_BYTES (704 * 1024) /* most bytes of packed batch rows, copies included */
#define MOST 256                  /* most batch rows that are packed at a time */
#define SCRATCH_BYTES (1008 * 1024) /* limit in bytes for all scratch: with many threads fewer batch rows are packed at a time */
#define LEAST_BYTES (256 * 1024)  /* bytes for packed batch rows and their sums, even where the limit leaves less (piece_of) */
#define TILE_ROWS (MAX_VECTORS * MAX_LANES) /* rows of a tile: sums that a thread has per batch row */
#define GRAD_ROWS 32              /* rows, or pairs of rows, of a tile in grad @ W, which is a group of columns wide */
#define TORCH_ROWS 512            /* batch rows from which torch is faster with dequantized weights in bfloat16: x @ W.T */
#define TORCH_GRAD_ROWS 192       /* the same in grad @ W */
#define TORCH_WEIGHTS8_ROWS 33    /* the same with 8-bit weights, in both products */
#define TORCH_SIXTEEN_ROWS 9      /* batch rows from which torch is faster with bfloat16 weights and inputs: x @ W.T */
#define TORCH_GRAD_SIXTEEN_ROWS 16 /* the same in grad @ W */
#define TILED_INPUTS 16           /* batch rows of an AMX tile */
#define TILED_LINE 32             /* bfloat16 columns of a line of an AMX tile */
#define TILED_FEW 4               /* most batch rows that AMX leaves to other kernels, with codes */
#define TILED_ROWS 32             /* rows that are dequantized at a time for AMX */
#define TILED_GROUPS 2            /* groups of columns that are dequantized at a time for AMX */
/* Floats of a thread's scratch for AMX, for scales and dequantized rows. */
#define TILED_OWN (TILED_ROWS * (MAX_LANES + TILED_GROUPS * MAX_GROUP / 2))
#define TILED_GRAD_ROWS 128       /* most rows that are dequantized at a time for AMX in grad @ W, of one group of columns */
/* Floats of a thread's scratch for that, for dequantized rows, scales and zero-padded batch rows. */
#define TILED_GRAD_OWN (TILED_GRAD_ROWS * (MAX_GROUP / 2 + MAX_LANES + TILED_INPUTS))
#define TILED_GRAD_COLUMNS 1024   /* columns of grad @ W whose sums are kept at a time for AMX: see tiled_grad_columns */
#define TILE_COLUMNS 256          /* columns of grad @ W whose scales are read, and whose sums a thread keeps, at a time */
#define TILE_SCALES (TILE_COLUMNS / 8 + 2 * MAX_LANES) /* floats for a row's scales of TILE_COLUMNS columns; whole vectors */

/* Types of x, grad, the output and 16-bit weights. */
enum type { FLOAT32, BFLOAT16, FLOAT16 };

/* How scales are stored. SCALES_DOUBLE: a byte of steps per block, times a float16 per row; SCALES_SIGNED: with a sign bit. */
enum encoding { SCALES_FLOAT32, SCALES_FLOAT16, SCALES_DOUBLE, SCALES_SIGNED };

/* The order in which shifts decode the codes of a row, into which x is permuted: in a group of `lanes` 32-bit words, nibble 0 of each
 * word, then nibble 1, and so on. Low nibbles hold the first half of a block, high ones the second. Column c is lane place[c] % lanes
 * of vector place[c] / lanes; word i of group g belongs to block first_block[g] + block[g * lanes + i], of whole words. */
struct order {
    int64_t lanes, groups;
    const int32_t *place, *block, *first_block;
    int32_t tables[];
};

/* A weight (rows, columns): codes in the layout of lowmem/quant/packing.py and lowmem/quant/scale_encodings.py, or 16-bit floats. */
struct weight {
    const uint8_t *packed; /* codes or 16-bit floats: (rows, row_bytes) */
    const uint8_t *scales; /* (rows, scale_bytes(w)); NULL for 16-bit floats */
    const float *levels;   /* the 16 values of a 4-bit format, or NULL */
    const struct order *order; /* NULL for 8-bit codes and 16-bit floats, which are not reordered */
    int64_t rows, columns, row_bytes, blocks;
    int64_t behind; /* elements of the stored scales behind those of a row's blocks: a float16's bytes, or offsets */
    int64_t half; /* half the columns of a block, the bytes of its 4-bit codes; 0 for 16-bit floats */
    int64_t stride; /* columns, padded to a multiple of MAX_GROUP */
    int encoding; /* enum encoding; for 16-bit floats enum type */
    int kind; /* enum kind of plan.h */
    int offsets; /* whether products add an offset for each block, which follows the scales: kernels of few.h do */
    /* Levels rounded for 8-bit products: levels[c] ~ inputs8_step * (steps[c] - inputs8_zero). Without them inputs8_step is 0. */
    float inputs8_step;
    int inputs8_zero;
    float divisor; /* 8-bit codes: a level is (code - 128) / divisor */
    uint8_t steps[16];
    /* Levels rounded for products in 16-bit integers: the largest magnitude, int16_unit, is 2^14. The low bytes, then the high ones. */
    float int16_unit;
    uint8_t int16_levels[2][16];
};

/* A low-rank update, out = base + scaling * (x @ A.T) @ B.T; base and out may be the same memory. */
struct update {
    const float *x, *a, *b, *base;
    float *narrow, *out; /* narrow: scratch (batch, rank) for scaling * (x @ A.T) */
    float scaling;
    int64_t rank, rows, columns;
};

/* A call of quantize: rows, what they are quantized to, and how the scale of a block is chosen. */
struct quantizing {
    const struct weight *weight; /* describes the result: levels (NULL: 8 bits), encoding, sizes */
    const void *x;           /* (rows, columns) of a type */
    int type;                /* enum type of x */
    const float *boundaries; /* 15 or 255, between adjacent levels */
    /* Scales to try, as factors of the block's weight of largest magnitude. With none of them, that magnitude is the scale. */
    const float *candidates;
    const float *importance; /* (columns,): weights of the squared errors, or NULL: all weigh the same */
    int64_t tried;           /* number of candidates */
    float largest;           /* largest magnitude of a scale */
    float top;               /* of 8 bits: the largest level */
    int zero;                /* code of the zero weight; it also pads odd rows */
    int has_sign;            /* whether scales are signed */
    uint8_t *scratch;
    int64_t own; /* bytes of a thread's scratch */
    double *squares; /* (rows, 2): the sums of a row's squared errors and squared weights */
    int failed; /* set by any thread, never cleared */
};

/* One call. All threads read it; none writes to it while they run. */
struct job {
    void *call; /* of quantize or a row-wise function: struct quantizing, or one of row_calls.h */
    const struct weight *weight;
    const void *x; /* linear: (batch, columns); input_grad: (batch, rows) */
    const void *bias;
    void *out;
    int64_t out_step; /* elements from an output row to the next (linear, dequantize) */
    /* The float32 sums (batch, rows) over the parts of the columns so far, if x is packed in parts; or `out`. */
    float *partial;
    int type, out_type, bias_type; /* enum type of x, out and bias */
    const struct kernel *kernel;
    /* Set by a kernel of 8-bit integers that cannot represent what it reads: the caller discards the output. */
    int *refused;
    int64_t batch, threads;
    /* x packed in the order of the codes or in AMX tiles; for input_grad the sums, in the order of the codes. */
    float *packed;
    /* Floats from the copy of one thread to the next, where each thread packs x for itself; 0: all share one copy. */
    int64_t packed_step;
    float *own; /* scratch of the threads, own_floats each */
    int64_t own_floats;
    int64_t piece; /* batch rows that are packed at a time; of attention, rows of queries that are computed together */
    /* What is multiplied now, as half-open ranges: batch rows m0 to m1 (a piece), groups of columns g0 to g1, rows r0 to r1. */
    int64_t m0, m1, g0, g1, r0, r1;
    const struct update *update; /* or NULL */
};

/* Threads set and read `refused` without a lock: it only ever changes from 0 to 1. */
static inline void refuse(const struct job *job) { __atomic_store_n(job->refused, 1, __ATOMIC_RELAXED); }
static inline int is_refused(const struct job *job) { return __atomic_load_n(job->refused, __ATOMIC_RELAXED); }

/* Computes part `part` of `parts` of a job's work, on thread `thread`. Which thread runs a part changes no bit of the result. */
typedef void (*body)(struct job *, int64_t part, int64_t parts, int64_t thread);

/* Columns that packing has visited, over all calls: a test checks that their number grows linearly with the columns of x. */
extern int64_t visited_columns;

#define prefetch(p) __builtin_prefetch(p)
#define prefetch_far(p) __builtin_prefetch(p, 0, 2) /* to L2 */

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Columns of grad @ W whose sums are kept at a time with AMX: TILED_GRAD_COLUMNS or a group per thread, whichever is more, evened
 * out over the passes and rounded up to whole groups. */
static inline int64_t tiled_grad_columns(const struct weight *w, int64_t threads)
{
    const int64_t most = threads * MAX_GROUP > TILED_GRAD_COLUMNS ? threads * MAX_GROUP : TILED_GRAD_COLUMNS;
    const int64_t parts = (w->stride + most - 1) / most;
    return round_up((w->stride + parts - 1) / parts, MAX_GROUP);
}

/* Columns of x that are packed at a time for a batch: fewer for 5 to 8 batch rows, so that small batches take little scratch. */
static inline int64_t wide_of(int64_t batch)
{
    return batch > FEW_MORE ? WIDE : batch > FEW ? WIDE / 2 : WIDE_OF_FEW / batch;
}

/* Columns of grad @ W whose sums a thread keeps at a time, without AMX. */
static inline int64_t grad_columns(const struct weight *w, int64_t threads)
{
    const int64_t groups = w->stride / MAX_GROUP;
    return smaller(TILE_COLUMNS, (groups + threads - 1) / threads * MAX_GROUP);
}

/* Columns whose scales are read at a time: a multiple of CHUNK, MAX_LANES blocks or so where blocks are large. */
static inline int64_t chunk_of(const struct weight *w)
{
    const int64_t most = 2 * w->half * MAX_LANES / CHUNK * CHUNK;
    return most > CHUNK ? most : CHUNK;
}

/* Blocks of a row in whole vectors. */
static inline int64_t padded_blocks(const struct weight *w) { return round_up(w->blocks, MAX_LANES); }

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
        return float_of(sign | ((rest << 13) + ((rest >= 0x7c00 ? 224u : 112u) << 23))); /* 127 - 15; 255 - 31 */
    const float value = (float)rest * 0x1p-24f;
    return sign ? -value : value;
}

static inline float bfloat_to_float(uint16_t b) { return float_of((uint32_t)b << 16); }

/* Bytes of a row's scales and of what follows them: offsets, or, in double quantization, the row's float16. */
static inline int64_t scale_bytes(const struct weight *w)
{
    return (w->blocks + w->behind) * (w->encoding >= SCALES_DOUBLE ? 1 : w->encoding == SCALES_FLOAT16 ? 2 : 4);
}

/* Double quantization: scale = steps * row scale / row_steps. row_scale_at: where the row scale, a float16, is. */
static inline const uint8_t *row_scale_at(const struct weight *w, int64_t row)
{
    return w->scales + row * scale_bytes(w) + w->blocks;
}
static inline float row_steps(const struct weight *w) { return w->encoding == SCALES_SIGNED ? 127.0f : 255.0f; }

/* Rounds to nearest, ties to even; a NaN becomes the quiet NaN 0x7fc0. */
static inline uint16_t float_to_bfloat(float value)
{
    const uint32_t bits = bits_of(value);
    const uint16_t rounded = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

/* Rounds to nearest, ties to even; a NaN becomes the quiet NaN 0x7e00 with its sign. */
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

/* Rounds toward zero; defined for magnitudes up to 65504. */
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

/* The columns of the low and the high nibble of a byte of a row of `columns` columns in blocks of 2 * half; *high is -1 for the
 * code that pads an odd row. A row's last block may be short: its halves are shorter, too. */
static inline void columns_of(int64_t byte, int64_t columns, int64_t half, int64_t *low, int64_t *high)
{
    const int64_t start = byte / half * 2 * half, left = smaller(columns - start, 2 * half), lower = (left + 1) / 2;
    *low = start + byte % half;
    *high = byte % half + lower < left ? *low + lower : -1;
}

/* The columns that packing groups g0 to g1 (of `group` columns each) has to visit: whole blocks, starting at a multiple of two
 * vectors. If each of several parts visited all columns, packing would take quadratic time. */
static inline void columns_between(const struct weight *w, int64_t g0, int64_t g1, int64_t group, int64_t *from, int64_t *to)
{
    const int64_t size = w->order ? 2 * w->half : 1;
    *from = g0 * group / size * size / (2 * MAX_LANES) * (2 * MAX_LANES);
    *to = smaller(round_up(g1 * group, size), w->columns);
    __atomic_fetch_add(&visited_columns, *to - *from, __ATOMIC_RELAXED);
}

/* Part `part` of `parts` of the range 0 to n; boundaries are multiples of `step`. */
static inline void share(int64_t n, int64_t step, int64_t parts, int64_t part, int64_t *from, int64_t *to)
{
    const int64_t steps = (n + step - 1) / step;
    *from = steps * part / parts * step;
    *to = steps * (part + 1) / parts * step;
    if (*to > n)
        *to = n;
}
