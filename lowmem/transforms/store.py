"""Makes stored copies of modules; the model does not change."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from lowmem.nn.adapted_module import adapted_copy
from lowmem.nn.adapter import Adapter
from lowmem.nn.module_copy import LAYERS, leading_dims, stored_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import Blockwise, Budget, EightBit, FourBit, Half, LoRA
from lowmem.quant.quantize import squares_lost
from lowmem.quant.tensor import QuantizedTensor, Squares
from lowmem.transforms.registry import (
    Step,
    Technique,
    layer_name,
    parameters_to_adapt,
    parameters_to_store,
    skip_reason,
    supported_types,
)
from lowmem.transforms.ties import weight_key

StoreBy: TypeAlias = Callable[[Any], Callable[[Tensor, str], Any]]
"""Returns, for a technique, the function that stores a weight by its name."""


def storing_once(empty: bool = False) -> StoreBy:
    """Return a function from a technique to its ``store``, cached: layers with a shared weight share the stored one.

    ``empty`` stores on the meta device, without values.
    """
    known: dict[Any, tuple[Tensor, Any]] = {}

    def by(technique: Any) -> Callable[[Tensor, str], Any]:
        make = technique.skeleton if empty else technique.store
        how = replace(technique, compute_dtype=None) if isinstance(technique, FourBit | EightBit) else technique

        def store(tensor: Tensor, name: str) -> Any:
            key = how, weight_key(tensor)
            if key not in known:
                known[key] = tensor, make(tensor, name)  # keeps tensor alive: key has its address
            return known[key][1]

        return store

    return by


def rebuild(
    module: nn.Module,
    techniques: tuple[Step, ...],
    path: str,
    unused: dict[type[Technique], str | None],
    store_by: StoreBy,
    names: Iterable[str] | None = None,
) -> nn.Module:
    """Return what a module becomes by all techniques that support it; errors name its path.

    Args:
        module: dense, or with stored parameters if the techniques are adapters.
        unused: for each kind of technique, why it has converted no module so far; None once it has. It is updated.
        names: the parameters to store; None: ``parameters_to_store(module)``.
    """
    layer: Any = module
    for technique in techniques:
        adapts = isinstance(technique, dict)
        kind: Any = LoRA if adapts else type(technique)
        if (kind is LoRA and not adapts) or (not adapts and layer is not module):
            why = skip_reason(LoRA, layer) if kind is LoRA else None
            unused.setdefault(
                kind,
                f"{layer_name(path)}: {kind.__name__} cannot follow the techniques before it, which made "
                f"a {type(layer).__name__}; it takes {supported_types(kind)}{f'. {why}' if why else ''}",
            )
            continue
        unused[kind] = None
        if isinstance(technique, dict):
            layer = add_first_adapter(layer, technique, path, {} if layer is module else module._parameters)
        elif not isinstance(technique, LoRA):
            assert not isinstance(technique, Budget)  # each layer has got its own
            stored = parameters_to_store(module) if names is None else names
            layer = store_parameters(module, technique, path, stored, store_by(technique))
    built: nn.Module = layer.train(module.training)
    return built


def add_first_adapter(
    layer: Any, techniques: Mapping[str, LoRA], path: str, dense: Mapping[str, Any], name: str = "default"
) -> nn.Module:
    """Return a copy of a layer with an adapter, with the techniques of the parameters that it changes.

    ``dense`` has the parameters that 4-bit ones were quantized from, for ``init="loftq"``; errors name ``path``.
    """
    try:
        parts = {one: Adapter(layer, own, dense.get(one), one) for one, own in techniques.items()}
        return adapted_copy(layer, parameters_to_adapt(layer), name, parts)
    except ValueError as reason:
        raise ValueError(f"{layer_name(path)}: {reason}") from reason


def store_parameters(
    module: nn.Module,
    technique: Half | EightBit | FourBit,
    path: str,
    names: Iterable[str],
    store: Callable[[Tensor, str], Any],
    transposed: Container[str] = (),
) -> StoredModule:
    """Return a copy of a dense module in which parameters are stored by ``store``; errors name the weight's path.

    Those in ``transposed`` are given to ``store`` with their last two dimensions swapped, and stored so.
    """
    place = [path]
    squares: list[Squares] = []  # of each weight

    def named_store(tensor: Tensor, name: str) -> Any:
        place[:] = [path if name in ("weight", "bias") else f"{path}.{name}".lstrip(".")]
        stored = store(tensor, name)
        values = stored.packed if isinstance(stored, QuantizedTensor) else stored
        if name != "bias" and not tensor.is_meta and not values.is_meta:
            squares.append(squares_lost(tensor, stored))
        return stored

    wanted = list(names)
    known: Any = LAYERS.get((type(module), technique.bits))
    try:
        if known is not None and transposed:
            raise ValueError(f"a {type(module).__name__} cannot hold a weight that is stored transposed")
        stored = list(wanted)
        if known is not None and wanted == ["weight"] and isinstance(technique, Half):
            stored += ["bias"] * (module._parameters.get("bias") is not None)
        weights = {}
        for name in stored:
            parameter = module._parameters[name]
            assert parameter is not None
            lead = leading_dims(module, parameter)
            if name in transposed:
                if parameter.dim() != lead + 1 or parameter.dim() < 2:
                    raise ValueError(f"{name} of shape {tuple(parameter.shape)} cannot be stored transposed")
                weights[name] = named_store(parameter.mT, name)
                continue
            inside = isinstance(technique, Blockwise) and parameter.dim() > lead + 1
            weights[name] = named_store(parameter.flatten(lead) if inside else parameter, name)
        dtype = technique.compute_dtype if isinstance(technique, Blockwise) else None
        made = stored_copy(module, weights, transposed=transposed, computed_in=dtype)
    except (TypeError, ValueError) as reason:
        raise type(reason)(f"{layer_name(place[0])}: {reason}") from reason
    if squares:
        made.weight_error = Squares.total(squares).error
    return made
