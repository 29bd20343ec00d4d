"""Models in many processes, by PyTorch's own engine."""
