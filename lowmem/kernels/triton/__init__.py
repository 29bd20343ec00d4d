"""Kernels in Triton for stored weights. ``lowmem.kernels.gpu`` imports ``launch`` when a tensor is on a GPU."""
