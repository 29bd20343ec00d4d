"""The files of other programs: a file or folder for each format, which reads and writes it.

It may import what its parent folder may, and that. Begin with ``open_foreign.py``.
"""
