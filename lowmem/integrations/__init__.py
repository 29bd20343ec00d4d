"""lowmem in other libraries, each imported by who uses that library.

It may import ``quant``, ``kernels``, ``nn``, ``transforms``, ``io``, ``training`` and ``inference``. Begin with
``transformers/quantizer.py``.
"""
