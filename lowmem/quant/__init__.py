"""Block-wise quantization to 4 and 8 bits: formats, packing, scales, the quantized tensor. No modules."""
