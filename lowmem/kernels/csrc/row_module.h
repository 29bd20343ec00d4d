/* Row-wise functions for Python. Tensors are addresses; Python has checked them. */
#pragma once
#include "isas.h"
#include "row_calls.h"
#include "threads.h"

/* rowwise(isa, enum row_function, threads, numbers, call) runs a function in parts. numbers: how many it computes; fewer threads
 * run a small call. call: the bytes of the function's struct of row_calls.h. */
static PyObject *rowwise(PyObject *self, PyObject *args)
{
    static const size_t sizes[ROW_FUNCTIONS] = {
        [NORM] = sizeof(struct norm), [GATED] = sizeof(struct gated), [ENTROPY] = sizeof(struct entropy),
        [ENCODE8] = sizeof(struct saved8), [DECODE8] = sizeof(struct saved8), [ROUND_COLUMNS] = sizeof(struct rounding),
    };
    int isa, function;
    long long threads;
    double numbers;
    struct job job = {.call = NULL};
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "iiLdy#", &isa, &function, &threads, &numbers, (const char **)&job.call, &size))
        return NULL;
    if ((size_t)size != sizes[function])
        return PyErr_Format(PyExc_ValueError, "a call has %zd bytes, and its struct %zu", size, sizes[function]);
    job.threads = threads_for(threads, numbers);
    Py_BEGIN_ALLOW_THREADS
    parallel(&job, base_of(all_isas[isa])->rows[function], PARTS, NULL, 0);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
