"""Fine-tuning of language models: text in, an adapter out.

It may import ``nn``, ``transforms`` and ``io``. Begin with ``loop.py``.
"""
