"""What 4 bits are: formats, packing, scales, and the quantized tensor. Tensors only, no modules."""
