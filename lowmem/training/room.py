"""An arena for tensors that live from forward to backward.

Long-lived tensors of about a megabyte, allocated between temporaries of the same size, fragment the heap. The arena
therefore allocates few large pieces, which grow with what it already holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.resident import return_holes

__all__ = ["Room"]

_ALIGNED = 64  # bytes: a cache line
_PART = 8  # a new piece has 1/8 of the bytes of all pieces so far


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
