"""A cache of keys and values that grows in place, in full precision or in 8 bits, for ``generate`` and for models."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowmem import measure
from lowmem.integrations.transformers.attention_interface import SERVED_ATTENTION
from lowmem.kernels.tensor_checks import is_recording_operations
from lowmem.nn.cached_keys_and_values import CachedStates
from lowmem.nn.call_context import can_bypass_autograd


class KeyValueCache(DynamicCache):  # type: ignore[misc]
    """Keeps the keys and values of a model's attention between calls, without copying them to add a token.

    A prepared model's default cache does so, too. It is passed as transformers' caches are:
    ``model.generate(..., cache=KeyValueCache(model, bits=8))``, or to the model itself. With ``bits=8`` a row, which
    is a token's key or value of one head, is a signed byte for each number and a float32 scale: 0.53 of bfloat16's
    bytes where a head has 64 numbers, 0.27 of float32's. The attention of a prompt uses exact keys and values; later
    tokens see the rounded ones. ``set_attn_implementation(ATTENTION)`` lets attention read the codes; another
    attention decodes all of them for each token.

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
        self.layers: list[Any] = [
            _in_place_layer(layer, bits, keeps_gradients=False) if type(layer) in _REPLACED else layer
            for layer in self.layers
        ]

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


class InPlaceCacheHook:
    """Forward pre-hook of a prepared model: layers of its caches that are still empty grow in place from then on.

    It changes transformers' own classes of caches and layers, and nothing where gradients or operations are recorded.
    In a copy or a pickle of the model it does nothing.
    """

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self._model: Any = (lambda: None) if model is None else weakref.ref(model)

    def __reduce__(self) -> Any:
        return InPlaceCacheHook, ()

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Replace the layers of caches among the arguments of a call."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._model() is not model:
            return
        for cache in (*args, *kwargs.values()):
            cache = cache.self_attention_cache if type(cache) is EncoderDecoderCache else cache
            if type(cache) is not DynamicCache or cache.offloading:
                continue
            empty = [
                index
                for index, layer in enumerate(cache.layers)
                if type(layer) in _REPLACED and not layer.is_initialized
            ]
            appends_layers = cache.layer_class_to_replicate is DynamicLayer
            if (empty or appends_layers) and self.reason_or_none() is None and not _is_recorded():
                for index in empty:
                    cache.layers[index] = _in_place_layer(cache.layers[index])
                if appends_layers:
                    cache.layer_class_to_replicate = InPlaceCacheLayer

    def reason_or_none(self) -> str | None:
        """Return why caches stay as they are; None if they are replaced."""
        model = self._model()
        if model.device.type != "cpu":
            return f"the model is on {model.device}"
        name = model.config.get_text_config(decoder=True)._attn_implementation
        return None if name in SERVED_ATTENTION else f"the attention is {name!r}"

    def __str__(self) -> str:
        reason = self.reason_or_none()
        return f"caches as before: {reason}" if reason else _IN_PLACE


_IN_PLACE = (
    "keys and values in place: DynamicCache, as generate makes it for greedy search, sampling, beams, several "
    "sequences, assisted decoding and prompt lookup; as before: static, offloaded and quantized caches, other "
    "classes of caches and layers, layers that are not empty, a cache that the model makes itself, calls that record "
    "gradients"
)


def _is_recorded() -> bool:
    return not can_bypass_autograd() or is_recording_operations()


def in_place_cache_hook_or_none(model: nn.Module) -> tuple[nn.Module, InPlaceCacheHook] | None:
    """Return the model of transformers in a model, and the forward pre-hook that lets its caches grow in place.

    None where a module that knows its layer's index has code that is not transformers' own: it might need contiguous
    states.
    """
    owner = next((item for item in model.modules() if isinstance(item, PreTrainedModel)), None)
    indexed = [item for item in model.modules() if hasattr(item, "layer_idx") or hasattr(item, "layer_id")]
    classes = [getattr(type(item), "plain_class", type(item)) for item in indexed]
    is_own = all(item.forward.__module__.startswith("transformers.") for item in classes)
    if owner is None or not owner.can_generate() or not indexed or not is_own:
        return None
    return owner, InPlaceCacheHook(owner)


def _cached_states_property(name: str) -> property:
    """Return the attribute of a layer that is the states of its keys or values."""

    def set_states(layer: InPlaceCacheLayer, states: Tensor | None) -> None:
        # An empty one has 1
        layer.cached[name].states = None if states is None or states.dim() < 4 else states

    return property(lambda layer: layer.cached[name].states, set_states)


class InPlaceCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keeps keys and values in ``cached``, by name; transformers' functions read and replace their states."""

    keys, values = _cached_states_property("keys"), _cached_states_property("values")

    def __init__(self, bits: int | None = None, *window: Any, keeps_gradients: bool = True) -> None:
        self.cached = {name: CachedStates(bits, *window) for name in ("keys", "values")}
        for states in self.cached.values():
            states._keeps_gradients = keeps_gradients
        super().__init__(*window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add states (batch, heads, new, width); return those that attention reads."""
        self.cached["keys"].check(key_states)
        self.cached["values"].check(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        forget = not getattr(self, "record_past", False)
        return self.cached["keys"].append(key_states, forget), self.cached["values"].append(value_states, forget)

    def __copy__(self) -> InPlaceCacheLayer:
        """Return a layer that grows by itself, as transformers' own copies do."""
        return copy.deepcopy(self)

    def get_seq_length(self) -> int:
        """Return the number of tokens so far."""
        return self.cached["keys"].length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as transformers' layers do; nobody keeps what that reads."""
        with self.cached["keys"]._read_by_owner(), self.cached["values"]._read_by_owner():
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences of these indices."""
        for states in self.cached.values():
            states.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Keep each sequence so many times."""
        self.reorder_cache(self._sequence_indices().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences of these indices, in any form that indexes a tensor."""
        if self.get_seq_length():
            self.reorder_cache(self._sequence_indices()[indices])

    def _sequence_indices(self) -> Tensor:
        with self.cached["keys"]._read_by_owner():
            rows = self.cached["keys"].rows
        return torch.arange(0 if rows is None else len(rows), dtype=torch.int64, device="cpu")

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


# transformers' own layers that grow; layers that keep more than keys and values stay as they are
_REPLACED = DynamicLayer, DynamicSlidingWindowLayer


def _in_place_layer(layer: Any, bits: int | None = None, keeps_gradients: bool = True) -> InPlaceCacheLayer:
    """Return a layer that grows in place, in place of an empty one of ``_REPLACED``."""
    if type(layer) is DynamicLayer:
        return InPlaceCacheLayer(bits, keeps_gradients=keeps_gradients)
    in_place = _SlidingWindowCacheLayer(bits, layer.sliding_window, keeps_gradients=keeps_gradients)
    in_place.record_past = layer.record_past
    return in_place
