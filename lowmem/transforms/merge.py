"""Merges adapters into the weights of their bases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import nn

from lowmem.nn.fourbit import Linear4Bit
from lowmem.nn.lora import LoRALinear
from lowmem.transforms.convert import one_at_a_time, swap
from lowmem.transforms.registry import layer_name, module_paths

__all__ = ["adapted_layers", "fold", "merge"]


@one_at_a_time
def merge(model: nn.Module) -> nn.Module:
    """Merge the active adapters into their bases permanently: ``W + (alpha / rank) B A``.

    Inactive adapters are dropped, so the output does not change. A half-precision weight is rounded once more. A
    4-bit weight is quantized once more, and a warning gives the error that this adds. Parameters stay frozen.
    ``merge_adapter`` merges reversibly.

    Returns:
        The model, changed in place; or the base, when the root itself was a LoRALinear.

    Raises:
        TypeError: the model is not a module.
        ValueError: no LoRALinear is left (merged already?), no adapter is active, or an adapted weight
            cannot be stored. The model is left as it was.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRALinear to merge: it was never adapted, or is merged already"
        )
    if not any(layer.in_use for layer in layers):
        raise ValueError(f"no adapter of {type(model).__name__} is active: activate one, or delete them")
    return swap(model, {layer: layer.base for layer in layers} | fold(model, lambda layer: layer.in_use))


def adapted_layers(model: nn.Module) -> dict[LoRALinear, str]:
    """Return every LoRALinear with its first path.

    Raises:
        TypeError: the model is not a module.
    """
    return {module: paths[0] for module, paths in module_paths(model).items() if isinstance(module, LoRALinear)}


def fold(model: nn.Module, names: Callable[[LoRALinear], Sequence[str]]) -> dict[nn.Module, nn.Module]:
    """Return, for each layer, a copy of the base with the adapters ``names(layer)`` merged, if these are any.

    Raises:
        ValueError: an adapted weight cannot be stored; its path is named.
    """
    folded: dict[nn.Module, nn.Module] = {}
    errors: dict[str, float] = {}
    for layer, path in adapted_layers(model).items():
        if not names(layer):
            continue
        try:
            folded[layer], error = layer.folded(names(layer))
        except ValueError as reason:
            found = str(reason).partition(";")[0]
            raise ValueError(
                f"{layer_name(path)}: the adapted {found}; scale the adapter down, or convert the base otherwise"
            ) from reason
        if isinstance(layer.base, Linear4Bit):
            errors[layer_name(path)] = error
    if errors:
        worst = max(errors, key=errors.__getitem__)
        warnings.warn(
            f"merge quantized {len(errors)} adapted weights to 4 bits again: that adds a relative error of "
            f"{sum(errors.values()) / len(errors):.3g} on average, at most {errors[worst]:.3g} ({worst})",
            stacklevel=4,  # the caller of the function that one_at_a_time wraps
        )
    return folded
