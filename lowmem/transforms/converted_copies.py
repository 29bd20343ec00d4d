"""Makes stored copies of modules; the model does not change."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from lowmem.nn.adapted_module import adapted_shallow_copy
from lowmem.nn.adapter import Adapter
from lowmem.nn.module_copy import LAYERS, parameter_leading_dim_count, stored_shallow_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import BlockwiseTechnique, Budget, EightBit, FourBit, Half, LoRA
from lowmem.quant.quantize_tensor import recorded_or_measured_squares
from lowmem.quant.tensor import QuantizedTensor, Squares
from lowmem.transforms.module_registry import (
    LayerTechnique,
    Technique,
    adaptable_parameter_names,
    conversion_skip_reason,
    layer_display_name,
    storable_parameter_names,
    supported_module_kinds_text,
)
from lowmem.transforms.tied_weights import weight_memory_key

StoreFactory: TypeAlias = Callable[[Any], Callable[[Tensor, str], Any]]
"""Returns, for a technique, the function that stores a weight by its name."""


def cached_store_factory(on_meta: bool = False) -> StoreFactory:
    """Return a function from a technique to its ``store``, cached: layers with a shared weight share the stored one.

    ``on_meta`` stores on the meta device, without values.
    """
    known: dict[Any, tuple[Tensor, Any]] = {}

    def make_caching_store(technique: Any) -> Callable[[Tensor, str], Any]:
        make = technique.skeleton if on_meta else technique.store
        how = replace(technique, compute_dtype=None) if isinstance(technique, FourBit | EightBit) else technique

        def store_once(tensor: Tensor, name: str) -> Any:
            key = how, weight_memory_key(tensor)
            if key not in known:
                # Keeps tensor alive: key has its address
                known[key] = tensor, make(tensor, name)
            return known[key][1]

        return store_once

    return make_caching_store


def converted_copy(
    module: nn.Module,
    techniques: tuple[LayerTechnique, ...],
    path: str,
    unused_reasons_to_update: dict[type[Technique], str | None],
    store_factory: StoreFactory,
    parameter_names: Iterable[str] | None = None,
) -> nn.Module:
    """Return what a module becomes by all techniques that support it; errors name its path.

    Args:
        module: dense, or with stored parameters if the techniques are adapters.
        unused_reasons_to_update: for each kind of technique, why it has converted no module so far; None once it has.
        parameter_names: the parameters to store; None: ``storable_parameter_names(module)``.
    """
    layer: Any = module
    for technique in techniques:
        adapts = isinstance(technique, dict)
        kind: Any = LoRA if adapts else type(technique)
        if (kind is LoRA and not adapts) or (not adapts and layer is not module):
            why = conversion_skip_reason(LoRA, layer) if kind is LoRA else None
            unused_reasons_to_update.setdefault(
                kind,
                f"{layer_display_name(path)}: {kind.__name__} cannot follow the techniques before it, which made "
                f"a {type(layer).__name__}; it takes {supported_module_kinds_text(kind)}{f'. {why}' if why else ''}",
            )
            continue
        unused_reasons_to_update[kind] = None
        if isinstance(technique, dict):
            layer = copy_with_first_adapter(layer, technique, path, {} if layer is module else module._parameters)
        elif not isinstance(technique, LoRA):
            # Each layer has got its own
            assert not isinstance(technique, Budget)
            stored = storable_parameter_names(module) if parameter_names is None else parameter_names
            layer = copy_with_stored_parameters(module, technique, path, stored, store_factory(technique))
    built: nn.Module = layer.train(module.training)
    return built


def copy_with_first_adapter(
    layer: Any,
    techniques: Mapping[str, LoRA],
    path: str,
    dense_parameters: Mapping[str, Any],
    adapter_name: str = "default",
) -> nn.Module:
    """Return a copy of a layer with an adapter, with the techniques of the parameters that it changes.

    ``dense_parameters`` has the parameters that 4-bit ones were quantized from, for ``init="loftq"``; errors name
    ``path``.
    """
    try:
        parts = {
            parameter_name: Adapter(layer, technique, dense_parameters.get(parameter_name), parameter_name)
            for parameter_name, technique in techniques.items()
        }
        return adapted_shallow_copy(layer, adaptable_parameter_names(layer), adapter_name, parts)
    except ValueError as reason:
        raise ValueError(f"{layer_display_name(path)}: {reason}") from reason


def copy_with_stored_parameters(
    module: nn.Module,
    technique: Half | EightBit | FourBit,
    path: str,
    parameter_names: Iterable[str],
    store: Callable[[Tensor, str], Any],
    transposed_names: Container[str] = (),
) -> StoredModule:
    """Return a copy of a dense module in which parameters are stored by ``store``; errors name the weight's path.

    Those in ``transposed_names`` are given to ``store`` with their last two dimensions swapped, and stored so.
    """
    place = [path]
    squares: list[Squares] = []  # of each weight

    def store_and_append_squares(tensor: Tensor, name: str) -> Any:
        place[:] = [path if name in ("weight", "bias") else f"{path}.{name}".lstrip(".")]
        stored = store(tensor, name)
        values = stored.packed if isinstance(stored, QuantizedTensor) else stored
        if name != "bias" and not tensor.is_meta and not values.is_meta:
            squares.append(recorded_or_measured_squares(tensor, stored))
        return stored

    wanted = list(parameter_names)
    known: Any = LAYERS.get((type(module), technique.bits))
    try:
        if known is not None and transposed_names:
            raise ValueError(f"a {type(module).__name__} cannot hold a weight that is stored transposed")
        stored = list(wanted)
        if known is not None and wanted == ["weight"] and isinstance(technique, Half):
            stored += ["bias"] * (module._parameters.get("bias") is not None)
        weights = {}
        for name in stored:
            parameter = module._parameters[name]
            assert parameter is not None
            lead = parameter_leading_dim_count(module, parameter)
            if name in transposed_names:
                if parameter.dim() != lead + 1 or parameter.dim() < 2:
                    raise ValueError(f"{name} of shape {tuple(parameter.shape)} cannot be stored transposed")
                weights[name] = store_and_append_squares(parameter.mT, name)
                continue
            inside = isinstance(technique, BlockwiseTechnique) and parameter.dim() > lead + 1
            weights[name] = store_and_append_squares(parameter.flatten(lead) if inside else parameter, name)
        dtype = technique.compute_dtype if isinstance(technique, BlockwiseTechnique) else None
        made = stored_shallow_copy(module, weights, transposed=transposed_names, compute_dtype=dtype)
    except (TypeError, ValueError) as reason:
        raise type(reason)(f"{layer_display_name(place[0])}: {reason}") from reason
    if squares:
        made.weight_error = Squares.total(squares).relative_error
    return made
