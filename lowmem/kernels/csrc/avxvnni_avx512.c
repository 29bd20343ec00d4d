/* The ISA avxvnni, in the encoding of AVX-512 VNNI, for processors that have that alone: the same values from the same source. */
#include "kernel.h"
#if HAS_AVX_VNNI
TARGET(AVX512,avx512vnni)
#define add_bytes _mm256_dpbusd_epi32
#include "avxvnni.h"

const struct isa isa_avxvnni_avx512 = {.name = "avxvnni", .lanes = LANES, .extends = &isa_avx2, .kernels = kernels, .inputs8_zero = 128};
END_TARGET
#endif
