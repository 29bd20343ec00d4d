"""Folders of adapters that PEFT writes and loads.

It may import what its parent folder may, and that. Begin with ``peft_reader.py``.
"""
