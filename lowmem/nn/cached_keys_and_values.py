"""Keys and values of attention that are kept between calls, as rows of larger tensors, exactly or in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lowmem.errors import is_one_of, short_repr
from lowmem.kernels.cached_attention import decoded_states
from lowmem.kernels.cpu_rowwise import CODES8
from lowmem.kernels.tensor_checks import TYPES
from lowmem.quant.backend import KeyOrValueStates, backend_of

# Rows by which the room for rows grows, at least
_LEAST = 32
# Bytes of a row's scale, a float32 behind its codes
_SCALE = 4


def cache_capacity_rows(tokens: int, window: int | None = None) -> int:
    """Return the rows of a room that holds ``tokens`` tokens: up to an eighth more, and with a window at most one
    step beyond it. The number does not depend on how many tokens were added at a time."""
    step = max(_LEAST, (1 << tokens.bit_length()) // 16)
    rows = -(-tokens // step) * step
    return rows if window is None else min(rows, cache_capacity_rows(cache_capacity_rows(window) + 1))


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
        count: tokens that are kept.

    Raises:
        ValueError: other ``bits``, or a window below 1.
    """

    # With True, exact states are added to a copy while torch records gradients
    _keeps_gradients = False

    def __init__(self, bits: int | None = None, window: int | None = None) -> None:
        if not is_one_of(bits, (None, 8)):
            raise ValueError(f"bits={short_repr(bits)} must be 8, or None to keep keys and values as they are")
        if window is not None and window < 1:
            raise ValueError(f"window={window!r} must be at least 1, or None to keep all tokens")
        self.bits, self.window = bits, window
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.length = self.count = 0
        self._buffer: Tensor | None = None
        # Row of the room that is kept
        self._first = 0
        # Rows of the room up to this one may be read elsewhere, and are not written to
        self._read_end = 0
        self._width, self._dtype = 0, torch.float32  # of the states

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, with the room for the next tokens."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def rows(self) -> Tensor | None:
        """(batch, heads, tokens, width); in 8 bits int8 (batch, heads, tokens, bytes of codes and scale)."""
        self._read_end = max(self._read_end, self._first + self.count)
        return self._kept_rows

    @contextmanager
    def _read_by_owner(self) -> Iterator[None]:
        """What reads ``rows`` or ``states`` in this context keeps none of them: they may be written to later."""
        buffer, end = self._buffer, self._read_end
        yield
        if self._buffer is buffer:
            self._read_end = end

    @property
    def _kept_rows(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer[:, :, self._first : self._first + self.count]

    @property
    def states(self) -> Tensor | None:
        """What attention reads of the kept tokens, without new ones; None before the first call."""
        rows = self.rows
        return rows if rows is None or self.bits is None else EightBitStates(rows, self._width, self._dtype)

    @states.setter
    def states(self, states: Tensor | None) -> None:
        """Keep other states in place of these, such as some of them."""
        if states is not None:
            _check_floating_point(states)
        length = self.length
        if states is None or isinstance(states, EightBitStates) != (self.bits is not None):
            self.clear()
            if states is not None:
                self.append(states, forget=False)  # which encodes, or decodes
        else:
            rows = states.rows if isinstance(states, EightBitStates) else states
            start = None if self._buffer is None else _row_offset_in_buffer_or_none(rows, self._buffer)
            if start is None:
                self._buffer, start, self._read_end = rows, 0, rows.shape[2]
            self._first = start
            self.count, self._width, self._dtype = rows.shape[2], states.shape[3], states.dtype
        self.length = self.count if self.window is None else length

    def append(self, states: Tensor, forget: bool = True) -> Tensor:
        """Add the states of new tokens; return those that attention reads, the new ones last.

        Args:
            states: floating point (batch, heads, new, width). Batch, heads and width are those of the first call.
            forget: keep no more than the window. With False, older tokens stay until a later call.

        Raises:
            TypeError: states that are no floating point numbers.
            ValueError: another batch, heads or width.
        """
        self.check(states)
        new, width, count = *states.shape[2:], self.count
        if self._keeps_gradients and self.bits is None and torch.is_grad_enabled():
            # Nothing is written to the memory that a graph reads
            rows = states if self._kept_rows is None else torch.cat([self._kept_rows, states], 2)
            self._buffer, self._first, self._read_end = rows, 0, count + new
        else:
            buffer = self._grow_buffer_to_fit(states.shape, states)
            rows = buffer[:, :, self._first : self._first + count + new]
            if self.bits is None:
                rows[:, :, count:].copy_(states.detach())
            else:
                backend_of(states).encode_states(states.detach(), _codes_and_scales(rows[:, :, count:], width))
        self._width, self._dtype = width, rows.dtype if self.bits is None else states.dtype
        self.grow(new, forget)
        if not count:
            return states
        seen = rows if self.window is None else rows[:, :, -(self.window - 1 + new) :]
        return seen if self.bits is None else EightBitStates(seen, width, states.dtype)

    def check(self, states: Tensor) -> None:
        """Raise the errors of ``append``, and change nothing."""
        _check_floating_point(states)
        if self._buffer is not None and not self._is_compatible_shape(states.shape, self._buffer):
            raise ValueError(
                f"states of shape {tuple(states.shape)} do not continue {tuple(self._buffer.shape[:2])} sequences "
                "and "
                "heads, or their width: clear() begins anew"
            )

    def crop(self, tokens: int) -> None:
        """Remove the last tokens, as those that a check of a draft refused.

        Raises:
            ValueError: there is a window, whose older tokens are forgotten; or there are fewer tokens.
        """
        if self.window is not None or not 0 <= tokens <= self.length:
            raise ValueError(f"tokens={tokens} cannot be removed of {self.length} with window={self.window}")
        self.length -= tokens
        self.count -= tokens

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences of these indices, int64 (sequences,), in their order: those of a step's beams."""
        rows, buffer = self._kept_rows, self._buffer
        if rows is None or buffer is None:
            return
        is_same_count, is_read = len(sequences) == len(rows), self._first < self._read_end
        if is_same_count and not (is_read or buffer.requires_grad or self._is_other_mode(buffer)):
            places = torch.arange(len(rows), dtype=torch.int64, device=rows.device)
            changed = (sequences.to(rows.device) != places).nonzero().squeeze(1)
            rows.index_copy_(0, changed, rows.index_select(0, sequences.to(rows.device)[changed]))
        else:
            selected = rows.index_select(0, sequences.to(rows.device))
            self._move_to_buffer(buffer.new_empty(len(selected), *buffer.shape[1:]), selected)

    def places(self, shape: Sequence[int], like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
        """Return where C writes the states (batch, heads, new, width) of new tokens, before ``grow``; where it reads
        those that their queries see, both as ``states_struct_fields_or_none``; and their number. None: C does not."""
        buffer = self._buffer
        if buffer is None or not self.count or not buffer.is_cpu or not self._is_compatible_shape(shape, buffer):
            return None
        if buffer.dtype is not (like.dtype if self.bits is None else torch.int8):
            return None
        buffer = self._grow_buffer_to_fit(shape, like)
        expired, (*steps, _), size = self._expired_row_count(self.count), buffer.stride(), buffer.element_size()

        def row_struct_fields(row: int) -> tuple[int, ...]:
            at = buffer.data_ptr() + row * steps[2] * size
            if self.bits is None:
                return TYPES[buffer.dtype], at, 0, *steps, 0, 0, 0
            return CODES8, at, at + buffer.shape[3] - _SCALE, *steps, *(step // _SCALE for step in steps)

        return (
            row_struct_fields(self._first + self.count),
            row_struct_fields(self._first + expired),
            self.count - expired + shape[2],
        )

    def grow(self, new: int, forget: bool = True) -> None:
        """Keep ``new`` rows more, which were written behind the kept ones."""
        self.count += new
        self.length += new
        if not forget or self.window is None:
            return
        expired = self._expired_row_count(self.count)
        self._first, self.count = self._first + expired, self.count - expired
        rows, buffer = cache_capacity_rows(self.length, self.window), self._buffer
        # A long prompt's
        if buffer is not None and buffer.shape[2] > rows:
            self._move_to_buffer(buffer.new_empty(*buffer.shape[:2], rows, buffer.shape[3]), self._kept_rows)

    def _expired_row_count(self, cached_rows: int) -> int:
        """Return how many of the rows that are kept the next token does not see."""
        return 0 if self.window is None else max(0, cached_rows - self.window + 1)

    def _is_compatible_shape(self, states_shape: Sequence[int], buffer: Tensor) -> bool:
        """Whether states (batch, heads, rows, width) are as wide as the kept ones, and of as many."""
        return (*buffer.shape[:2], self._width) == (*states_shape[:2], states_shape[3])

    @staticmethod
    def _is_other_mode(buffer: Tensor) -> bool:
        """Whether a room was made in inference mode, outside of which it cannot be written to."""
        return buffer.is_inference() and not torch.is_inference_mode_enabled()

    def _grow_buffer_to_fit(self, new_states_shape: Sequence[int], like: Tensor) -> Tensor:
        """Return the room, with rows for states (batch, heads, rows, width) behind the kept ones."""
        (batch, heads, new, width), buffer = new_states_shape, self._buffer
        total = self.count + new
        end = self._first + self.count
        dtype = torch.int8 if self.bits is not None else like.dtype
        if buffer is not None and buffer.dtype is not dtype:
            dtype = torch.promote_types(buffer.dtype, dtype)
        if (
            buffer is None
            or end + new > buffer.shape[2]
            or end < self._read_end
            or buffer.dtype is not dtype
            or buffer.stride(3) != 1
            or buffer.requires_grad
            or self._is_other_mode(buffer)
        ):
            rows = max(cache_capacity_rows(total), cache_capacity_rows(self.length + new, self.window))
            coded = -(-width // _SCALE) * _SCALE + _SCALE
            row = width if self.bits is None else coded
            buffer = self._move_to_buffer(like.new_empty(batch, heads, rows, row, dtype=dtype), self._kept_rows)
        return buffer

    def _move_to_buffer(self, buffer: Tensor, rows: Tensor | None) -> Tensor:
        """Take another room, with rows at its front."""
        if rows is not None:
            buffer[:, :, : self.count] = rows
        self._buffer, self._first, self._read_end = buffer, 0, 0
        return buffer


def _check_floating_point(states: Tensor) -> None:
    if not states.is_floating_point():
        raise TypeError(f"states of {states.dtype} are no floating point numbers: give states.to(torch.float32)")


def _row_offset_in_buffer_or_none(rows: Tensor, buffer: Tensor) -> int | None:
    """Return the row of the room at which rows begin; None if they are elsewhere."""
    start, off = divmod(rows.data_ptr() - buffer.data_ptr(), buffer.stride(2) * buffer.element_size())
    is_part = not off and 0 <= start <= buffer.shape[2] - rows.shape[2] and rows.stride() == buffer.stride()
    return start if is_part and rows.shape[:2] == buffer.shape[:2] else None


def _codes_and_scales(rows: Tensor, width: int) -> KeyOrValueStates:
    """Return the codes and scales of rows in 8 bits."""
    return KeyOrValueStates(rows[..., :width], rows[..., -_SCALE:].view(torch.float32))


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
    def codes_and_scales(self) -> KeyOrValueStates:
        """The codes and scales."""
        return _codes_and_scales(self.rows, self.shape[-1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _ROW_FUNCTIONS and isinstance(args[0], EightBitStates) and _ROW_FUNCTIONS[function](*args[1:]):
            states = args[0]
            return EightBitStates(function(states.rows, *args[1:]), states.shape[-1], states.dtype)
        plain = tree_map_only(
            EightBitStates,
            lambda states_tensor: decoded_states(states_tensor.codes_and_scales, states_tensor.dtype),
            (args, kwargs or {}),
        )
        return function(*plain[0], **plain[1])


_ROW_FUNCTIONS: dict[Any, Callable[..., bool]] = {
    torch.ops.aten.slice.Tensor: lambda dim=0, *_: 0 <= dim < 3,
    torch.ops.aten.index_select.default: lambda dim, _: 0 <= dim < 3,
    torch.ops.aten.index.Tensor: lambda indices: len(indices) == 1 and indices[0].dim() == 1,
}
"""Functions that take whole rows of states in 8 bits, which stay in 8 bits, if the other arguments say so."""
