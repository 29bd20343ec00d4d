"""Layers with frozen weights in 16, 8 or 4 bits, and LoRA layers.

It may import ``quant`` and ``kernels``. Begin with ``linear.py``, then ``stored_tensor.py``.
"""
