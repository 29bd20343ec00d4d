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

#include "order.h"

#define GRAIN 65536 /* multiplications that are worth a thread */

static void (*run_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);

struct region {
    const struct job *job;
    body run;
    int64_t next;
};

static void region_body(void *data)
{
    struct region *region = data;
    const int64_t thread = thread_number();
    for (int64_t part; (part = __atomic_fetch_add(&region->next, 1, __ATOMIC_RELAXED)) < region->job->parts;)
        region->run(region->job, part, thread);
}

void parallel(struct job *job, int64_t parts, body run)
{
    struct region region = {job, run, 0};
    job->parts = job->threads > 1 ? parts * job->threads : 1;
    if (job->threads > 1 && run_parallel) {
        run_parallel(region_body, &region, (unsigned)job->threads, 0);
        return;
    }
    for (int64_t part = 0; part < job->parts; part++)
        run(job, part, 0);
}

static int64_t threads_for(long long most, double work)
{
    const double worth = 1.0 + work / GRAIN;
    return worth < (double)most ? (int64_t)worth : (int64_t)most;
}

static const struct level *const all_levels[] = {
    &level_portable,
#if defined(__x86_64__)
    &level_avx2,
    &level_avx512,
    &level_avx512bf16,
#endif
};

/* A weight that has been prepared: what Python holds as a capsule. */
struct prepared {
    struct weight weight;
    const struct level *level;
    PyObject *order;
};

#define PREPARED "lowmem.prepared"
#define ORDER "lowmem.order"

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

#define ADDRESS(n) ((void *)(intptr_t)(n))

static void free_order(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, ORDER)); }

/* order(level, columns, block_size) -> capsule */
static PyObject *order(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    long long n[3];
    (void)self;
    if (read_numbers(args, given, n, 3))
        return NULL;
    struct order *made = make_order(all_levels[n[0]]->lanes, n[1], n[2]);
    return made ? PyCapsule_New(made, ORDER, free_order) : PyErr_NoMemory();
}

static void free_prepared(PyObject *capsule)
{
    struct prepared *prepared = PyCapsule_GetPointer(capsule, PREPARED);
    Py_XDECREF(prepared->order);
    free(prepared);
}

static struct weight read_weight(const long long *n)
{
    enum { PACKED, SCALES, LEVELS, ENCODING, BLOCK, ROWS, COLUMNS };
    const int64_t size = n[BLOCK], columns = n[COLUMNS];
    const struct weight w = {
        .packed = ADDRESS(n[PACKED]),
        .scales = ADDRESS(n[SCALES]),
        .levels = ADDRESS(n[LEVELS]),
        .rows = n[ROWS],
        .columns = columns,
        .row_bytes = (columns + 1) / 2,
        .blocks = size ? (columns + size - 1) / size : 0,
        .half = size / 2,
        .stride = round_up(columns + columns % 2, MAX_GROUP),
        .encoding = (int)n[ENCODING],
    };
    return w;
}

#define GRID_MOST 31 /* of steps, so that sums of them stay below 2^31 */

/* Whether the levels lie on a grid that has a zero, as far as float32 can tell. */
static void find_grid(struct weight *w)
{
    const float *levels = w->levels, wide = levels[15] - levels[0];
    float least = wide;
    for (int c = 1; c < 16; c++)
        if (levels[c] > levels[c - 1])
            least = fminf(least, levels[c] - levels[c - 1]);
    float points = rintf(wide / least), step = wide / points; /* the widest distance says best how long a step is */
    if (fabsf(levels[0] / step - rintf(levels[0] / step)) > 0.25f) /* zero lies between two points */
        points *= 2.0f, step = wide / points;
    const float base = rintf(levels[0] / step);
    if (!(points >= 1.0f && points <= GRID_MOST && fabsf(base) <= GRID_MOST && fabsf(base + points) <= GRID_MOST))
        return;
    for (int c = 0; c < 16; c++) {
        const float at = rintf(levels[c] / step);
        if (!(fabsf(at * step - levels[c]) <= wide * 0x1p-24f))
            return;
        w->steps[c] = (uint8_t)(at - base);
    }
    w->base = (int)base;
    w->step = step;
}

/* prepare(order or None, level, packed, scales, levels, encoding, block_size, rows, columns) -> capsule */
static PyObject *prepare(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    long long n[8];
    (void)self;
    if (read_numbers(args + 1, given - 1, n, 8))
        return NULL;
    struct prepared *prepared = malloc(sizeof *prepared);
    if (!prepared)
        return PyErr_NoMemory();
    prepared->level = all_levels[n[0]];
    prepared->weight = read_weight(n + 1);
    if (args[0] != Py_None)
        find_grid(&prepared->weight);
    prepared->order = NULL;
    PyObject *capsule = PyCapsule_New(prepared, PREPARED, free_prepared);
    if (!capsule) {
        free(prepared);
        return NULL;
    }
    if (args[0] != Py_None) {
        prepared->weight.order = PyCapsule_GetPointer(args[0], ORDER);
        if (!prepared->weight.order) {
            Py_DECREF(capsule);
            return NULL;
        }
        Py_INCREF(args[0]);
        prepared->order = args[0];
    }
    return capsule;
}

/* How a product's scratch is laid out, in floats: what the threads share, then what each has of its own. */
struct layout {
    int64_t threads, shared, own;
};

static struct layout layout_of(const struct weight *w, int64_t batch, long long threads, int transposed, int low)
{
    const int few = batch <= FEW, bytes = low && !few && !transposed ? 2 : 4; /* of a packed number */
    const int64_t width = transposed ? w->stride : packed_width(w), piece = piece_of(batch, width * bytes);
    const struct layout layout = {
        .threads = threads_for(threads, (double)w->rows * w->columns * batch),
        .shared = piece * width * bytes / 4,
        .own = transposed ? GRAD_ROWS * (TILE_SCALES + MAX_GROUP + piece)
               : few      ? 0
                          : SUMS_AT + MAX_LANES * piece,
    };
    return layout;
}

static PyObject *no_memory(void)
{
    PyErr_SetString(PyExc_ValueError, "a tensor has no memory: its storage was freed, or it is not a real one");
    return NULL;
}

/* Whether products with an input of a type are taken in bfloat16. */
static int is_low(const struct prepared *prepared, long long type)
{
    return prepared->level->low && prepared->weight.order && type == BFLOAT16;
}

/* scratch(prepared, batch, threads, transposed, type of x) -> bytes that linear, or input_grad, needs */
static PyObject *scratch(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    long long n[4];
    (void)self;
    if (read_numbers(args + 1, given - 1, n, 4))
        return NULL;
    const struct prepared *prepared = PyCapsule_GetPointer(args[0], PREPARED);
    if (!prepared)
        return NULL;
    const struct layout layout = layout_of(&prepared->weight, n[0], n[1], n[2] != 0, is_low(prepared, n[3]));
    return PyLong_FromLongLong(4 * (layout.shared + layout.threads * layout.own));
}

static PyObject *product(PyObject *const *args, Py_ssize_t given, int transposed)
{
    enum { X, BIAS, BIAS_TYPE, OUT, SCRATCH, BATCH, THREADS, TYPE, OUT_TYPE, ARGUMENTS };
    long long n[ARGUMENTS];
    if (read_numbers(args + 1, given - 1, n, ARGUMENTS))
        return NULL;
    const struct prepared *prepared = PyCapsule_GetPointer(args[0], PREPARED);
    if (!prepared)
        return NULL;
    const struct weight *w = &prepared->weight;
    if (!w->packed || !n[X] || !n[OUT] || !n[SCRATCH] || (w->order && !w->scales))
        return no_memory();
    const int low = is_low(prepared, n[TYPE]);
    const struct layout layout = layout_of(w, n[BATCH], n[THREADS], transposed, low);
    float *memory = ADDRESS(n[SCRATCH]);
    struct job job = {
        .weight = w,
        .x = ADDRESS(n[X]),
        .bias = ADDRESS(n[BIAS]),
        .out = ADDRESS(n[OUT]),
        .type = (int)n[TYPE],
        .out_type = (int)n[OUT_TYPE],
        .bias_type = (int)n[BIAS_TYPE],
        .low = low,
        .batch = n[BATCH],
        .threads = layout.threads,
        .packed = memory,
        .own = memory + layout.shared,
        .own_floats = layout.own,
    };
    Py_BEGIN_ALLOW_THREADS
    (transposed ? prepared->level->input_grad : prepared->level->linear)(&job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* linear(prepared, x, bias, type of the bias, out, scratch, batch, threads, type of x, type of out) */
static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return product(args, given, 0);
}

/* input_grad(prepared, grad, 0, 0, out, scratch, batch, threads, type of grad, type of out) */
static PyObject *input_grad(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return product(args, given, 1);
}

/* restore(prepared, first row, rows, out, threads, type) */
static PyObject *restore(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { FIRST, ROWS, OUT, THREADS, TYPE, ARGUMENTS };
    long long n[ARGUMENTS];
    (void)self;
    if (read_numbers(args + 1, given - 1, n, ARGUMENTS))
        return NULL;
    const struct prepared *prepared = PyCapsule_GetPointer(args[0], PREPARED);
    if (!prepared)
        return NULL;
    struct weight w = prepared->weight;
    if (!w.packed || !w.scales || !n[OUT])
        return no_memory();
    w.packed += n[FIRST] * w.row_bytes;
    w.scales += n[FIRST] * scale_bytes(&w);
    w.rows = n[ROWS];
    struct job job = {
        .weight = &w, .out = ADDRESS(n[OUT]), .out_type = (int)n[TYPE], .threads = threads_for(n[THREADS], (double)w.rows * w.columns),
    };
    Py_BEGIN_ALLOW_THREADS
    prepared->level->restore(&job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* update(level, x, A, B, base, narrow, out, batch, rank, rows, columns, threads, scaling) */
static PyObject *update(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { LEVEL_INDEX, X, A, B, BASE, NARROW, OUT, BATCH, RANK, ROWS, COLUMNS, THREADS, NUMBERS };
    long long n[NUMBERS];
    (void)self;
    if (read_numbers(args, given - 1, n, NUMBERS))
        return NULL;
    const double scaling = PyFloat_AsDouble(args[NUMBERS]);
    if (scaling == -1.0 && PyErr_Occurred())
        return NULL;
    const struct update u = {
        .x = ADDRESS(n[X]), .a = ADDRESS(n[A]), .b = ADDRESS(n[B]), .base = ADDRESS(n[BASE]), .narrow = ADDRESS(n[NARROW]),
        .out = ADDRESS(n[OUT]), .scaling = (float)scaling, .rank = n[RANK], .rows = n[ROWS], .columns = n[COLUMNS],
    };
    struct job job = {
        .update = &u, .batch = n[BATCH],
        .threads = threads_for(n[THREADS], (double)u.rank * (u.rows + u.columns) * n[BATCH]),
    };
    if (!u.x || !u.a || !u.b || !u.base || !u.narrow || !u.out)
        return no_memory();
    Py_BEGIN_ALLOW_THREADS
    all_levels[n[LEVEL_INDEX]]->update(&job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static void quantize_body(const struct job *job, int64_t part, int64_t thread)
{
    struct quantizing *q = job->quantizing;
    int64_t from, to;
    share(q->weight->rows, 1, job->parts, part, &from, &to);
    if (!q->level->quantize(q, from, to, q->scratch + thread * q->own))
        q->failed = 1;
}

/* quantize(level, x, packed, scales, levels, encoding, block_size, rows, columns, boundaries, candidates, number of
 * candidates, importance, bits of the largest magnitude, zero code, whether a scale has a sign, scratch, threads)
 * -> whether the scales can hold every weight */
static PyObject *quantize(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { LEVEL_INDEX, X, WEIGHT, BOUNDARIES = WEIGHT + 7, CANDIDATES, TRIED, IMPORTANCE, LARGEST, ZERO, SIGN, SCRATCH, THREADS,
           ARGUMENTS };
    long long n[ARGUMENTS];
    (void)self;
    if (read_numbers(args, given, n, ARGUMENTS))
        return NULL;
    const struct weight w = read_weight(n + WEIGHT);
    struct quantizing q = {
        .weight = &w,
        .level = all_levels[n[LEVEL_INDEX]],
        .x = ADDRESS(n[X]),
        .boundaries = ADDRESS(n[BOUNDARIES]),
        .candidates = ADDRESS(n[CANDIDATES]),
        .importance = ADDRESS(n[IMPORTANCE]),
        .tried = n[TRIED],
        .largest = float_of((uint32_t)n[LARGEST]),
        .zero = (int)n[ZERO],
        .has_sign = (int)n[SIGN],
        .packed = (uint8_t *)w.packed,
        .scales = (uint8_t *)w.scales,
        .scratch = ADDRESS(n[SCRATCH]),
        .own = 4 * round_up(w.blocks, MAX_LANES) + round_up(2 * w.half + 1, MAX_LANES),
        .scale_bytes = scale_bytes(&w),
    };
    struct job job = {
        .weight = &w, .threads = threads_for(n[THREADS], (double)w.rows * w.columns * (1 + n[TRIED])), .quantizing = &q,
    };
    if (!q.x || !q.packed || !q.scales || !q.scratch)
        return no_memory();
    Py_BEGIN_ALLOW_THREADS
    parallel(&job, 1, quantize_body);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(!q.failed);
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
            count = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? 4 : 3;
    }
#endif
    for (int i = 0; i < count; i++) {
        PyObject *name = PyUnicode_FromString(all_levels[i]->name);
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
    void *number = dlsym(library, "omp_get_thread_num");
    if (!start || !number)
        Py_RETURN_FALSE;
    memcpy(&run_parallel, &start, sizeof start);
    memcpy(&thread_number, &number, sizeof number);
    Py_RETURN_TRUE;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    {"levels", levels, METH_NOARGS, NULL},
    {"share_threads", share_threads, METH_O, NULL},
    FAST(order),
    FAST(prepare),
    FAST(scratch),
    FAST(linear),
    FAST(input_grad),
    FAST(restore),
    FAST(quantize),
    FAST(update),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The compiled kernel; see lowmem.kernels.cpu.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "WIDE", WIDE)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
