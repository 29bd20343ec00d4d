/* Arguments from Python: numbers and tensors, which come by DLPack (dlpack.h, version 1), a stable interface: through torch's
 * table of C functions where it has one (from torch 2.10 on), else through a capsule. */
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000 /* one binary works with every Python from 3.11 on */
#include <Python.h>

#include "kernel.h"

/* has_count returns 1 with a TypeError for a wrong number of arguments; read_numbers -1 with a Python error, or 0. */
static int has_count(Py_ssize_t given, Py_ssize_t expected)
{
    if (given != expected)
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, given);
    return given != expected;
}

static int read_numbers(PyObject *const *args, Py_ssize_t given, long long *numbers, Py_ssize_t expected)
{
    if (has_count(given, expected))
        return -1;
    for (Py_ssize_t i = 0; i < given; i++) {
        numbers[i] = PyLong_AsLongLong(args[i]);
        if (numbers[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

#define ADDRESS(n) ((void *)(intptr_t)(n))

/* DLTensor, DLManagedTensor, DLManagedTensorVersioned and the head of DLPackExchangeAPI in dlpack.h. */
struct dl_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t offset;
};

struct dl_capsule {
    struct dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_capsule *);
};

struct dl_managed {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_managed *);
    uint64_t flags;
    struct dl_tensor tensor;
};

struct dl_table {
    uint32_t major, minor;
    struct dl_table *before;
    int (*allocate)(struct dl_tensor *, struct dl_managed **, void *, void (*)(void *, const char *, const char *));
    int (*managed_of)(void *, struct dl_managed **);
    int (*object_of)(struct dl_managed *, void **);
    int (*read)(void *, struct dl_tensor *);
};

enum { DL_CPU = 1, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4 };

/* The arguments of use_torch, and the names of tensor methods. */
static struct {
    PyTypeObject *tensor, *parameter;
    const struct dl_table *table;
    PyObject *to_capsule, *bytes, *new_empty, *untyped_storage, *is_neg, *is_zero;
} torch;

#define MOST_WEIGHTS 16 /* of a sequence */

/* The storages that a call reads: another thread may assign .data meanwhile, which would free them. */
struct held {
    PyObject *storages[2 * MOST_WEIGHTS + 8];
    int count;
};

#define HELD __attribute__((cleanup(release))) struct held /* released at the end of its scope */
static void release(struct held *held)
{
    while (held->count)
        Py_DECREF(held->storages[--held->count]);
}

#define MOST_DIMS 6

/* A contiguous tensor on the CPU. */
struct tensor {
    void *data;
    int dims, type; /* type: enum type, or -1 for uint8 */
    int64_t shape[2], bytes; /* shape: with more than two dimensions, as a matrix of all rows */
    int64_t sizes[MOST_DIMS];
};

static PyObject *no_memory(void)
{
    PyErr_SetString(PyExc_ValueError, "a tensor has no memory: its storage was freed, or it is not a real one");
    return NULL;
}

/* The truth value of object.method(): 1, 0, or -1 with a Python error. */
static int ask(PyObject *object, PyObject *method)
{
    PyObject *answer = PyObject_CallMethodObjArgs(object, method, NULL);
    const int is = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    return is;
}

/* Describe a DLPack tensor; 0 if it is not a contiguous CPU tensor of at most MOST_DIMS dimensions and of a type that C takes. */
static int read_dl(const struct dl_tensor *from, struct tensor *t)
{
    const int bits = from->dtype.bits;
    if (from->device.type != DL_CPU || from->dims < 1 || from->dims > MOST_DIMS || from->dtype.lanes != 1)
        return 0;
    int64_t count = 1;
    for (int i = from->dims - 1; i >= 0; i--) {
        if (from->strides && from->shape[i] != 1 && from->strides[i] != count)
            return 0;
        count *= from->shape[i];
        t->sizes[i] = from->shape[i];
    }
    const int64_t last = t->sizes[from->dims - 1];
    t->shape[from->dims > 1] = last;
    if (from->dims > 1)
        t->shape[0] = from->dims == 2 ? t->sizes[0] : last ? count / last : 0;
    t->data = from->data ? (char *)from->data + from->offset : NULL;
    t->dims = from->dims;
    t->type = from->dtype.code == DL_FLOAT && bits == 32    ? FLOAT32
              : from->dtype.code == DL_FLOAT && bits == 16  ? FLOAT16
              : from->dtype.code == DL_BFLOAT && bits == 16 ? BFLOAT16
                                                            : -1;
    t->bytes = count * bits / 8;
    return t->type >= 0 || (from->dtype.code == DL_UINT && bits == 8);
}

/* Read a plain, contiguous CPU tensor of a type that C takes, and hold its storage (unless held is
 * NULL: nobody else has the tensor). Returns 0 for other tensors. */
static int read_memory(PyObject *object, struct tensor *t, struct held *held)
{
    PyTypeObject *type = Py_TYPE(object);
    if (type != torch.tensor && type != torch.parameter)
        return 0;
    int is = 0, failed;
    if (held) { /* hold it before reading the address, so that no other thread runs in between */
        PyObject *storage = PyObject_CallMethodObjArgs(object, torch.untyped_storage, NULL);
        if (!storage) { /* a sparse tensor, or one of a function transform */
            PyErr_Clear();
            return 0;
        }
        held->storages[held->count++] = storage;
    }
    if (torch.table) {
        struct dl_tensor found;
        failed = torch.table->read(object, &found);
        if (!failed)
            is = read_dl(&found, t);
    } else {
        PyObject *capsule = PyObject_CallFunctionObjArgs(torch.to_capsule, object, NULL);
        struct dl_capsule *found = capsule ? PyCapsule_GetPointer(capsule, "dltensor") : NULL;
        failed = !found;
        if (!failed)
            is = read_dl(&found->tensor, t);
        Py_XDECREF(capsule); /* its destructor frees what was not taken */
    }
    if (failed) /* a layout that DLPack cannot express */
        PyErr_Clear();
    return is;
}

/* The same; 0, too, for a tensor whose memory is not its value (negated lazily, zero), -1 with an error without memory. */
static int read_tensor(PyObject *object, struct tensor *t, struct held *held)
{
    if (!read_memory(object, t, held))
        return 0;
    const int lazy = t->type < 0 ? 0 : ask(object, torch.is_neg); /* negated lazily: memory has the opposite sign */
    if (lazy)
        return lazy > 0 ? 0 : -1;
    if (t->data || !t->bytes)
        return 1;
    const int zero = ask(object, torch.is_zero); /* a zero tensor has no memory */
    if (!zero)
        no_memory();
    return zero > 0 ? 0 : -1;
}

static int has_shape(const struct tensor *t, int64_t rows, int64_t columns)
{
    return t->dims == 2 && t->shape[0] == rows && t->shape[1] == columns;
}

/* The same for a tensor of any number of dimensions but one, as a matrix of all rows. */
static int has_rows(const struct tensor *t, int64_t rows, int64_t columns)
{
    return t->dims > 1 && t->shape[0] == rows && t->shape[1] == columns;
}

/* A new, uninitialized tensor of the dtype of `other`, and of the shape of x but for the last size. */
static PyObject *empty_for(PyObject *other, const struct tensor *x, int64_t columns)
{
    PyObject *shape = PyTuple_New(x->dims);
    for (int i = 0; shape && i < x->dims; i++) {
        PyObject *size = PyLong_FromLongLong(i < x->dims - 1 ? x->sizes[i] : columns);
        if (!size || PyTuple_SetItem(shape, i, size)) /* takes the reference */
            Py_CLEAR(shape);
    }
    PyObject *made = shape ? PyObject_CallMethodObjArgs(other, torch.new_empty, shape, NULL) : NULL;
    Py_XDECREF(shape);
    return made;
}

/* A new, uninitialized tensor (rows, columns) of the dtype of `other`. */
static PyObject *empty_like(PyObject *other, int64_t rows, int64_t columns)
{
    PyObject *r = PyLong_FromLongLong(rows), *c = PyLong_FromLongLong(columns);
    PyObject *made = r && c ? PyObject_CallMethodObjArgs(other, torch.new_empty, r, c, NULL) : NULL;
    Py_XDECREF(r);
    Py_XDECREF(c);
    return made;
}

/* Scratch memory. It is allocated through torch, so that torch's memory figures count it. */
struct scratch {
    float *memory;
    struct dl_managed *managed;
    PyObject *object;
};

static void set_error(void *unused, const char *kind, const char *message)
{
    PyErr_Format(PyExc_RuntimeError, "%s: %s", kind, message);
}

/* Allocate `bytes` of scratch. Returns 0, or -1 with a Python error. */
static int take_scratch(int64_t bytes, struct scratch *s)
{
    *s = (struct scratch){0};
    if (torch.table) {
        struct dl_tensor wanted = {.device = {DL_CPU, 0}, .dims = 1, .dtype = {DL_UINT, 8, 1}, .shape = &bytes};
        if (torch.table->allocate(&wanted, &s->managed, NULL, set_error)) {
            if (!PyErr_Occurred())
                PyErr_NoMemory();
            return -1;
        }
        s->memory = s->managed->tensor.data;
    } else {
        struct tensor t;
        s->object = empty_like(torch.bytes, 1, bytes);
        if (!s->object || !read_memory(s->object, &t, NULL) || t.bytes < bytes) {
            Py_XDECREF(s->object);
            if (!PyErr_Occurred())
                no_memory();
            return -1;
        }
        s->memory = t.data;
    }
    return 0;
}

static void free_scratch(struct scratch *s)
{
    if (s->managed)
        s->managed->deleter(s->managed);
    Py_XDECREF(s->object);
}

/* use_torch(Tensor, Parameter, torch's table of C functions or None, its maker of capsules, a uint8 tensor on the CPU) -> whether it
 * takes the table */
static PyObject *use_torch(PyObject *self, PyObject *args)
{
    PyObject *tensor, *parameter, *table, *to_capsule, *bytes;
    if (!PyArg_ParseTuple(args, "OOOOO", &tensor, &parameter, &table, &to_capsule, &bytes))
        return NULL;
    torch.table = NULL;
    if (table != Py_None) {
        const struct dl_table *given = PyCapsule_GetPointer(table, "dlpack_exchange_api");
        if (!given)
            return NULL;
        if (given->major == 1 && given->allocate && given->read)
            torch.table = given;
    }
    Py_INCREF(tensor); /* never released */
    Py_INCREF(parameter);
    Py_INCREF(to_capsule);
    Py_INCREF(bytes);
    torch.tensor = (PyTypeObject *)tensor;
    torch.parameter = (PyTypeObject *)parameter;
    torch.to_capsule = to_capsule;
    torch.bytes = bytes;
    torch.new_empty = PyUnicode_InternFromString("new_empty");
    torch.untyped_storage = PyUnicode_InternFromString("untyped_storage");
    torch.is_neg = PyUnicode_InternFromString("is_neg");
    torch.is_zero = PyUnicode_InternFromString("_is_zerotensor");
    if (!torch.new_empty || !torch.untyped_storage || !torch.is_neg || !torch.is_zero)
        return NULL;
    return PyBool_FromLong(torch.table != NULL);
}
