/* Weights from Python. A C handle is valid while its tensors keep their address, shape and dtype; each call checks that. */
#pragma once
#include <stdlib.h>

#include "isas.h"
#include "tensor.h"

/* The place (vector * lanes + lane) of the low or high nibble of a byte of a row. */
static int32_t place_of(int64_t byte, int high, int64_t lanes)
{
    const int64_t word = byte / 4, nibble = 2 * (byte % 4) + high;
    return (int32_t)(word / lanes * lanes * 8 + nibble * lanes + word % lanes);
}

/* The order for rows of `columns` columns in blocks of `size`, or NULL without memory. The caller frees it. */
static struct order *make_order(int64_t lanes, int64_t columns, int64_t size)
{
    const int64_t stride = round_up(columns + columns % 2, MAX_GROUP), groups = stride / (lanes * 8), half = size / 2;
    const int64_t row_bytes = (columns + 1) / 2, blocks = (columns + size - 1) / size;
    struct order *order = malloc(sizeof *order + (size_t)(columns + stride / 8 + groups) * sizeof(int32_t));
    if (!order)
        return NULL;
    int32_t *place = order->tables, *block = place + columns, *first_block = block + stride / 8;
    for (int64_t byte = 0, low, high; byte < row_bytes; byte++) {
        columns_of(byte, columns, half, &low, &high);
        place[low] = place_of(byte, 0, lanes);
        if (high >= 0)
            place[high] = place_of(byte, 1, lanes);
    }
    for (int64_t g = 0; g < groups; g++) {
        const int64_t byte = smaller(g * lanes * 4, row_bytes - 1), last = smaller((g + 1) * lanes * 4, row_bytes) - 1;
        /* One vector holds the scales of several groups, so that a kernel reads them once, and the last one is whole, too. */
        first_block[g] = (int32_t)smaller(byte / half, blocks > lanes ? blocks - lanes : 0);
        if (g && last / half - first_block[g - 1] < lanes)
            first_block[g] = first_block[g - 1];
        for (int64_t word = g * lanes; word < (g + 1) * lanes; word++)
            block[word] = word * 4 < row_bytes ? (int32_t)(word * 4 / half) - first_block[g] : 0;
    }
    order->lanes = lanes;
    order->groups = groups;
    order->place = place;
    order->block = block;
    order->first_block = first_block;
    return order;
}

/* The handle of a weight of codes, a capsule in Python, which owns levels and a reference to the order, but no codes. */
struct prepared {
    struct weight weight;
    float levels[16];
    PyObject *order;
};

#define PREPARED "lowmem.prepared"
#define ORDER "lowmem.order"

static void free_order(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, ORDER)); }

/* order(isa, columns, block_size) -> capsule of a struct order */
static PyObject *order(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    long long n[3];
    if (read_numbers(args, given, n, 3))
        return NULL;
    struct order *made = make_order(all_isas[n[0]]->lanes, n[1], n[2]);
    return made ? PyCapsule_New(made, ORDER, free_order) : PyErr_NoMemory();
}

static void free_prepared(PyObject *capsule)
{
    struct prepared *prepared = PyCapsule_GetPointer(capsule, PREPARED);
    Py_XDECREF(prepared->order);
    free(prepared);
}

/* The description of a weight in blocks of `size` columns, in 8 bits if it has no levels; or of 16-bit floats (size 0). */
static struct weight weight_of(const void *packed, const void *scales, const float *levels, int encoding, int64_t size,
                               int64_t rows, int64_t columns)
{
    return (struct weight){
        .packed = packed, .scales = scales, .levels = levels, .rows = rows, .columns = columns,
        .row_bytes = !size ? 2 * columns : levels ? (columns + 1) / 2 : columns,
        .blocks = size ? (columns + size - 1) / size : 0, .behind = size && encoding >= SCALES_DOUBLE ? 2 : 0,
        .half = size / 2, .stride = round_up(columns + columns % 2, MAX_GROUP), .encoding = encoding,
        .kind = kind_of(size / 2, size && !levels ? CODES8 : encoding),
    };
}

/* `rows` rows of a weight, from row `first` on. */
static struct weight rows_of(const struct weight *w, int64_t first, int64_t rows)
{
    struct weight some = *w;
    some.packed += first * w->row_bytes;
    some.scales += w->half ? first * scale_bytes(w) : 0;
    some.rows = rows;
    return some;
}

/* Round the levels for 8-bit products: the step is 1 / points of the largest magnitude, and 1 / points of a level of 8-bit codes. */
static void use_inputs8(const struct isa *isa, struct weight *w, int64_t points)
{
    w->inputs8_zero = isa->inputs8_zero;
    if (!w->levels) {
        w->inputs8_step = 1.0f / (float)points;
        return;
    }
    if (points <= isa->inputs8_shifted)
        w->inputs8_zero = (int)points;
    w->inputs8_step = fmaxf(w->levels[15], -w->levels[0]) / (float)points;
    for (int c = 0; c < 16; c++)
        w->steps[c] = (uint8_t)((int)rintf(w->levels[c] / w->inputs8_step) + w->inputs8_zero);
}

static void use_int16(struct weight *w)
{
    w->int16_unit = fmaxf(w->levels[15], -w->levels[0]);
    for (int c = 0; c < 16; c++) {
        const int16_t level = (int16_t)rintf(w->levels[c] / w->int16_unit * 0x1p14f);
        w->int16_levels[0][c] = (uint8_t)level;
        w->int16_levels[1][c] = (uint8_t)(level >> 8);
    }
}

/* Whether codes and scales have the shapes and types that the weight requires. */
static int is_stored_as(const struct weight *w, const struct tensor *packed, const struct tensor *scales)
{
    const int steps = w->encoding >= SCALES_DOUBLE, type = steps ? -1 : w->encoding == SCALES_FLOAT16 ? FLOAT16 : FLOAT32;
    return packed->type < 0 && has_shape(packed, w->rows, w->row_bytes) && scales->type == type &&
           has_shape(scales, w->rows, w->blocks + w->behind);
}

/* prepare(order, isa, packed, scales, levels or 0 for 8-bit codes, encoding, block_size, rows, columns, points, offsets) ->
 * capsule, or None if C cannot read the tensors. points: the largest level in steps for int8 products, or 0; of 8-bit codes their
 * divisor. offsets: 0, or they follow a row's scales: 1 for products with the weight without them, 2 for products that add them. */
static PyObject *prepare(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { ORDER_OF, ISA, PACKED, SCALES, LEVELS, ENCODING, BLOCK, ROWS, COLUMNS, POINTS, OFFSETS, ARGUMENTS };
    long long isa, n[ARGUMENTS];
    struct tensor packed, scales;
    struct held held = {.count = 0};
    int is = 1;
    if (has_count(given, ARGUMENTS) || read_numbers(args + ISA, 1, &isa, 1) ||
        read_numbers(args + LEVELS, given - LEVELS, n + LEVELS, ARGUMENTS - LEVELS))
        return NULL;
    struct order *order = PyCapsule_GetPointer(args[ORDER_OF], ORDER);
    if (!order)
        return NULL;
    if ((is = read_tensor(args[PACKED], &packed, &held)) == 1)
        is = read_tensor(args[SCALES], &scales, &held);
    release(&held); /* only addresses were taken */
    if (is < 0)
        return NULL;
    struct weight w;
    if (is)
        w = weight_of(packed.data, scales.data, ADDRESS(n[LEVELS]), (int)n[ENCODING], n[BLOCK], n[ROWS], n[COLUMNS]);
    if (is && n[OFFSETS])
        w.behind = w.blocks;
    if (!is || !is_stored_as(&w, &packed, &scales))
        Py_RETURN_NONE;
    struct prepared *prepared = malloc(sizeof *prepared);
    PyObject *capsule = prepared ? PyCapsule_New(prepared, PREPARED, free_prepared) : PyErr_NoMemory();
    if (!capsule) {
        free(prepared);
        return NULL;
    }
    if (w.levels)
        use_int16(&w);
    if (n[POINTS])
        use_inputs8(all_isas[isa], &w, n[POINTS]);
    w.divisor = (float)n[POINTS];
    w.offsets = n[OFFSETS] == 2;
    Py_INCREF(args[ORDER_OF]);
    if (w.levels) {
        w.order = order;
        w.levels = memcpy(prepared->levels, w.levels, sizeof prepared->levels);
    }
    prepared->weight = w;
    prepared->order = args[ORDER_OF];
    return capsule;
}

/* Read a weight: codes by their handle, or, if `prepared` is None, a matrix of 16-bit floats. Returns 1 with its storages held,
 * 0 if C cannot read it or the handle is no longer valid, -1 with a Python error. */
static int read_weight(const struct isa *isa, PyObject *prepared, PyObject *packed, PyObject *scales, struct weight *w,
                       struct held *held)
{
    struct tensor p, s;
    if (prepared == Py_None) {
        const int is = read_tensor(packed, &p, held);
        if (is <= 0 || p.dims != 2 || !p.shape[1] || (p.type != BFLOAT16 && p.type != FLOAT16))
            return is < 0 ? -1 : 0;
        *w = weight_of(p.data, NULL, NULL, p.type, 0, p.shape[0], p.shape[1]);
        return 1;
    }
    const struct prepared *known = PyCapsule_GetPointer(prepared, PREPARED);
    if (!known)
        return -1;
    *w = known->weight;
    return read_memory(packed, &p, held) && read_memory(scales, &s, held) && p.data == w->packed && s.data == w->scales &&
           is_stored_as(w, &p, &s) && (!w->order || w->order->lanes == isa->lanes);
}
