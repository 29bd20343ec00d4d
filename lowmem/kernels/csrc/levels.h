/* The instruction sets that the binding knows, and those of them that this processor has. */
#ifndef LOWMEM_LEVELS_H
#define LOWMEM_LEVELS_H

#include "kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const struct level *const all_levels[] = {
    &level_portable,
#if HAS_NEON
    &level_neon,
#endif
#if defined(__x86_64__)
    &level_avx2,
    &level_avx512,
    &level_avx512vnni,
    &level_avx512bf16,
#endif
#if HAS_AMX
    &level_avx512amx,
#endif
};

#if defined(__x86_64__)
/* Whether it converts float16. Clang before 15 has no name for that in __builtin_cpu_supports. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

/* Whether the processor has AMX for bfloat16, and Linux lets this process use it: registers so large must be asked for. */
static int may_use_amx(void)
{
#if HAS_AMX
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_BF16 && d & AMX_TILE &&
           !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
    return 0;
#endif
}
#endif

/* levels() -> the names of the levels that this processor can run, the slowest first; their order is their index */
static PyObject *levels(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyObject *names = PyList_New(0);
    if (!names)
        return NULL;
    int count = 1 + HAS_NEON; /* which every 64-bit ARM processor has */
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
        count = 2; /* each of those that follow needs the one before */
        count += __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq");
        count += count == 3 && __builtin_cpu_supports("avx512vnni");
        count += count == 4 && __builtin_cpu_supports("avx512bf16");
        count += count == 5 && may_use_amx();
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

#endif
