/* The ISA portable: kernels in float32 for any processor. */
#include "portable.h"
#include "floats.h"

const struct isa isa_portable = FLOAT_ISA("portable");
