/* The ISA avx2: kernels in float32. */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX2)
#include "avx2.h"
#include "floats.h"

const struct isa isa_avx2 = FLOAT_ISA("avx2");
END_TARGET
#endif
