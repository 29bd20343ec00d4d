"""Fine-tuning of language models: text in, an adapter out.

It may import ``nn``, ``transforms``, ``io`` and ``training``. Begin with ``loop.py``.
"""
