/* The ISA portable. */
#include "portable.h"
#include "floats.h"

const struct isa isa_portable = FLOAT_ISA("portable");
