/* The plan: which kernel computes a product. Each instruction set (ISA) has a table of its kernels, a row for each, and `plan`
 * returns the first row that accepts a product. An ISA has the kernels of the one that it extends, too, behind its own. */
#ifndef LOWMEM_PLAN_H
#define LOWMEM_PLAN_H

#include "kernel.h"

enum operation {
    LINEAR,      /* x @ W.T */
    LINEAR_INT8, /* the same in 8-bit integers */
    INPUT_GRAD   /* grad @ W */
};

/* Kinds of weights: bits. A word is 32 bits, eight codes; a group MAX_GROUP codes. */
enum kind {
    GROUPS = 1,     /* 4-bit, in blocks that are whole words and whole parts of a group: 8 to 128 */
    WORDS = 2,      /* 4-bit, in other blocks of whole words */
    ODD = 4,        /* 4-bit, in blocks that are not whole words */
    BFLOATS = 8,    /* bfloat16 */
    HALVES = 16,    /* float16 */
    WHOLE = GROUPS | WORDS,
    CODES = WHOLE | ODD,
    SIXTEEN = BFLOATS | HALVES
};

enum { ANY_TYPE = 1 << FLOAT32 | 1 << BFLOAT16 | 1 << FLOAT16 };
#define ANY_ROWS INT64_MAX

struct kernel {
    const char *name; /* NULL ends a table */
    enum operation operation;
    int weights;         /* kinds that it accepts */
    int types;           /* types of the input that it accepts: 1 << enum type */
    int64_t least, most; /* rows of the input */
    int few;             /* whether results come row by row, and an update with them */
    int amx;
    /* Scratch: bytes of a number of the packed input; floats that a thread has of its own, and more for each packed row of the
     * input; rows of the input are packed in multiples of `whole`. */
    int64_t number, own, own_of_input, whole;
    body pack, multiply; /* NULL: in grad @ W nothing is packed; torch multiplies (BY_TORCH) */
};

/* Where torch's product is faster, and Python dequantizes for it: rows of the weight, or columns in the gradient. */
#define BY_TORCH                                                                       \
    {"torch", LINEAR, CODES, 1 << BFLOAT16, TORCH_ROWS, ANY_ROWS},                     \
    {"torch_sixteen", LINEAR, BFLOATS, 1 << BFLOAT16, TORCH_SIXTEEN_ROWS, ANY_ROWS},   \
    {"grad_torch", INPUT_GRAD, GROUPS, 1 << BFLOAT16, TORCH_GRAD_ROWS, ANY_ROWS},      \
    {"grad_torch_sixteen", INPUT_GRAD, BFLOATS, 1 << BFLOAT16, TORCH_SIXTEEN_ROWS, ANY_ROWS}

struct isa {
    const char *name;
    int lanes;
    const struct isa *extends; /* or NULL */
    const struct kernel *kernels;
    /* Each NULL where it is that of the ISA that this one extends. */
    body dequantize, narrow, widen; /* rows of a weight; the two products of an update */
    int (*quantize)(const struct quantizing *, int64_t from, int64_t to, uint8_t *own);
};

extern const struct isa isa_portable, isa_neon, isa_avx2, isa_avx512, isa_avx512vnni, isa_avx512bf16, isa_avx512amx;

/* The ISA whose functions, other than products, one uses. */
static inline const struct isa *base_of(const struct isa *isa)
{
    while (isa->extends)
        isa = isa->extends;
    return isa;
}

/* The kind of a weight in blocks of `half` bytes, or of 16-bit floats (0) of a type. */
static inline enum kind kind_of(int64_t half, int type)
{
    if (!half)
        return type == BFLOAT16 ? BFLOATS : HALVES;
    return half % 4 ? ODD : MAX_GROUP / 2 % half ? WORDS : GROUPS;
}

/* Why a kernel does not accept a product, or NULL: it does. */
static inline const char *refusal(const struct kernel *k, enum kind weight, int64_t rows, int type, enum operation operation)
{
    if (k->operation != operation)
        return "operation";
    if (!(k->weights & weight))
        return "weight";
    if (!(k->types >> type & 1))
        return "dtype";
    return rows < k->least || rows > k->most ? "rows" : NULL;
}

/* The kernel for a product, or NULL: there is none. */
static inline const struct kernel *plan(const struct isa *isa, enum kind weight, int64_t rows, int type, enum operation operation)
{
    for (; isa; isa = isa->extends)
        for (const struct kernel *k = isa->kernels; k->name; k++)
            if (!refusal(k, weight, rows, type, operation))
                return k;
    return NULL;
}

#endif
