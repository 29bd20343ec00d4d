"""Models in many processes, by PyTorch's own engine.

It may import ``kernels``, ``nn``, ``transforms``, ``io`` and ``finetuning``. Begin with ``shard.py``.
"""
