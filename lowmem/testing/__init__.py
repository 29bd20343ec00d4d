"""Memory and latency gates for tests; latency needs the extra ``lowmem[testing]``.

It may import ``kernels``, ``nn``, ``transforms`` and ``io``. Begin with ``memory_gates.py``.
"""
