"""Memory and latency gates for tests. Latency needs the extra ``lowmem[testing]``."""
