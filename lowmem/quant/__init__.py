"""Block-wise 4-bit quantization: formats, packing, scales and the quantized tensor. Tensors only, no modules."""
