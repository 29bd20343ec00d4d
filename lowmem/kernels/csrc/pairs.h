/* Products of pairs of bfloat16 numbers (bfloat16.h), where the ISA has them. */
#pragma once
#if defined(ISA_BFLOAT16)
#include "bfloat16.h"
#else /* substitutes for its names, in code that no kernel of this ISA runs */
#include "rows.h"

#define table_bf16 table_load
#define pair_levels v_lookup
#define spread_pair(p) v_set1(*(p))
#define multiply_pairs v_fma
#define pairs(even, odd) ((void)(odd), (even))
#define adjacent(words) (words)
#endif
