"""Transforms of whole models: convert, merge, adapters and calibrate; and their summary.

It may import ``quant``, ``kernels`` and ``nn``. Begin with ``convert.py``.
"""
