/* Callgrind's client requests as functions, for Python to call: they are macros of inline assembly. */
#include <valgrind/callgrind.h>

void begin(void)
{
    CALLGRIND_START_INSTRUMENTATION;
}

void zero(void)
{
    CALLGRIND_ZERO_STATS;
}

void dump(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
}
