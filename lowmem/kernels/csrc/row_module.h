/* Row-wise functions for Python. Tensors are addresses; Python has checked them. */
#pragma once
#include "isas.h"
#include "row_calls.h"
#include "threads.h"

/* Run a function in parts, for `work` numbers. */
static PyObject *run_rows(body function, const void *call, long long threads, double work)
{
    struct job job = {.call = call, .threads = threads_for(threads, work)};
    Py_BEGIN_ALLOW_THREADS
    parallel(&job, function, PARTS, NULL, 0);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* norm(isa, threads, type, rows, columns, eps, whether the quotient is rounded first, x, factor, grad or 0, out) */
static PyObject *norm(PyObject *self, PyObject *args)
{
    int isa;
    long long threads;
    struct norm c;
    if (!PyArg_ParseTuple(args, "iLiLLfiKKKK", &isa, &threads, &c.type, &c.rows, &c.columns, &c.eps, &c.rounds_first, &c.x,
                          &c.factor, &c.grad, &c.out))
        return NULL;
    return run_rows(base_of(all_isas[isa])->norm, &c, threads, (double)c.rows * c.columns);
}

/* gated(isa, threads, type of a and b, of grad and outputs, rows, columns, step, out step, seven terms, a, b or 0, grad or 0,
 * out, out of b or 0) */
static PyObject *gated(PyObject *self, PyObject *args)
{
    int isa;
    long long threads;
    struct gated c;
    if (!PyArg_ParseTuple(args, "iLiiLLLL(fffffff)KKKKK", &isa, &threads, &c.type, &c.wide, &c.rows, &c.columns, &c.step,
                          &c.out_step, c.terms, c.terms + 1, c.terms + 2, c.terms + 3, c.terms + 4, c.terms + 5, c.terms + 6,
                          &c.a, &c.b, &c.grad, &c.out, &c.out_b))
        return NULL;
    return run_rows(base_of(all_isas[isa])->gated, &c, threads, (double)c.rows * c.columns);
}

/* entropy(isa, threads, type, whether to compute the gradient, rows, columns, smoothing, logits, targets, losses) */
static PyObject *entropy(PyObject *self, PyObject *args)
{
    int isa;
    long long threads;
    struct entropy c;
    if (!PyArg_ParseTuple(args, "iLiiLLfKKK", &isa, &threads, &c.type, &c.has_gradient, &c.rows, &c.columns, &c.smoothing,
                          &c.logits, &c.targets, &c.losses))
        return NULL;
    return run_rows(base_of(all_isas[isa])->entropy, &c, threads, (double)c.rows * c.columns);
}

/* encode8(isa, threads, type, blocks, length, numbers, codes, scales, counts) */
static PyObject *encode8(PyObject *self, PyObject *args)
{
    int isa;
    long long threads;
    struct saved8 c;
    if (!PyArg_ParseTuple(args, "iLiLLKKKK", &isa, &threads, &c.type, &c.blocks, &c.length, &c.numbers, &c.codes, &c.scales,
                          &c.counts))
        return NULL;
    return run_rows(base_of(all_isas[isa])->encode8, &c, threads, (double)c.length);
}

/* decode8(isa, threads, type, blocks, numbers, codes, scales) */
static PyObject *decode8(PyObject *self, PyObject *args)
{
    int isa;
    long long threads;
    struct saved8 c;
    if (!PyArg_ParseTuple(args, "iLiLKKK", &isa, &threads, &c.type, &c.blocks, &c.numbers, &c.codes, &c.scales))
        return NULL;
    return run_rows(base_of(all_isas[isa])->decode8, &c, threads, 32.0 * (double)c.blocks);
}

/* round_columns(isa, threads, columns, rows, whether it descends, values, approximate, levels, boundaries, pivots, matrix,
 * scales, codes) */
static PyObject *round_columns(PyObject *self, PyObject *args)
{
    int isa;
    long long threads;
    struct rounding c;
    if (!PyArg_ParseTuple(args, "iLLLiKKKKKKKK", &isa, &threads, &c.columns, &c.rows, &c.descends, &c.values, &c.approximate,
                          &c.levels, &c.boundaries, &c.pivots, &c.matrix, &c.scales, &c.codes))
        return NULL;
    return run_rows(base_of(all_isas[isa])->round_columns, &c, threads, (double)c.columns * c.rows);
}
