"""Codes chosen by what layers compute on sample inputs.

It may import what its parent folder may, and that. Begin with ``calibrate.py``.
"""
