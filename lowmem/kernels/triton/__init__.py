"""Kernels in Triton for stored weights, and their launches. ``lowmem.kernels.gpu`` imports them when a GPU computes."""
