"""Files: atomic writes, the safetensors container, shards, metadata, checkpoints and adapters.

It may import ``quant``, ``nn`` and ``transforms``. Begin with ``checkpoint.py``.
"""
