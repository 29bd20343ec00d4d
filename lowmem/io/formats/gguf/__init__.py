"""GGUF, the files of llama.cpp and ggml."""
