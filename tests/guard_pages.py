"""Tensors that end where memory does: reading or writing past one kills the process (Linux)."""

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE


def at_the_edge(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy whose last byte is the last one of a page; the page behind it cannot be read.

    The tensor alone keeps the memory: a process has 65,530 mappings, and these are two.
    """
    size = max(1, -(-tensor.nbytes // PAGE)) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), PAGE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)
