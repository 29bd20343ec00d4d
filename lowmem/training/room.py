"""An arena for tensors that live from forward to backward, and a way to return unused heap memory to the system.

Long-lived tensors of about a megabyte, allocated between temporaries of the same size, fragment the heap. The arena
therefore allocates few large pieces, which grow with what it already holds. Before a large allocation would raise the
process's resident memory above its highest value so far, ``malloc_trim`` of glibc returns free heap pages to the
system, since they would count as resident. Below that value they stay, because reusing a returned page costs a page
fault.
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

_ALIGNED = 64  # bytes: a cache line
_PART = 8  # a new piece has 1/8 of the bytes of all pieces so far
_LARGE = 2**22  # bytes: smaller allocations are not worth the time of malloc_trim


class Room:
    """The arena: hands out views of large tensors (pieces). A piece is freed with the last view of it."""

    def __init__(self) -> None:
        self._piece: Tensor | None = None
        self._used = self._total = self._last = 0

    def take(self, size: int) -> Tensor:
        """Return uninitialized int8 (size,) on the CPU, aligned for any dtype."""
        if self._piece is None or self._used + size > len(self._piece):
            whole = -(-size // _ALIGNED) * _ALIGNED
            length = max(1, self._total // _PART // whole) * whole  # a multiple: tensors of one size waste nothing
            return_holes(length)
            self._piece, self._used, self._total = torch.empty(length, dtype=torch.int8), 0, self._total + length
        self._last = self._used
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return self._piece[self._last : self._last + size]

    def give_back(self) -> None:
        """Free what the last ``take`` returned, which must not be used any more."""
        self._used = self._last


class Heap:
    """Decides when free heap pages are returned to the system.

    Args:
        trim: returns them; None: ``malloc_trim`` of the C library, if it has one.
        resident: returns the process's resident bytes; None: reads them from /proc.
    """

    def __init__(self, trim: Callable[[int], Any] | None = None, resident: Callable[[], int] | None = None) -> None:
        self._trim, self._resident = trim, resident or _resident
        self._highest = 0  # highest resident bytes so far after trimming, plus the allocation that followed

    def return_holes(self, length: int) -> None:
        """Trim the heap if an allocation of ``length`` bytes is large and would raise the highest resident memory."""
        trim = self._trim or _trim()
        if length < _LARGE or trim is None or self._resident() + length <= self._highest:
            return
        trim(0)
        self._highest = max(self._highest, self._resident() + length)


@cache
def _trim() -> Any:
    """Return ``malloc_trim`` of the C library; None where it has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def _resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


return_holes = Heap().return_holes
