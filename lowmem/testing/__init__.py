"""What tests use to hold a model's memory and latency: latency needs the extra ``lowmem[testing]``."""
