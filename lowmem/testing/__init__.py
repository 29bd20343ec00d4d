"""What tests use to hold a model's memory and latency: needs the extra ``lowmem[testing]``."""
