"""A cache of keys and values that grows in place, in full precision or in 8 bits, for ``generate`` and for models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowmem.kernels.attention import decoded
from lowmem.quant.backend import HeadStates, backend_of

_SPARE = 32  # rows of room, at least, that a cache takes when it grows; an eighth of its rows, if that is more
_SCALE = 4  # bytes of a row's scale, a float32 behind its codes


class KeyValueCache(DynamicCache):  # type: ignore[misc]
    """Keeps the keys and values of a model's attention between calls, without copying them to add a token.

    It is passed as transformers' caches are: ``model.generate(..., cache=KeyValueCache(model, bits=8))``, or
    to the model itself. With ``bits=8`` a row, which is a token's key or value of one head, is a signed byte for each
    number and a float32 scale: 0.53 of bfloat16's bytes where a head has 64 numbers, 0.27 of float32's. The attention
    of a prompt uses exact keys and values; later tokens see the rounded ones. ``set_attn_implementation(ATTENTION)``
    lets attention read the codes; another attention decodes all of them for each token.

    Args:
        model: a model of transformers, or its config.
        bits: 8; None keeps numbers as the model computes them.

    Raises:
        ValueError: other ``bits``.
    """

    def __init__(self, model: Any, bits: int | None = None) -> None:
        if bits not in (None, 8):
            raise ValueError(f"bits={bits!r} must be 8, or None to keep keys and values as they are")
        super().__init__(config=getattr(model, "config", model))
        self.layers: list[Any] = [_growing(layer, bits) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with the room that is kept for the next tokens."""
        rooms = (room for layer in self.layers for room in getattr(layer, "rooms", {}).values())
        return sum(room.nbytes for room in rooms)


class _InPlace:
    """Keeps keys and values at the front of larger tensors: ``rooms``, by name."""

    def __init__(self, bits: int | None, *given: Any) -> None:
        super().__init__(*given)
        self.rooms: dict[str, Tensor] = {}
        self.eight_bit = bits == 8

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.rooms.clear()

    def _added(self, name: str, states: Tensor) -> Tensor:
        """Return the kept rows, with new states behind them; they are written into the room behind the kept ones."""
        kept, (batch, heads, new, width) = getattr(self, name), states.shape
        row = -(-width // _SCALE) * _SCALE + _SCALE if self.eight_bit else width
        count = kept.shape[-2] if kept.dim() == 4 else 0
        room = self.rooms.get(name)
        start = None if room is None else _start(kept, room, count + new)
        if room is None or start is None:
            spare = max(_SPARE, (count + new) // 8)
            dtype = torch.int8 if self.eight_bit else states.dtype
            room = self.rooms[name] = states.new_empty(batch, heads, count + new + spare, row, dtype=dtype)
            if count:
                room[:, :, :count] = kept
            start = 0
        into = room[:, :, start + count : start + count + new]
        if self.eight_bit:
            backend_of(states).encode_states(states, _split(into, width))
        else:
            into.copy_(states)
        return room[:, :, start : start + count + new]

    def _seen(self, rows: Tensor, states: Tensor) -> Tensor:
        """Return kept rows as a model takes them, whose new states are given."""
        if not self.eight_bit or rows.shape[-2] == states.shape[-2]:
            return states if self.eight_bit else rows
        return EightBitStates(rows, states.shape[-1], states.dtype)


class _GrowingLayer(_InPlace, DynamicLayer):  # type: ignore[misc]
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._added("keys", key_states), self._added("values", value_states)
        return self._seen(self.keys, key_states), self._seen(self.values, value_states)


class _SlidingLayer(_InPlace, DynamicSlidingWindowLayer):  # type: ignore[misc]
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.cumulative_length += new
        self.keys, self.values = self._added("keys", key_states), self._added("values", value_states)
        last = slice(-(self.sliding_window - 1 + new), None)  # what ``get_mask_sizes`` tells the mask
        keys, values = self.keys[:, :, last], self.values[:, :, last]
        if not self.record_past:
            kept = slice(-self.sliding_window + 1, None)
            self.keys, self.values = self.keys[:, :, kept], self.values[:, :, kept]
        return self._seen(keys, key_states), self._seen(values, value_states)


def _growing(layer: Any, bits: int | None) -> Any:
    """Return a layer that grows in place; layers that keep more than keys and values stay as they are."""
    if type(layer) is DynamicLayer:
        return _GrowingLayer(bits)
    return _SlidingLayer(bits, layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer


def _start(kept: Tensor, room: Tensor, count: int) -> int | None:
    """Return the row of the room at which the kept rows begin; None if they are elsewhere, or ``count`` are more."""
    if kept.shape[:2] != room.shape[:2] or kept.stride() != room.stride() or kept.data_ptr() < room.data_ptr():
        return None
    if kept.untyped_storage().data_ptr() != room.untyped_storage().data_ptr():
        return None
    start = (kept.data_ptr() - room.data_ptr()) // (room.stride(2) * room.element_size())
    return start if start + count <= room.shape[2] else None


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
        plain = tree_map_only(EightBitStates, lambda one: decoded(one.states, one.dtype), (args, kwargs or {}))
        return function(*plain[0], **plain[1])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"EightBitStates({tuple(self.shape)}, dtype={self.dtype})"
