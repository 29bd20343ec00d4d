"""Faster inference: recognized parts of a model, and blocks of them, are computed in few calls.

It may import ``quant``, ``kernels``, ``nn``, ``transforms`` and ``training``. Begin with ``prepare_inference.py``.
"""
