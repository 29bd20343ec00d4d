/* The arguments of row-wise functions, which lowmem/kernels/cpu_rowwise.py has checked and packs. Pointers are to contiguous numbers
 * unless a step is given: the elements from a row to the next. */
#pragma once
#include <stdint.h>

/* RMS norm (norm.h): out = x / sqrt(mean(x^2) + eps) * (offset + factor); with `grad`, out = the gradient of x. */
struct norm {
    int type, factor_type; /* type: of x, grad and out; FLOAT32 or BFLOAT16 */
    int64_t rows, columns;
    float eps, offset;
    int64_t rounds_first; /* whether the quotient is rounded before it is multiplied */
    const void *x, *grad, *factor;
    void *out;
};

/* Gated activation (gated.h): out = act(a) b, act(a) = relu(a)^2 if `is_squared_relu`, else a sigmoid(z),
 * z = terms[0] a + terms[1] a^3 + ...; with `grad`, out and out_b = the gradients of a and b. */
struct gated {
    int type, wide; /* of a and b, and of grad and the outputs: FLOAT32 or BFLOAT16 */
    int64_t rows, columns, step, out_step;
    float terms[7];
    int is_squared_relu;
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

/* Differences of rows (quantize.h): for each row the sums of (x - other)^2 and of x^2. */
struct comparing {
    int type, other_type;
    int64_t rows, columns;
    const void *x, *other;
    double *squares; /* (rows, 2) */
};

/* Keys, values or queries of heads: (batch, heads, rows, width). Steps count elements, from one of each to the next. */
struct states {
    int type; /* FLOAT32, BFLOAT16, FLOAT16, or CODES8: signed bytes with a scale for each row */
    void *numbers;
    float *scales; /* (batch, heads, rows), or NULL */
    int64_t steps[3], scale_steps[3];
};

#define QUERIES 16 /* most rows of queries that share a head of keys and are computed together */

/* Attention (attention.h): out (batch, queries, heads of the queries, value_width) = softmax(scaling q k' + mask) v. */
struct attention {
    int64_t batch, heads, shared; /* heads of keys and values, and how many heads of queries share each */
    int64_t queries, keys, width, value_width;
    float scaling, softcap; /* softcap: 0 for none */
    struct states query, key, value, mask; /* mask: (batch, heads of the queries, queries, keys); no numbers: no mask */
    void *out;
};

/* Sums (steps.h): out = a + b. */
struct adding {
    int64_t type, count;
    const void *a, *b;
    void *out;
};

/* Product with a dense float32 matrix (update.h): out (batch, rows) = base + scale * (x @ matrix.T), computed in float32 and rounded
 * once; base and out may be the same memory. */
struct dense_product {
    int64_t type, out_type; /* of x; of base and out */
    int64_t batch, rows, columns; /* rows, columns: of the matrix */
    float scale;
    const void *x;
    const float *matrix;
    const void *base; /* or NULL */
    void *out;
};

/* Rotary embedding in place (steps.h): of x and y, the halves of the first `width` numbers of a head, x cos - y sin and
 * y cos + x sin. */
struct rotation {
    int64_t type; /* of all */
    int64_t batch, tokens, heads, width;
    int64_t head, token, sequence; /* elements from a head, a token and a sequence to the next */
    int64_t angles; /* elements of cos and sin from a sequence to the next, of (sequences, tokens, width); or 0 */
    void *x;
    const void *cos, *sin;
};

/* Products of one input (product.h) with `count` weights of a sequence, from weight `first` on. */
#define MOST_TOGETHER 3
struct products {
    int64_t count, first, batch, columns, type;
    const void *x;
    struct {
        int64_t rows, in_integers, bias_type; /* in_integers: whether inputs are rounded to 8 bits */
        const void *bias; /* or NULL */
        void *out;
    } each[MOST_TOGETHER];
};

/* Rows of states to 8-bit codes and scales (attention.h), or copied where those have the same type. */
struct coding {
    int64_t batch, heads, rows, width;
    struct states from, into;
};
