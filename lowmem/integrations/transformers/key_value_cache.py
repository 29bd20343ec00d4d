"""A cache of keys and values that grows in place, in full precision or in 8 bits, for ``generate`` and for models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowmem import measure
from lowmem.nn.cached_keys_and_values import CachedStates


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
        # Raises for other bits
        CachedStates(bits)
        super().__init__(config=getattr(model, "config", model))
        self.layers: list[Any] = [_in_place_layer_if_supported(layer, bits) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with the room that is kept for the next tokens."""
        parts = [states for layer in self.layers for states in getattr(layer, "cached", {"": layer}).values()]
        return measure.nbytes(measure.tensors_in(list(map(vars, parts))))


def cached_bytes(model: Any, sequences: int, tokens: int, bits: int | None) -> int:
    """Return ``nbytes`` of a ``KeyValueCache`` of ``tokens`` tokens of each sequence; 0 if the model takes no cache.

    The model has fake tensors, and fills the cache in one call.

    Raises:
        ValueError: other ``bits``.
    """
    if not (isinstance(model, PreTrainedModel) and model.can_generate()) or model.config.is_encoder_decoder:
        return 0
    cache = KeyValueCache(model, bits)
    with torch.no_grad():
        model(input_ids=torch.zeros(sequences, tokens, dtype=torch.int64, device="cpu"), cache=cache, use_cache=True)
    return cache.nbytes


def _cached_states_property(name: str) -> property:
    """Return the attribute of a layer that is the states of its keys or values."""

    def set_states(layer: InPlaceCacheLayer, states: Tensor | None) -> None:
        # An empty one has 1
        layer.cached[name].states = None if states is None or states.dim() < 4 else states

    return property(lambda layer: layer.cached[name].states, set_states)


class InPlaceCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keeps keys and values in ``cached``, by name; transformers' functions read and replace their states."""

    keys, values = _cached_states_property("keys"), _cached_states_property("values")

    def __init__(self, bits: int | None, *window: Any) -> None:
        self.cached = {name: CachedStates(bits, *window) for name in ("keys", "values")}
        super().__init__(*window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add states (batch, heads, new, width); return those that attention reads."""
        self.cached["keys"].check(key_states)
        self.cached["values"].check(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        forget = not getattr(self, "record_past", False)
        return self.cached["keys"].append(key_states, forget), self.cached["values"].append(value_states, forget)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Keep each sequence so many times."""
        if self.get_seq_length():
            sequences = torch.arange(len(self.keys), dtype=torch.int64, device="cpu")
            self.batch_select_indices(sequences.repeat_interleave(repeats))

    def grow(self, written_rows: int) -> None:
        """Keep ``written_rows`` rows more, which were written behind the kept ones."""
        for states in self.cached.values():
            states.grow(written_rows, not getattr(self, "record_past", False))


class _SlidingWindowCacheLayer(InPlaceCacheLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    @property
    def cumulative_length(self) -> int:
        return self.cached["keys"].length

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        for states in self.cached.values():
            states.length = length


def _in_place_layer_if_supported(layer: Any, bits: int | None) -> Any:
    """Return a layer that grows in place; layers that keep more than keys and values stay as they are."""
    if type(layer) is DynamicLayer:
        return InPlaceCacheLayer(bits)
    return _SlidingWindowCacheLayer(bits, layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer
