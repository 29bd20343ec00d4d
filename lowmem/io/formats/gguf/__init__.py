"""GGUF, the files of llama.cpp and ggml.

It may import what its parent folder may, and that. Begin with ``gguf_file.py``, then ``gguf_reader.py``.
"""
