"""Memory for what is kept from forward to backward, taken in large pieces.

Tensors of a megabyte that live long, between temporary ones of the same size, leave an allocator holes that fit
nothing. Pieces that grow with what is kept have few neighbours. Before a large one makes the process larger than it
had to be so far, the C library is asked to return the holes that there are to the system (``malloc_trim`` of glibc):
they would count as resident memory. Below that mark they stay: a page that was returned costs a page fault when it is
used again.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Room", "return_holes"]

_ALIGNED = 64  # bytes, a line of a processor's cache
_PART = 8  # of what was taken so far a new piece has one part
_LARGE = 2**22  # bytes of a piece that is worth a walk over the heap


class Room:
    """Gives views of large tensors; a piece is freed with the last view of it."""

    def __init__(self) -> None:
        self._piece: Tensor | None = None
        self._used = self._total = self._last = 0

    def take(self, size: int) -> Tensor:
        """Return int8 (size,), aligned for any dtype, on the CPU."""
        if self._piece is None or self._used + size > len(self._piece):
            whole = -(-size // _ALIGNED) * _ALIGNED
            length = max(1, self._total // _PART // whole) * whole  # tensors of one size leave no rest
            return_holes(length)
            self._piece, self._used, self._total = torch.empty(length, dtype=torch.int8), 0, self._total + length
        self._last = self._used
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return self._piece[self._last : self._last + size]

    def give_back(self) -> None:
        """Let what was taken last be taken again."""
        self._used = self._last


class Heap:
    """Decides when the holes of the heap are returned.

    Args:
        trim: returns them; None: of the C library, if it has one.
        resident: gives the bytes of the process that are resident; None: of Linux.
    """

    def __init__(self, trim: Callable[[int], Any] | None = None, resident: Callable[[], int] | None = None) -> None:
        self._trim, self._resident = trim, resident or _resident
        self._highest = 0  # bytes that were resident without holes, with what was begun then

    def return_holes(self, length: int) -> None:
        """Return the holes to the system, if memory of so many bytes, large and begun now, would raise the mark."""
        trim = self._trim or _trim()
        if length < _LARGE or trim is None or self._resident() + length <= self._highest:
            return
        trim(0)
        self._highest = max(self._highest, self._resident() + length)


@cache
def _trim() -> Any:
    """Return the function of the C library, or None where it has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def _resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


return_holes = Heap().return_holes
