"""Faster inference: recognized parts of a model, and blocks of them, are computed in few calls."""
