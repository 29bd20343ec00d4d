/* The ISA avxvnni, in the encoding of AVX-VNNI, which processors without AVX-512 have. */
#include "kernel.h"
#if HAS_AVX_VNNI
TARGET(AVX2,avxvnni)
#define add_bytes _mm256_dpbusd_avx_epi32
#include "avxvnni.h"

const struct isa isa_avxvnni = {.name = "avxvnni", .lanes = LANES, .extends = &isa_avx2, .kernels = kernels, .inputs8_zero = 128};
END_TARGET
#endif
