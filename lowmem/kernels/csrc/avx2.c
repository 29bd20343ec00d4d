/* The ISA avx2: kernels in float32. */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX2)
#define ISA_NAME avx2
#include "avx2.h"
#include "floats.h"
END_TARGET
#endif
