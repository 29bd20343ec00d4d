"""Layers with frozen weights in 16, 8 or 4 bits, and LoRA layers."""
