"""A cache of keys and values that grows in place, in full precision or in 8 bits, for ``generate`` and for models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowmem.kernels.attention import decoded
from lowmem.kernels.cpu_rows import CODES8
from lowmem.kernels.memory import TYPES
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


def _kept(name: str) -> property:
    """Return a property for kept rows (batch, heads, rows, numbers), a part of a larger tensor: their room."""

    def get(layer: Any) -> Tensor | None:
        if name not in layer.rooms:
            return layer.nothing.get(name)  # type: ignore[no-any-return]
        first, count = layer.spans[name]
        rows: Tensor = layer.rooms[name][:, :, first : first + count]
        return rows

    def put(layer: Any, rows: Tensor | None) -> None:
        if rows is None or rows.dim() != 4:
            layer.nothing[name] = rows
            layer.rooms.pop(name, None)
            layer.spans.pop(name, None)
            return
        room = layer.rooms.get(name)
        start = None if room is None else _start(rows, room)
        if start is None:
            layer.rooms[name] = rows
        layer.spans[name] = start or 0, rows.shape[2]

    return property(get, put)


class InPlace:
    """Keeps keys and values as rows of larger tensors, ``rooms``; ``spans`` has the first row and their number."""

    keys, values = _kept("keys"), _kept("values")

    def __init__(self, bits: int | None, *given: Any) -> None:
        self.rooms: dict[str, Tensor] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        self.nothing: dict[str, Tensor | None] = {}  # in place of rows
        self.eight_bit = bits == 8
        super().__init__(*given)

    def row_for(self, name: str, shape: tuple[int, ...], like: Tensor) -> int:
        """Return the row of the room where states (batch, heads, rows, width) fit, behind the kept ones."""
        batch, heads, new, width = shape
        room, (first, count) = self.rooms.get(name), self.spans.get(name, (0, 0))
        if room is None or room.shape[2] < first + count + new or room.stride(3) != 1:
            row, dtype = self._row(width), torch.int8 if self.eight_bit else like.dtype
            size = count + new + max(_SPARE, (count + new) // 8)
            made = like.new_empty(batch, heads, size, row, dtype=dtype)
            if room is not None:
                made[:, :, :count] = room[:, :, first : first + count]
            self.rooms[name], self.spans[name], first = made, (0, count), 0
        return first + count

    def _row(self, width: int) -> int:
        """Return the numbers of a kept row."""
        return -(-width // _SCALE) * _SCALE + _SCALE if self.eight_bit else width

    def takes(self, name: str, shape: tuple[int, ...], like: Tensor) -> bool:
        """Whether states (batch, heads, rows, width) are of the kind of the kept ones."""
        room, dtype = self.rooms.get(name), torch.int8 if self.eight_bit else like.dtype
        if room is None or room.dtype is not dtype or room.stride(3) != 1 or not room.is_cpu:
            return False
        return (*room.shape[:2], room.shape[3]) == (*shape[:2], self._row(shape[3]))

    def fields(self, name: str, row: int, width: int) -> tuple[int, ...]:
        """Return the rows of a room, from one on, as C takes them (``states_of``)."""
        room = self.rooms[name]
        steps, size = room.stride()[:3], room.element_size()
        at = room.data_ptr() + row * steps[2] * size
        if not self.eight_bit:
            return TYPES[room.dtype], at, 0, *steps, 0, 0, 0
        return CODES8, at, at + room.shape[3] - _SCALE, *steps, *(step // _SCALE for step in steps)

    def first_seen(self, new: int) -> int:
        """Return the first row of the rooms that the queries of ``new`` rows see."""
        return self.spans["keys"][0]

    def grow(self, new: int) -> None:
        """Keep ``new`` rows more, which were written behind the kept ones."""
        for name, (first, count) in self.spans.items():
            self.spans[name] = first, count + new

    def _added(self, name: str, states: Tensor) -> Tensor:
        """Return the kept rows with new states behind them, which are written into the room."""
        row = self.row_for(name, states.shape, states)
        first, new = self.spans.get(name, (0, 0))[0], states.shape[2]
        into = self.rooms[name][:, :, row : row + new]
        if self.eight_bit:
            backend_of(states).encode_states(states, _split(into, states.shape[3]))
        else:
            into.copy_(states)
        return self.rooms[name][:, :, first : row + new]

    def _seen(self, rows: Tensor, states: Tensor) -> Tensor:
        """Return kept rows as a model takes them, whose new states are given."""
        if not self.eight_bit or rows.shape[-2] == states.shape[-2]:
            return states if self.eight_bit else rows
        return EightBitStates(rows, states.shape[-1], states.dtype)


class _GrowingLayer(InPlace, DynamicLayer):  # type: ignore[misc]
    def get_seq_length(self) -> int:
        return self.spans["keys"][1] if "keys" in self.rooms else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._added("keys", key_states), self._added("values", value_states)
        return self._seen(self.keys, key_states), self._seen(self.values, value_states)


class _SlidingLayer(InPlace, DynamicSlidingWindowLayer):  # type: ignore[misc]
    def first_seen(self, new: int) -> int:
        first, count = self.spans["keys"]  # as ``get_mask_sizes`` tells the mask
        return first + max(0, count - self.sliding_window + 1)

    def grow(self, new: int) -> None:
        super().grow(new)
        self.cumulative_length += new
        self._slide()

    def _slide(self) -> None:
        """Keep what the next token sees."""
        for name, (first, count) in self.spans.items():
            gone = 0 if self.record_past else max(0, count - self.sliding_window + 1)
            self.spans[name] = first + gone, count - gone

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.cumulative_length += new
        self.keys, self.values = self._added("keys", key_states), self._added("values", value_states)
        last = slice(-(self.sliding_window - 1 + new), None)  # what ``get_mask_sizes`` tells the mask
        keys, values = self.keys[:, :, last], self.values[:, :, last]
        self._slide()
        return self._seen(keys, key_states), self._seen(values, value_states)


def _growing(layer: Any, bits: int | None) -> Any:
    """Return a layer that grows in place; layers that keep more than keys and values stay as they are."""
    if type(layer) is DynamicLayer:
        return _GrowingLayer(bits)
    return _SlidingLayer(bits, layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer


def _start(rows: Tensor, room: Tensor) -> int | None:
    """Return the row of the room at which rows begin; None if they are elsewhere."""
    if rows.shape[:2] != room.shape[:2] or rows.stride() != room.stride() or rows.data_ptr() < room.data_ptr():
        return None
    if rows.untyped_storage().data_ptr() != room.untyped_storage().data_ptr():
        return None
    return (rows.data_ptr() - room.data_ptr()) // (room.stride(2) * room.element_size())


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
