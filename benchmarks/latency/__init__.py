"""The latency gate: merge base and head, built and timed in turns in one job. See ``docs/benchmarking.md``."""
