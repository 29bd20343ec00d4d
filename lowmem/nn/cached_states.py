"""Keys and values of attention that are kept between calls, as rows of larger tensors, exactly or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lowmem.kernels.attention import decoded
from lowmem.quant.backend import HeadStates, backend_of

_LEAST = 32  # rows by which the room for rows grows, at least
_SCALE = 4  # bytes of a row's scale, a float32 behind its codes


def room_rows(tokens: int, window: int | None = None) -> int:
    """Return the rows for which there is room after so many tokens: up to an eighth more, and no more than one step
    beyond a window. Neither depends on how many tokens came at a time."""
    step = max(_LEAST, (1 << tokens.bit_length()) // 16)
    rows = -(-tokens // step) * step
    return rows if window is None else min(rows, room_rows(room_rows(window) + 1))


class CachedStates:
    """Keeps the keys, or the values, of one attention layer between calls; a token is added without copying others.

    ``keys.append(k)`` returns what attention reads: ``lowmem.scaled_dot_product_attention``, or any other. With
    ``bits=8`` a row, which is a token's key or value of one head, is a signed byte for each number and a float32
    scale: ``scale = max |x| / 127``, ``x ~ code * scale``. The first call returns its exact states, and later calls
    return the rounded ones of all tokens. Gradients are not kept: the class is for inference.

    Args:
        bits: 8; None keeps numbers in their dtype.
        window: the tokens that a query sees, itself included; older ones are forgotten. None: all.

    Attributes:
        length: tokens so far, which is the position of the next one.
        rows: (batch, heads, rows, width); in 8 bits int8 (batch, heads, rows, bytes of codes and scale). None before
            the first call.

    Raises:
        ValueError: other ``bits``, or a window below 1.
    """

    def __init__(self, bits: int | None = None, window: int | None = None) -> None:
        if bits not in (None, 8):
            raise ValueError(f"bits={bits!r} must be 8, or None to keep keys and values as they are")
        if window is not None and window < 1:
            raise ValueError(f"window={window!r} must be at least 1, or None to keep all tokens")
        self.bits, self.window = bits, window
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.length = 0
        self.rows: Tensor | None = None
        self._room: Tensor | None = None
        self._width, self._dtype = 0, torch.float32  # of the states

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, with the room for the next tokens."""
        return 0 if self._room is None else self._room.nbytes

    @property
    def states(self) -> Tensor | None:
        """What attention reads of the kept tokens, without new ones; None before the first call."""
        if self.rows is None or self.bits is None:
            return self.rows
        return EightBitStates(self.rows, self._width, self._dtype)

    @states.setter
    def states(self, states: Tensor | None) -> None:
        """Keep other states in place of these, such as some of them."""
        self.rows = states.rows if isinstance(states, EightBitStates) else None
        if self.rows is None and states is not None:
            self.rows = states if self.bits is None else self._written(states, 0)

    def append(self, states: Tensor, forget: bool = True) -> Tensor:
        """Add the states of new tokens; return those that attention reads, the new ones last.

        Args:
            states: floating point (batch, heads, new, width). Batch, heads and width are those of the first call.
            forget: keep no more than the window. With False, older tokens stay until a later call.

        Raises:
            ValueError: another batch, heads or width.
        """
        batch, heads, new, width = states.shape
        if self.rows is not None and (*self.rows.shape[:2], self.rows.shape[3]) != (batch, heads, self._row(width)):
            raise ValueError(
                f"states of shape {tuple(states.shape)} do not continue {tuple(self.rows.shape[:2])} sequences and "
                "heads, or their width: clear() begins anew"
            )
        count = 0 if self.rows is None else self.rows.shape[2]
        rows = self._written(states.detach(), count)  # (batch, heads, count + new, ...)
        self.rows, self.length = rows, self.length + new
        self._width, self._dtype = width, states.dtype
        if forget and self.window is not None:
            self._forget(self.window)
        if not count:
            return states
        seen = rows if self.window is None else rows[:, :, -(self.window - 1 + new) :]
        return seen if self.bits is None else EightBitStates(seen, width, states.dtype)

    def crop(self, tokens: int) -> None:
        """Remove the last tokens, as those that a check of a draft refused.

        Raises:
            ValueError: there is a window, whose older tokens are forgotten; or there are fewer tokens.
        """
        if self.window is not None or not 0 <= tokens <= self.length:
            raise ValueError(f"tokens={tokens} cannot be removed of {self.length} with window={self.window}")
        self.length -= tokens
        self.rows = None if self.rows is None else self.rows[:, :, : self.length]

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences of these indices, int64 (sequences,), in their order: those of a step's beams."""
        if self.rows is not None:
            self.rows = self.rows.index_select(0, sequences)

    def _row(self, width: int) -> int:
        """Return the numbers of a row."""
        return width if self.bits is None else -(-width // _SCALE) * _SCALE + _SCALE

    def _written(self, states: Tensor, count: int) -> Tensor:
        """Write states behind the ``count`` kept rows; return all of them."""
        batch, heads, new, width = states.shape
        total, room, start = count + new, self._room, self._start(count + new)
        if room is None or start is None:
            rows = max(room_rows(total), room_rows(self.length + new, self.window))
            dtype = states.dtype if self.bits is None else torch.int8
            empty = states.new_empty(batch, heads, rows, self._row(width), dtype=dtype)
            room, start = self._moved(empty, self.rows), 0
        into = room[:, :, start + count : start + total]
        if self.bits is None:
            into.copy_(states)
        else:
            backend_of(states).encode_states(states, _split(into, width))
        return room[:, :, start : start + total]

    def _moved(self, room: Tensor, rows: Tensor | None) -> Tensor:
        """Take another room, with these rows at its front."""
        if rows is not None:
            room[:, :, : rows.shape[2]] = rows
        self._room = room
        return room

    def _forget(self, window: int) -> None:
        """Keep the rows that the next token sees, and no more room than for a window."""
        assert self.rows is not None
        assert self._room is not None
        kept = self.rows[:, :, max(self.rows.shape[2] - window + 1, 0) :]
        rows = room_rows(self.length, window)
        if self._room.shape[2] > rows:
            kept = self._moved(kept.new_empty(*kept.shape[:2], rows, kept.shape[3]), kept)[:, :, : kept.shape[2]]
        self.rows = kept

    def _start(self, total: int) -> int | None:
        """Return the row of the room at which the kept rows begin; None if they are elsewhere, or it has too few."""
        rows, room = self.rows, self._room
        if rows is None or room is None or rows.shape[:2] != room.shape[:2] or rows.stride() != room.stride():
            return None
        if rows.untyped_storage()._cdata != room.untyped_storage()._cdata:
            return None
        start = (rows.storage_offset() - room.storage_offset()) // room.stride(2)
        return start if start + total <= room.shape[2] else None


def _split(rows: Tensor, width: int) -> HeadStates:
    """Return the codes and scales of rows in 8 bits."""
    return HeadStates(rows[..., :width], rows[..., -_SCALE:].view(torch.float32))


class EightBitStates(Tensor):
    """Keys or values (batch, heads, rows, width) in 8 bits, as a tensor: any function but attention decodes them."""

    rows: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, width: int, dtype: torch.dtype) -> EightBitStates:
        """Wrap rows of a cache, whose first ``width`` bytes are codes and whose last four are the scale."""
        shape = *rows.shape[:3], width
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows.device)
        made.rows = rows
        return made

    @property
    def states(self) -> HeadStates:
        """The codes and scales."""
        return _split(self.rows, self.shape[-1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _OF_ROWS and isinstance(args[0], EightBitStates) and _OF_ROWS[function](*args[1:]):
            states = args[0]
            return EightBitStates(function(states.rows, *args[1:]), states.shape[-1], states.dtype)
        plain = tree_map_only(EightBitStates, lambda one: decoded(one.states, one.dtype), (args, kwargs or {}))
        return function(*plain[0], **plain[1])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"EightBitStates({tuple(self.shape)}, dtype={self.dtype})"


_OF_ROWS: dict[Any, Callable[..., bool]] = {
    torch.ops.aten.slice.Tensor: lambda dim=0, *_: 0 <= dim < 3,
    torch.ops.aten.index_select.default: lambda dim, _: 0 <= dim < 3,
    torch.ops.aten.index.Tensor: lambda indices: len(indices) == 1 and indices[0].dim() == 1,
}
"""Functions that take whole rows of states in 8 bits, which stay in 8 bits, if the other arguments say so."""
