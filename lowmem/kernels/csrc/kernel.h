/* What the levels of the kernel and its Python binding share. */
#ifndef LOWMEM_KERNEL_H
#define LOWMEM_KERNEL_H

#include <stdint.h>
#include <string.h>

/* Sizes of scratch, the same at every level, so that memory is the same on every processor. */
#define MAX_LANES 16
#define TILE_ROWS 8       /* rows restored at a time, */
#define TILE_COLUMNS 1024 /* in pieces that stay in the first cache */
#define FEW_ROWS 4
#define GRAD_ROWS 8

enum encoding { SCALES_FLOAT32, SCALES_FLOAT16, SCALES_DOUBLE, HALF_FLOAT16, HALF_BFLOAT16 };

/* A matrix (rows, columns): 4-bit, as lowmem/packing.py and lowmem/scales.py lay it out, or of 16-bit floats. */
struct weight {
    const uint8_t *packed; /* (rows, row_bytes); the 16-bit floats, where there are no codes */
    const uint8_t *scales;
    const float *levels; /* 16 */
    int64_t rows, columns, row_bytes, blocks;
    int64_t half; /* bytes of a whole block */
    int encoding;
};

/* One call. Everything in it but the output is read by all threads. */
struct job {
    struct weight weight;
    const float *x; /* (batch, columns) of linear, (batch, rows) of input_grad */
    const float *bias;
    float *out;
    int64_t batch, groups, threads;
    float *sorted; /* (batch, groups * GROUP): the input, or the gradient, in the order of the words */
    int64_t sorted_stride;
    const int32_t *lane_block;  /* (groups * LANES): the word's block, counted from the group's first */
    const int32_t *first_block; /* (groups) */
    float *thread_scratch;
    int64_t thread_floats, scale_stride;
    void (*body)(const struct job *, int64_t thread, float *scratch);
};

/* One instruction set. */
struct level {
    const char *name;
    int lanes;
    void (*linear)(const struct job *, int64_t thread, float *scratch);
    void (*input_grad)(const struct job *, int64_t thread, float *scratch);
    void (*restore)(const struct job *, int64_t thread, float *scratch);
    void (*half_linear)(const struct job *, int64_t thread, float *scratch);
};

extern const struct level level_portable, level_avx2, level_avx512;

static inline float half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    float value;
    if (rest >= 0x0400) {
        bits = sign | ((rest << 13) + ((rest >= 0x7c00 ? 224u : 112u) << 23)); /* 224: infinity, NaN */
        memcpy(&value, &bits, 4);
        return value;
    }
    value = (float)rest * 0x1p-24f;
    return sign ? -value : value;
}

/* The part of n that a thread takes, in steps: the same for every run. */
static inline void share(int64_t n, int64_t step, int64_t threads, int64_t thread, int64_t *from, int64_t *to)
{
    const int64_t steps = (n + step - 1) / step;
    *from = steps * thread / threads * step;
    *to = steps * (thread + 1) / threads * step;
    if (*to > n)
        *to = n;
}

#endif
