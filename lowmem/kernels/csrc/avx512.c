/* The ISA avx512: kernels in float32. */
#include "kernel.h"
#if defined(__x86_64__)
TARGET(AVX512)
#define ISA_NAME avx512
#include "avx512.h"
#include "floats.h"
END_TARGET
#endif
