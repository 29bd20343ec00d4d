"""Block-wise quantization to 4 and 8 bits: formats, packing, scales, the quantized tensor. No modules.

It may import none of the other folders. Begin with ``quantize_tensor.py``, then ``tensor.py`` and ``formats.py``.
"""
