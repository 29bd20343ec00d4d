/* All ISAs that were compiled, and which of them this processor has. `isas` replaces avxvnni by its other encoding where it must. */
#pragma once
#include "plan.h"
#include "tensor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const struct isa *all_isas[] = {
    &isa_portable,
#if HAS_NEON
    &isa_neon,
#endif
#if defined(__x86_64__)
    &isa_avx2,
#if HAS_AVX_VNNI
    &isa_avxvnni,
#endif
    &isa_avx512,
    &isa_avx512vnni,
    &isa_avx512bf16,
#endif
#if HAS_AMX
    &isa_avx512amx,
#endif
};

#if defined(__x86_64__)
/* Whether the processor converts float16. __builtin_cpu_supports of Clang before 15 does not know F16C. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

static int has_avx_vnni(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1 << 4;
}

/* Whether the processor has AMX for bfloat16, and Linux permits its large registers, which a process must request. */
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

/* isas() -> [(name, whether this processor runs it), ...], the slowest first. Other functions take an index into this list. */
static PyObject *isas(PyObject *self, PyObject *unused)
{
    PyObject *found = PyList_New(0);
    int count = 1 + HAS_NEON; /* every 64-bit ARM processor has NEON */
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
        count = 2; /* each further ISA but avxvnni requires the one before it */
        count += __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq");
        count += count == 3 && __builtin_cpu_supports("avx512vnni");
        count += count == 4 && __builtin_cpu_supports("avx512bf16");
        count += count == 5 && may_use_amx();
    }
#endif
    const int all = (int)(sizeof all_isas / sizeof *all_isas);
    for (int i = 0, before = 0; found && i < all; i++) {
        int runs;
#if HAS_AVX_VNNI
        if (!strcmp(all_isas[i]->name, isa_avxvnni.name)) {
            runs = count >= 4 || (count >= 2 && has_avx_vnni());
            all_isas[i] = has_avx_vnni() ? &isa_avxvnni : &isa_avxvnni_avx512;
        } else
#endif
            runs = before++ < count;
        PyObject *isa = Py_BuildValue("(sO)", all_isas[i]->name, runs ? Py_True : Py_False);
        if (!isa || PyList_Append(found, isa))
            Py_CLEAR(found);
        Py_XDECREF(isa);
    }
    return found;
}
