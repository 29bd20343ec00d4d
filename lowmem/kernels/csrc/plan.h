/* The plan: which kernel computes a product. Each instruction set (ISA) has a table with a row for each of its kernels, and `plan`
 * returns the first row that accepts a product; the kernels of the ISA that it extends come after its own. For all alike, product.h
 * decides on pieces, parts and threads, and lowmem/kernels/cpu.py on offsets and on inputs that torch rounds to 8 bits. */
#pragma once
#include "kernel.h"

enum operation { LINEAR, LINEAR_INPUTS8, INPUT_GRAD }; /* x @ W.T, the same in 8-bit integers, and grad @ W */

/* Kinds of weights, as bits. A word is 32 bits, or eight codes; a group is MAX_GROUP codes. */
enum kind {
    GROUPS = 1,     /* 4-bit, in blocks of 16, 32, 64 or 128 columns */
    WORDS = 2,      /* 4-bit, in other blocks of whole words */
    ODD = 4,        /* codes in other blocks: not whole words of 4-bit codes, or vectors of 8-bit ones */
    BFLOATS = 8,    /* bfloat16 */
    HALVES = 16,    /* float16 */
    GROUPS8 = 32,   /* 8-bit, in blocks of 16, 32, 64 or 128 columns */
    VECTORS8 = 64,  /* 8-bit, in other blocks of a multiple of MAX_LANES columns */
    WHOLE = GROUPS | WORDS,
    WEIGHTS8 = GROUPS8 | VECTORS8,
    SIXTEEN = BFLOATS | HALVES
};

enum { ANY_TYPE = 1 << FLOAT32 | 1 << BFLOAT16 | 1 << FLOAT16 };
#define ANY_ROWS INT64_MAX
#define CODES8 8 /* in place of the type of 16-bit floats: codes have 8 bits */

struct kernel {
    const char *name; /* NULL ends a table */
    enum operation operation;
    int weights;         /* accepted kinds of weights */
    int types;           /* accepted types of x or grad, as bits 1 << enum type */
    int64_t least, most; /* accepted range of batch rows */
    /* For a small batch: row by row, with a low-rank update; or, in grad @ W, with 16-bit weights in registers. */
    int few;
    int adds_offsets; /* of a weight that has them (struct weight) */
    int amx;
    /* Scratch: bytes of a packed number; floats of a thread, and for each packed batch row, of which it takes multiples. */
    int64_t number, own, own_of_input, whole;
    body pack, multiply; /* pack: NULL in grad @ W, which packs nothing. multiply: NULL for BY_TORCH */
};

/* Products that are faster in torch, for which Python dequantizes the weight: from a number of batch rows on. */
#define BY_TORCH                                                                       \
    {"torch", LINEAR, WHOLE, 1 << BFLOAT16, TORCH_ROWS, ANY_ROWS},                     \
    {"torch_sixteen", LINEAR, BFLOATS, 1 << BFLOAT16, TORCH_SIXTEEN_ROWS, ANY_ROWS},   \
    {"torch_weights8", LINEAR, WEIGHTS8, 1 << BFLOAT16, TORCH_WEIGHTS8_ROWS, ANY_ROWS}, \
    {"grad_torch_weights8", INPUT_GRAD, WEIGHTS8, 1 << BFLOAT16, TORCH_WEIGHTS8_ROWS, ANY_ROWS}, \
    {"grad_torch", INPUT_GRAD, GROUPS, 1 << BFLOAT16, TORCH_GRAD_ROWS, ANY_ROWS},      \
    {"grad_torch_sixteen", INPUT_GRAD, BFLOATS, 1 << BFLOAT16, TORCH_GRAD_SIXTEEN_ROWS, ANY_ROWS}

/* The same for rare weights: no kernel is worth its lines. */
#define OTHERS_BY_TORCH                                   \
    {"torch_others", LINEAR, ODD, ANY_TYPE, 1, ANY_ROWS}, \
    {"grad_torch_others", INPUT_GRAD, ODD, ANY_TYPE, 1, ANY_ROWS}

enum row_function { NORM, GATED, ENTROPY, ENCODE8, DECODE8, ROUND_COLUMNS, ATTENTION, ENCODE_STATES, ADD, ROTATE, COMPARE, DENSE_PRODUCT, ROW_FUNCTIONS };

enum { PRODUCTS = 100 }; /* of a sequence, beside row functions */

struct isa {
    const char *name;
    int lanes;
    const struct isa *extends; /* or NULL */
    const struct kernel *kernels;
    /* Products in 8-bit integers (inputs8.h): the zero point of steps and codes; and, where that is 0, the largest level in steps of
     * formats whose steps are shifted all the same, by that level. */
    int inputs8_zero, inputs8_shifted;
    /* Functions other than products; NULL if the ISA extends another, since those of base_of are used. */
    body dequantize, quantize, narrow, widen; /* dequantize rows; narrow and widen: the two products of a low-rank update (update.h) */
    body rows[ROW_FUNCTIONS]; /* row-wise functions: see row_calls.h */
};

extern const struct isa isa_portable, isa_neon, isa_avx2, isa_avxvnni, isa_avxvnni_avx512, isa_avx512, isa_avx512vnni, isa_avx512bf16, isa_avx512amx;

/* The ISA at the end of the chain of `extends`, which has the functions other than products. */
static inline const struct isa *base_of(const struct isa *isa)
{
    while (isa->extends)
        isa = isa->extends;
    return isa;
}

/* The kind of a weight in blocks of 2 * half columns; `type`: CODES8 for 8-bit codes, for half 0 that of the floats. */
static inline enum kind kind_of(int64_t half, int type)
{
    if (!half)
        return type == BFLOAT16 ? BFLOATS : HALVES;
    if (type == CODES8)
        return half % (MAX_LANES / 2) ? ODD : MAX_GROUP / 2 % half ? VECTORS8 : GROUPS8;
    return half % 4 ? ODD : MAX_GROUP / 2 % half || half % 8 ? WORDS : GROUPS;
}

/* Why a kernel does not accept a product, or NULL if it does. */
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

/* Kernel k, or, at the end of the table of *isa, the first kernel of the ISA that it extends; NULL: there is none. */
static inline const struct kernel *next_kernel(const struct isa **isa, const struct kernel *k)
{
    while (!k->name) {
        if (!(*isa = (*isa)->extends))
            return NULL;
        k = (*isa)->kernels;
    }
    return k;
}

/* The kernel that computes a product, or NULL if there is none. */
static inline const struct kernel *plan(const struct isa *isa, enum kind weight, int64_t rows, int type, enum operation operation)
{
    const struct kernel *k = isa->kernels;
    while ((k = next_kernel(&isa, k)) && refusal(k, weight, rows, type, operation))
        k++;
    return k;
}
