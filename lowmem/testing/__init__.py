"""Memory and latency gates for the user's own model: what the pytest plugin ``pytest_lowmem`` is made of."""
