/* The ISA avx512: kernels in float32. */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX512)
#include "avx512.h"
#include "floats.h"

const struct isa isa_avx512 = FLOAT_ISA("avx512");
END_TARGET
#endif
