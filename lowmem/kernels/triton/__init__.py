"""Kernels in Triton for stored weights. ``lowmem.kernels.gpu`` imports ``launch`` when a tensor is on a GPU.

It may import what its parent folder may, and that. Begin with ``launch.py``.
"""
