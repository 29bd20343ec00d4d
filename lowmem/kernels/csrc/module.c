/* The binding: Python passes addresses and sizes that lowmem/kernels/cpu.py has checked. One binary serves every
 * Python from 3.10 (the limited API) and every PyTorch (none of its headers). Threads are those of the OpenMP
 * library that torch has loaded: a second one would fight it for the cores. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#if defined(_WIN32)
#define dlopen_loaded(path) NULL
#define dlsym(handle, name) NULL
#else
#include <dlfcn.h>
#define dlopen_loaded(path) dlopen(path, RTLD_LAZY | RTLD_NOLOAD)
#endif

#include "kernel.h"

static void (*run_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);
static int (*thread_count)(void);

static void region(void *data)
{
    const struct job *job = data;
    const int64_t count = thread_count(); /* can be fewer than were asked for */
    for (int64_t t = thread_number(); t < job->threads; t += count)
        job->body(job, t, job->thread_scratch + t * job->thread_floats);
}

static void run(const struct job *job)
{
    if (job->threads > 1 && run_parallel) {
        run_parallel(region, (void *)job, (unsigned)job->threads, 0);
        return;
    }
    for (int64_t t = 0; t < job->threads; t++)
        job->body(job, t, job->thread_scratch + t * job->thread_floats);
}

static const struct level *level_of(int64_t index)
{
    static const struct level *levels[] = {
        &level_portable,
#if defined(__x86_64__)
        &level_avx2,
        &level_avx512,
#endif
    };
    return levels[index];
}

/* Put a row into the order of the words: element e of word d, nibble k, to d's group, vector k, lane d. */
static void sort_row(const struct weight *w, int lanes, const float *x, float *sorted)
{
    const int64_t size = 2 * w->half, full = w->columns / size, rest = w->columns % size;
    const int64_t words = full * w->half / 4;
    for (int64_t d = 0; d < words; d++) {
        const int64_t block = 4 * d / w->half;
        const float *low = x + block * size + (4 * d - block * w->half), *high = low + w->half;
        float *out = sorted + d / lanes * lanes * 8 + d % lanes;
        for (int b = 0; b < 4; b++) {
            out[2 * b * lanes] = low[b];
            out[(2 * b + 1) * lanes] = high[b];
        }
    }
    const int64_t half = (rest + 1) / 2;
    for (int64_t j = 0; j < half; j++) {
        const int64_t byte = full * w->half + j, d = byte / 4, b = byte % 4;
        float *out = sorted + d / lanes * lanes * 8 + d % lanes;
        out[2 * b * lanes] = x[full * size + j];
        out[(2 * b + 1) * lanes] = half + j < rest ? x[full * size + half + j] : 0.0f;
    }
}

static void unsort_row(const struct weight *w, int lanes, const float *sorted, float *x)
{
    const int64_t size = 2 * w->half, full = w->columns / size, rest = w->columns % size;
    for (int64_t byte = 0; byte < w->row_bytes; byte++) {
        const int64_t block = byte / w->half, j = byte - block * w->half;
        const int64_t half = block < full ? w->half : (rest + 1) / 2, left = block < full ? size : rest;
        const int64_t d = byte / 4, b = byte % 4;
        const float *in = sorted + d / lanes * lanes * 8 + d % lanes;
        x[block * size + j] = in[2 * b * lanes];
        if (half + j < left)
            x[block * size + half + j] = in[(2 * b + 1) * lanes];
    }
}

static void fill_tables(const struct weight *w, int lanes, int64_t groups, int32_t *lane_block, int32_t *first_block)
{
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * lanes * 4 / w->half;
        first_block[g] = (int32_t)first;
        for (int i = 0; i < lanes; i++) {
            const int64_t byte = (g * lanes + i) * 4;
            lane_block[g * lanes + i] = byte < w->row_bytes ? (int32_t)(byte / w->half - first) : 0;
        }
    }
}

enum { LEVEL_INDEX, THREADS, PACKED, SCALES, LEVELS, ENCODING, BLOCK, ROWS, COLUMNS, WEIGHT_ARGUMENTS };

static int read_numbers(PyObject *const *args, Py_ssize_t given, long long *numbers, Py_ssize_t expected)
{
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        numbers[i] = PyLong_AsLongLong(args[i]);
        if (numbers[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

static struct weight read_weight(const long long *n)
{
    const int64_t size = (int64_t)n[BLOCK], columns = (int64_t)n[COLUMNS];
    const struct weight w = {
        .packed = (const uint8_t *)(intptr_t)n[PACKED],
        .scales = (const uint8_t *)(intptr_t)n[SCALES],
        .levels = (const float *)(intptr_t)n[LEVELS],
        .rows = (int64_t)n[ROWS],
        .columns = columns,
        .row_bytes = (columns + 1) / 2,
        .blocks = (columns + size - 1) / size,
        .half = size / 2,
        .encoding = (int)n[ENCODING],
    };
    return w;
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Floats of scratch: shared by the threads, and a thread's own. */
static int64_t shared_floats(const struct weight *w, int64_t batch)
{
    if (w->encoding == HALF_FLOAT16 || w->encoding == HALF_BFLOAT16)
        return w->columns % MAX_LANES ? batch * round_up(w->columns, MAX_LANES) : 0; /* the padded input */
    const int64_t columns = round_up(2 * w->row_bytes, 8 * MAX_LANES);
    return batch * columns + columns / 4; /* the sorted input; the tables of fill_tables */
}

static int64_t thread_floats(const struct weight *w, int64_t batch)
{
    const int64_t rows = batch ? TILE_ROWS : 1; /* of scales; restoring has no batch, and takes a row at a time */
    return rows * (w->blocks + MAX_LANES) + (batch >= FEW_ROWS ? TILE_ROWS * TILE_COLUMNS : 0);
}

/* scratch(level, threads, 0, 0, 0, encoding, block, rows, columns, batch) -> bytes that linear and input_grad need */
static PyObject *scratch(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    long long n[WEIGHT_ARGUMENTS + 1];
    (void)self;
    if (read_numbers(args, given, n, WEIGHT_ARGUMENTS + 1))
        return NULL;
    const struct weight w = read_weight(n);
    const int64_t batch = (int64_t)n[WEIGHT_ARGUMENTS];
    return PyLong_FromLongLong(4LL * (shared_floats(&w, batch) + (int64_t)n[THREADS] * thread_floats(&w, batch)));
}

static PyObject *call(PyObject *const *args, Py_ssize_t given, int kind)
{
    enum { X = WEIGHT_ARGUMENTS, BIAS, OUT, BATCH, SCRATCH, ARGUMENTS };
    long long n[ARGUMENTS];
    if (read_numbers(args, given, n, ARGUMENTS))
        return NULL;
    const struct level *level = level_of((int64_t)n[LEVEL_INDEX]);
    struct job job = {
        .weight = read_weight(n),
        .x = (const float *)(intptr_t)n[X],
        .bias = (const float *)(intptr_t)n[BIAS],
        .out = (float *)(intptr_t)n[OUT],
        .batch = (int64_t)n[BATCH],
        .threads = (int64_t)n[THREADS],
    };
    const struct weight *w = &job.weight;
    float *memory = (float *)(intptr_t)n[SCRATCH];
    if (!job.weight.packed || !job.out || !memory || (kind != 2 && !job.x) ||
        (kind != 3 && (!job.weight.scales || !job.weight.levels))) {
        PyErr_SetString(PyExc_ValueError, "a tensor has no memory: its storage was freed, or it is not a real one");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    job.groups = round_up(w->row_bytes, 4 * level->lanes) / (4 * level->lanes);
    job.sorted_stride = job.groups * level->lanes * 8;
    job.sorted = memory;
    if (kind < 2) {
        int32_t *lane_block = (int32_t *)(memory + job.batch * job.sorted_stride);
        int32_t *first_block = lane_block + job.groups * level->lanes;
        fill_tables(w, level->lanes, job.groups, lane_block, first_block);
        job.lane_block = lane_block;
        job.first_block = first_block;
    }
    job.thread_scratch = memory + shared_floats(w, job.batch);
    job.thread_floats = thread_floats(w, job.batch);
    job.scale_stride = w->blocks + MAX_LANES;
    if (kind == 0) {
        job.body = level->linear;
        /* What lies beyond the row, in its last group, must be zeros: it is multiplied with real levels. */
        memset(job.sorted, 0, (size_t)(job.batch * job.sorted_stride) * sizeof(float));
        for (int64_t m = 0; m < job.batch; m++)
            sort_row(w, level->lanes, job.x + m * w->columns, job.sorted + m * job.sorted_stride);
        run(&job);
    } else if (kind == 1) {
        job.body = level->input_grad;
        run(&job);
        for (int64_t m = 0; m < job.batch; m++)
            unsort_row(w, level->lanes, job.sorted + m * job.sorted_stride, job.out + m * w->columns);
    } else if (kind == 2) {
        job.body = level->restore;
        run(&job);
    } else {
        job.body = level->half_linear;
        job.sorted_stride = round_up(w->columns, MAX_LANES);
        const int padded = job.sorted_stride != w->columns;
        if (!padded)
            job.sorted = (float *)job.x; /* read only */
        for (int64_t m = 0; m < job.batch && padded; m++) {
            float *row = job.sorted + m * job.sorted_stride;
            memcpy(row, job.x + m * w->columns, (size_t)w->columns * sizeof *row);
            memset(row + w->columns, 0, (size_t)(job.sorted_stride - w->columns) * sizeof *row);
        }
        run(&job);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return call(args, given, 0);
}

static PyObject *input_grad(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return call(args, given, 1);
}

static PyObject *restore(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return call(args, given, 2);
}

static PyObject *half_linear(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return call(args, given, 3);
}

/* levels() -> the names of the levels that this processor can run, the slowest first; their order is their index */
static PyObject *levels(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyObject *names = PyList_New(0);
    if (!names)
        return NULL;
    int count = 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        count = 2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            count = 3;
    }
#endif
    for (int i = 0; i < count; i++) {
        PyObject *name = PyUnicode_FromString(level_of(i)->name);
        if (!name || PyList_Append(names, name)) {
            Py_XDECREF(name);
            Py_DECREF(names);
            return NULL;
        }
        Py_DECREF(name);
    }
    return names;
}

/* share_threads(path) -> whether the loaded OpenMP library at `path` will run the threads */
static PyObject *share_threads(PyObject *self, PyObject *path)
{
    (void)self;
    PyObject *bytes = PyUnicode_EncodeFSDefault(path);
    if (!bytes)
        return NULL;
    void *library = dlopen_loaded(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    if (!library)
        Py_RETURN_FALSE;
    void *start = dlsym(library, "GOMP_parallel");
    void *number = dlsym(library, "omp_get_thread_num"), *count = dlsym(library, "omp_get_num_threads");
    if (!start || !number || !count)
        Py_RETURN_FALSE;
    memcpy(&run_parallel, &start, sizeof start);
    memcpy(&thread_number, &number, sizeof number);
    memcpy(&thread_count, &count, sizeof count);
    Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"levels", levels, METH_NOARGS, NULL},
    {"share_threads", share_threads, METH_O, NULL},
    {"scratch", (PyCFunction)(void (*)(void))scratch, METH_FASTCALL, NULL},
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, NULL},
    {"input_grad", (PyCFunction)(void (*)(void))input_grad, METH_FASTCALL, NULL},
    {"restore", (PyCFunction)(void (*)(void))restore, METH_FASTCALL, NULL},
    {"half_linear", (PyCFunction)(void (*)(void))half_linear, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The compiled kernel; see lowmem.kernels.cpu.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
