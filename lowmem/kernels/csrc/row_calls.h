/* The arguments of row-wise functions, which lowmem/kernels/cpu_rows.py has checked and packs. Pointers are to contiguous numbers
 * unless a step is given: the elements from a row to the next. */
#pragma once
#include <stdint.h>

/* RMS norm (norm.h): out = x / sqrt(mean(x^2) + eps) * factor; with `grad`, out = the gradient of x. */
struct norm {
    int type; /* of x, grad and out: FLOAT32 or BFLOAT16 */
    int64_t rows, columns;
    float eps;
    int rounds_first; /* whether the quotient is rounded before it is multiplied */
    const void *x, *grad;
    const float *factor;
    void *out;
};

/* Gated activation (gated.h): out = act(a) b, act(a) = a sigmoid(z), z = terms[0] a + terms[1] a^3 + ...; with `grad`, out and
 * out_b = the gradients of a and b. */
struct gated {
    int type, wide; /* of a and b, and of grad and the outputs: FLOAT32 or BFLOAT16 */
    int64_t rows, columns, step, out_step;
    float terms[7];
    const void *a, *b, *grad; /* b: or NULL */
    void *out, *out_b;        /* out_b: or NULL */
};

/* Cross entropy (entropy.h): losses, and the gradient of the logits in their place. */
struct entropy {
    int type, has_gradient;
    int64_t rows, columns;
    float smoothing;
    void *logits;
    const int64_t *targets;
    float *losses;
};

/* Saved activations in 8 bits (saved8.h): numbers to codes and scales, or back. */
struct saved8 {
    int type;
    int64_t blocks, length; /* length: of the numbers, in encode8 */
    void *numbers;
    int8_t *codes;
    float *scales;
    int64_t *counts; /* nonzero numbers, nonzero codes, and scales that are not finite: encode8 adds to them */
};

/* Rounding of columns (columns.h). Row i of each array has column i of the weight. */
struct rounding {
    int64_t columns, rows; /* of the weight */
    int descends;
    float *values, *approximate;     /* values become the changes */
    const float *levels, *boundaries; /* 16 and 15 */
    const float *pivots, *matrix, *scales;
    uint8_t *codes;
};
