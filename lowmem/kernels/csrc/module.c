/* The Python module. Products, dequantize and update check the memory of tensors here; other functions take addresses that Python
 * has checked. One binary works with every PyTorch: it uses none of its headers, and the threads that torch has loaded. */
#include <dlfcn.h>

#include "product.h"

/* Read a low-rank update of a product with x. Returns as read_tensor, and 0 if shapes or types do not fit. */
static int read_update(PyObject *a_given, PyObject *b_given, PyObject *scaling, const struct tensor *x, int64_t rows,
                       struct update *u, struct held *held)
{
    struct tensor a, b;
    int is = read_tensor(a_given, &a, held);
    if (is <= 0 || (is = read_tensor(b_given, &b, held)) <= 0)
        return is;
    const double factor = PyFloat_AsDouble(scaling);
    if (factor == -1.0 && PyErr_Occurred())
        return -1;
    *u = (struct update){
        .x = x->data, .a = a.data, .b = b.data, .scaling = (float)factor, .rank = a.shape[0], .rows = rows, .columns = a.shape[1],
    };
    return x->type == FLOAT32 && a.type == FLOAT32 && b.type == FLOAT32 && a.dims == 2 && has_rows(x, x->shape[0], a.shape[1]) &&
           has_shape(&b, rows, a.shape[0]) && x->shape[0] && x->shape[0] <= UPDATED && rows && a.shape[1];
}

/* Positions of the first arguments of products and of dequantize. */
enum { ISA, PREPARED_OF, PACKED, SCALES, X };

/* Compute a product, with a low-rank update (A, B, scaling) unless A is None. Returns the output, None if C cannot compute it,
 * False if the plan leaves it to torch, or NULL with a Python error. */
static PyObject *product(PyObject *const *args, enum operation operation, PyObject *bias_given, PyObject *threads_given,
                         PyObject *const *update_given)
{
    long long index, threads;
    struct weight w = {.rows = 0};
    struct update u = {.rank = 0};
    struct tensor x, out, bias = {.data = NULL};
    HELD held = {.count = 0};
    if (read_numbers(args, 1, &index, 1) || read_numbers(&threads_given, 1, &threads, 1))
        return NULL;
    const struct isa *isa = all_isas[index];
    int is = read_weight(isa, args[PREPARED_OF], args[PACKED], args[SCALES], &w, &held);
    if (is == 1 && (is = read_tensor(args[X], &x, &held)) == 1 && bias_given != Py_None)
        is = read_tensor(bias_given, &bias, &held);
    if (is < 0)
        return NULL;
    if (operation == LINEAR_INPUTS8 && is && !(w.inputs8_step > 0.0f))
        Py_RETURN_NONE;
    const int transposed = operation == INPUT_GRAD;
    const int64_t from = transposed ? w.rows : w.columns, to = transposed ? w.columns : w.rows;
    if (!is || x.type < 0 || !has_rows(&x, x.shape[0], from) || !x.shape[0] || !from || !to)
        Py_RETURN_NONE;
    if (bias_given != Py_None && (bias.type < 0 || bias.dims != 1 || bias.shape[0] != to))
        Py_RETURN_NONE;
    const int updated = update_given && update_given[0] != Py_None;
    if (updated && (is = read_update(update_given[0], update_given[1], update_given[2], &x, to, &u, &held)) < 0)
        return NULL;
    if (!is)
        Py_RETURN_NONE;
    const struct kernel *k = plan(isa, w.kind, x.shape[0], x.type, operation);
    if (!k || (w.offsets && !k->adds_offsets))
        Py_RETURN_NONE;
    if (!k->multiply)
        Py_RETURN_FALSE;
    PyObject *made = x.dims == 2 ? empty_like(args[X], x.shape[0], to) : empty_for(args[X], &x, to);
    if (!made)
        return NULL;
    int done = -1; /* new_empty made another kind of tensor */
    if (read_memory(made, &out, NULL) && out.type == x.type && has_rows(&out, x.shape[0], to)) {
        u.base = u.out = out.data;
        struct job job = {
            .weight = &w, .x = x.data, .bias = bias.data, .out = out.data, .out_step = to, .batch = x.shape[0],
            .type = x.type, .out_type = out.type, .bias_type = bias.type, .partial = out.data, /* run_in_parts replaces it */
        };
        done = run_product(isa, k, &job, updated ? &u : NULL, threads);
    }
    if (done == 1)
        return made;
    Py_DECREF(made);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

/* linear(isa, handle or None, packed or 16-bit weight, scales or None, x, bias or None, threads, A or None, B, scaling) -> see
 * product */
static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { BIAS = X + 1, THREADS, A, B, SCALING, ARGUMENTS };
    return has_count(given, ARGUMENTS) ? NULL : product(args, LINEAR, args[BIAS], args[THREADS], args + A);
}

/* linear_inputs8(isa, handle with 8-bit levels, packed, scales, x, bias or None, threads) -> see product */
static PyObject *linear_inputs8(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { BIAS = X + 1, THREADS, ARGUMENTS };
    return has_count(given, ARGUMENTS) ? NULL : product(args, LINEAR_INPUTS8, args[BIAS], args[THREADS], NULL);
}

/* input_grad(isa, handle or None, packed or 16-bit weight, scales or None, grad, threads) -> see product */
static PyObject *input_grad(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { THREADS = X + 1, ARGUMENTS };
    return has_count(given, ARGUMENTS) ? NULL : product(args, INPUT_GRAD, Py_None, args[THREADS], NULL);
}

/* dequantize(isa, handle, packed, scales, first row, first column, out, threads) -> out, or None. Columns are whole blocks. */
static PyObject *dequantize(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { ROW = SCALES + 1, COLUMN, OUT, THREADS, ARGUMENTS };
    long long index, first[2], threads;
    struct weight w = {.rows = 0};
    struct tensor out;
    HELD held = {.count = 0};
    if (has_count(given, ARGUMENTS) || read_numbers(args, 1, &index, 1) || read_numbers(args + ROW, 2, first, 2) ||
        read_numbers(args + THREADS, 1, &threads, 1))
        return NULL;
    int is = read_weight(all_isas[index], args[PREPARED_OF], args[PACKED], args[SCALES], &w, &held);
    if (is == 1)
        is = read_tensor(args[OUT], &out, &held);
    if (is < 0)
        return NULL;
    const int64_t size = 2 * w.half, end = is == 1 && out.dims == 2 ? first[1] + out.shape[1] : 0;
    if (!is || !w.half || w.offsets || out.type < 0 || out.dims != 2 || first[0] < 0 || first[0] + out.shape[0] > w.rows || first[1] < 0 ||
        first[1] % size || end > w.columns || (end % size && end < w.columns))
        Py_RETURN_NONE;
    w = rows_of(&w, first[0], out.shape[0]);
    struct job job = {
        .weight = &w, .out = out.data, .out_type = out.type, .out_step = out.shape[1], .g0 = first[1] / size,
        .g1 = (end + size - 1) / size, .threads = threads_for(threads, (double)w.rows * out.shape[1]),
    };
    Py_BEGIN_ALLOW_THREADS
    parallel(&job, base_of(all_isas[index])->dequantize, 1, NULL, 0);
    Py_END_ALLOW_THREADS
    Py_INCREF(args[OUT]);
    return args[OUT];
}

/* plan(isa, block size or 0, enum type of a 16-bit weight or CODES8, batch rows, enum type of x, enum operation) -> [(ISA,
 * kernel, least batch rows, most, why it refuses or None), ...] in the order of asking; empty if none accepts */
static PyObject *plan_of(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { ISA_AT, BLOCK, WEIGHT, ROWS, TYPE, OPERATION, ARGUMENTS };
    long long n[ARGUMENTS];
    if (read_numbers(args, given, n, ARGUMENTS))
        return NULL;
    const struct isa *isa = all_isas[n[ISA_AT]];
    PyObject *asked = PyList_New(0);
    for (const struct kernel *k = isa->kernels; asked && (k = next_kernel(&isa, k)); k++) {
        const char *why = refusal(k, kind_of(n[BLOCK] / 2, (int)n[WEIGHT]), n[ROWS], (int)n[TYPE], (enum operation)n[OPERATION]);
        PyObject *row = Py_BuildValue("(ssLLz)", isa->name, k->name, (long long)k->least, (long long)k->most, why);
        if (!row || PyList_Append(asked, row))
            Py_CLEAR(asked);
        Py_XDECREF(row);
        if (!why)
            return asked;
    }
    Py_XDECREF(asked);
    return asked ? PyList_New(0) : NULL;
}

/* update(isa, base, x, A, B, scaling, threads) -> base + scaling * (x @ A.T) @ B.T; None if C does not take the arguments */
static PyObject *update(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { BASE = 1, INPUT, A, B, SCALING, THREADS, ARGUMENTS };
    long long index, threads;
    struct tensor base, x, out;
    struct update u;
    struct scratch narrow;
    HELD held = {.count = 0};
    int is;
    if (has_count(given, ARGUMENTS) || read_numbers(args, 1, &index, 1) || read_numbers(args + THREADS, 1, &threads, 1))
        return NULL;
    if ((is = read_tensor(args[BASE], &base, &held)) == 1 && (is = read_tensor(args[INPUT], &x, &held)) == 1 && base.dims == 2)
        is = read_update(args[A], args[B], args[SCALING], &x, base.shape[1], &u, &held);
    if (is < 0)
        return NULL;
    if (!is || base.type != FLOAT32 || !has_shape(&base, x.shape[0], u.rows))
        Py_RETURN_NONE;
    PyObject *made = empty_like(args[BASE], base.shape[0], u.rows);
    if (!made)
        return NULL;
    if (!read_memory(made, &out, NULL) || take_scratch(4 * base.shape[0] * (u.rank + !u.rank), &narrow)) {
        Py_DECREF(made);
        if (PyErr_Occurred())
            return NULL;
        Py_RETURN_NONE; /* new_empty made another kind of tensor */
    }
    u.base = base.data;
    u.narrow = narrow.memory;
    u.out = out.data;
    struct job job = {
        .update = &u, .batch = base.shape[0],
        .threads = threads_for(threads, (double)u.rank * (u.rows + u.columns) * base.shape[0]),
    };
    Py_BEGIN_ALLOW_THREADS
    run_update(all_isas[index], &job);
    Py_END_ALLOW_THREADS
    free_scratch(&narrow);
    return made;
}

/* quantize(isa, x, enum type of x, packed, scales, levels or 0 for 8 bits, encoding, block_size, rows, columns, boundaries,
 * candidates, number of candidates, importance, bits of the largest scale and of the largest level, divisor of 8-bit codes, zero
 * code, whether scales are signed, squares, threads) -> whether the scales can hold every weight. Tensors are addresses;
 * importance may be 0. */
static PyObject *quantize(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { ISA, X, TYPE, PACKED, SCALES, LEVELS, ENCODING, BLOCK, ROWS, COLUMNS, BOUNDARIES, CANDIDATES, TRIED, IMPORTANCE, LARGEST, TOP,
           DIVISOR, ZERO, SIGN, SQUARES, THREADS, ARGUMENTS };
    long long n[ARGUMENTS];
    if (read_numbers(args, given, n, ARGUMENTS))
        return NULL;
    struct weight w = weight_of(ADDRESS(n[PACKED]), ADDRESS(n[SCALES]), ADDRESS(n[LEVELS]), (int)n[ENCODING], n[BLOCK], n[ROWS],
                                n[COLUMNS]);
    w.divisor = (float)n[DIVISOR];
    struct quantizing q = {
        .weight = &w, .x = ADDRESS(n[X]), .type = (int)n[TYPE], .boundaries = ADDRESS(n[BOUNDARIES]),
        .candidates = ADDRESS(n[CANDIDATES]), .importance = ADDRESS(n[IMPORTANCE]), .tried = n[TRIED],
        .largest = float_of((uint32_t)n[LARGEST]), .top = float_of((uint32_t)n[TOP]), .zero = (int)n[ZERO], .has_sign = (int)n[SIGN],
        .squares = ADDRESS(n[SQUARES]),
        .own = 4 * (round_up(w.blocks, MAX_LANES) + (n[TYPE] == FLOAT32 ? 0 : round_up(w.columns, MAX_LANES))) +
               round_up(2 * w.half + 1, MAX_LANES),
    };
    struct job job = {
        .call = &q, .threads = threads_for(n[THREADS], (double)w.rows * w.columns * (1 + n[TRIED])),
    };
    struct scratch scratch;
    if (!q.x || !w.packed || !w.scales || !q.squares)
        return no_memory();
    if (take_scratch(job.threads * q.own, &scratch))
        return NULL;
    q.scratch = (uint8_t *)scratch.memory;
    Py_BEGIN_ALLOW_THREADS
    parallel(&job, base_of(all_isas[n[ISA]])->quantize, PARTS, NULL, 0);
    Py_END_ALLOW_THREADS
    free_scratch(&scratch);
    return PyBool_FromLong(!q.failed);
}

/* The struct of a function of a sequence, by its size, or 0 for PRODUCTS. */
static size_t size_of(int64_t function)
{
    static const size_t sizes[ROW_FUNCTIONS] = {
        [NORM] = sizeof(struct norm), [GATED] = sizeof(struct gated), [ENTROPY] = sizeof(struct entropy),
        [ENCODE8] = sizeof(struct saved8), [DECODE8] = sizeof(struct saved8), [ROUND_COLUMNS] = sizeof(struct rounding),
        [ATTENTION] = sizeof(struct attention), [ENCODE_STATES] = sizeof(struct coding), [ADD] = sizeof(struct adding),
        [ROTATE] = sizeof(struct rotation), [COMPARE] = sizeof(struct comparing),
        [DENSE_PRODUCT] = sizeof(struct dense_product),
    };
    return function == PRODUCTS ? sizeof(struct products) : function >= 0 && function < ROW_FUNCTIONS ? sizes[function] : 0;
}

/* Make the jobs of products, whose kernels are in `jobs`. Returns 0 if a weight is not what the call expects, or C does not multiply
 * it. */
static int read_products(const struct isa *isa, const struct products *call, const struct weight *weights, int64_t known,
                         struct job *jobs)
{
    if (call->count < 1 || call->count > MOST_TOGETHER || call->first < 0 || call->first + call->count > known)
        return 0;
    for (int64_t i = 0; i < call->count; i++) {
        const struct weight *w = weights + call->first + i;
        const int in_integers = call->each[i].in_integers != 0;
        const struct kernel *k = plan(isa, w->kind, call->batch, (int)call->type, in_integers ? LINEAR_INPUTS8 : LINEAR);
        if ((in_integers && !(w->inputs8_step > 0.0f)) || w->columns != call->columns || w->rows != call->each[i].rows || !k || !k->multiply || (w->offsets && !k->adds_offsets))
            return 0;
        jobs[i] = (struct job){
            .weight = w, .x = call->x, .bias = call->each[i].bias, .out = call->each[i].out, .out_step = w->rows,
            .batch = call->batch, .type = (int)call->type, .out_type = (int)call->type,
            .bias_type = (int)call->each[i].bias_type, .partial = call->each[i].out, .kernel = k,
        };
    }
    return 1;
}

/* Run products of one input, in one region of threads where that is possible. Returns 1, 0 if one of them refuses what it reads, -1
 * with a Python error. */
static int run_products(const struct isa *isa, struct job *jobs, int64_t count, long long threads)
{
    if (count > 1 && can_run_together(jobs, count))
        return run_together(isa, jobs, count, threads);
    int done = 1;
    for (int64_t i = 0; i < count && done == 1; i++)
        done = run_product(isa, jobs[i].kernel, jobs + i, NULL, threads);
    return done;
}

/* Run a row-wise function in parts. numbers: how many it computes; fewer threads run a small call. Returns 0, or -1 with a Python
 * error. */
static int run_rows(const struct isa *isa, int64_t function, void *call, long long threads, double numbers)
{
    struct job job = {.call = call, .threads = threads_for(threads, numbers), .piece = QUERIES};
    struct scratch scratch = {0};
    if (function == ATTENTION) {
        const struct attention *a = call;
        const int64_t rows = a->batch * a->heads * a->shared * a->queries;
        if (job.threads > 1) /* two chunks a thread */
            job.piece = smaller(QUERIES, (rows + 2 * job.threads - 1) / (2 * job.threads));
        job.own_floats = QUERIES * (round_up(a->width, MAX_LANES) + round_up(a->value_width, MAX_LANES));
        if (take_scratch(4 * job.threads * job.own_floats, &scratch))
            return -1;
        job.own = scratch.memory;
    }
    Py_BEGIN_ALLOW_THREADS
    parallel(&job, base_of(isa)->rows[function], PARTS, NULL, 0);
    Py_END_ALLOW_THREADS
    free_scratch(&scratch);
    return 0;
}

/* sequence(isa, threads, (handle, packed, scales) of each weight in one tuple, calls) -> whether it ran. It runs row-wise
 * functions and products one after another. calls: for each an int64 enum row_function or PRODUCTS, an int64 of how many numbers it
 * computes, and its struct of row_calls.h. False, before anything is computed: a weight has another shape or place than before, or C
 * does not multiply it; or, after earlier calls: 8-bit integers cannot represent the input of a product. */
static PyObject *sequence(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { ISA, THREADS, WEIGHTS, CALLS, ARGUMENTS };
    long long n[2];
    char *calls;
    Py_ssize_t size;
    struct weight weights[MOST_WEIGHTS];
    struct job jobs[MOST_TOGETHER];
    HELD held = {.count = 0};
    if (has_count(given, ARGUMENTS) || read_numbers(args, 2, n, 2) || PyBytes_AsStringAndSize(args[CALLS], &calls, &size))
        return NULL;
    const struct isa *isa = all_isas[n[ISA]];
    const Py_ssize_t known = PyTuple_Size(args[WEIGHTS]) / 3;
    if (known < 0 || known > MOST_WEIGHTS)
        return known < 0 ? NULL : PyErr_Format(PyExc_ValueError, "a sequence has %zd weights, and at most %d", known, MOST_WEIGHTS);
    for (Py_ssize_t i = 0; i < known; i++) {
        PyObject *const parts[] = {PyTuple_GetItem(args[WEIGHTS], 3 * i), PyTuple_GetItem(args[WEIGHTS], 3 * i + 1),
                                   PyTuple_GetItem(args[WEIGHTS], 3 * i + 2)};
        const int is = read_weight(isa, parts[0], parts[1], parts[2], weights + i, &held);
        if (is < 0)
            return NULL;
        if (!is)
            Py_RETURN_FALSE;
    }
    for (int runs = 0; runs < 2; runs++) /* check all calls, then run them */
        for (Py_ssize_t at = 0; at < size;) {
            int64_t head[2];
            if (size - at < (Py_ssize_t)sizeof head)
                return PyErr_Format(PyExc_ValueError, "%zd bytes are left, and a call has more", size - at);
            memcpy(head, calls + at, sizeof head);
            const size_t bytes = size_of(head[0]);
            void *call = calls + at + sizeof head;
            at += (Py_ssize_t)(sizeof head + bytes);
            if (!bytes || at > size)
                return PyErr_Format(PyExc_ValueError, "no call of function %lld ends at byte %zd", (long long)head[0], at);
            if (head[0] == PRODUCTS) {
                struct products *const products = call;
                if (!read_products(isa, products, weights, known, jobs)) {
                    if (runs)
                        return no_memory(); /* cannot be: it was checked */
                    Py_RETURN_FALSE;
                }
                const int done = runs ? run_products(isa, jobs, products->count, n[THREADS]) : 1;
                if (done < 0)
                    return NULL;
                if (!done)
                    Py_RETURN_FALSE;
            } else if (runs && run_rows(isa, head[0], call, n[THREADS], (double)head[1]))
                return NULL;
        }
    Py_RETURN_TRUE;
}

/* rowwise(isa, enum row_function, threads, numbers, call): see run_rows. call: the bytes of the function's struct of row_calls.h. */
static PyObject *rowwise(PyObject *self, PyObject *args)
{
    int isa, function;
    long long threads;
    double numbers;
    char *call;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "iiLdy#", &isa, &function, &threads, &numbers, (const char **)&call, &size))
        return NULL;
    if ((size_t)size != size_of(function))
        return PyErr_Format(PyExc_ValueError, "a call has %zd bytes, and its struct %zu", size, size_of(function));
    if (run_rows(all_isas[isa], function, call, threads, numbers))
        return NULL;
    Py_RETURN_NONE;
}

/* share_threads(path) -> whether threads are now those of the OpenMP library at `path`, if it is loaded already */
static PyObject *share_threads(PyObject *self, PyObject *path)
{
    PyObject *bytes = PyUnicode_EncodeFSDefault(path);
    if (!bytes)
        return NULL;
    void *library = dlopen(PyBytes_AsString(bytes), RTLD_LAZY | RTLD_NOLOAD);
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

/* limit_threads(most, fewer) -> the most threads of a call before. fewer: whether calls use fewer beside other processes */
static PyObject *limit_threads(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    long long n[2];
    if (read_numbers(args, given, n, 2))
        return NULL;
    const int64_t before = cpus;
    cpus = n[0];
    crowd.ignored = !n[1];
    return PyLong_FromLongLong(before);
}

/* learned(threads, took, alone, end, time) -> threads_at(time) after learn(...), or after forgetting (0 threads). For tests */
static PyObject *learned(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    enum { OF, TOOK, ALONE, END, TIME, ARGUMENTS };
    long long n[ARGUMENTS];
    if (read_numbers(args, given, n, ARGUMENTS))
        return NULL;
    if (n[OF])
        learn(n[OF], n[TOOK], n[ALONE], n[END]);
    else
        crowd.until = crowd.pause = crowd.balance = 0;
    return PyLong_FromLongLong(threads_at(n[TIME], n[OF]));
}

/* visited() -> columns of x that packing has visited so far */
static PyObject *visited(PyObject *self, PyObject *unused)
{
    return PyLong_FromLongLong(__atomic_load_n(&visited_columns, __ATOMIC_RELAXED));
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, NULL},
    {"visited", visited, METH_NOARGS, NULL},
    {"share_threads", share_threads, METH_O, NULL},
    FAST(limit_threads),
    FAST(learned),
    {"use_torch", use_torch, METH_VARARGS, NULL},
    FAST(order),
    FAST(prepare),
    FAST(linear),
    FAST(linear_inputs8),
    FAST(sequence),
    FAST(input_grad),
    FAST(dequantize),
    {"plan", (PyCFunction)(void (*)(void))plan_of, METH_FASTCALL, NULL},
    FAST(quantize),
    FAST(update),
    {"rowwise", rowwise, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "The compiled kernel; see lowmem.kernels.cpu.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModule_Create(&definition);
}
