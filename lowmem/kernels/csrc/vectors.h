/* The vector operations of the ISA that is compiled, or portable ones where a header is read on its own. */
#pragma once

#ifndef LANES
#include "portable.h"
#endif
