"""Which layers get an adapter, and of which rank and alpha."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from lowmem.nn.lora import LoRA, LoRALinear
from lowmem.transforms.registry import REGISTRY, Technique, module_paths

__all__ = ["place_adapters", "techniques_by_layer"]


def place_adapters(model: nn.Module, technique: LoRA, layers: Iterable[nn.Module]) -> dict[nn.Module, LoRA]:
    """Return the layers that get an adapter, each with the technique of its own rank and alpha.

    Args:
        model: has the layers.
        technique: with patterns.
        layers: that LoRA supports.

    Raises:
        ValueError: a pattern of ``ranks`` or ``alphas`` that matches none of the layers.
    """
    paths = module_paths(model)
    placed = {layer: technique.at(paths[layer]) for layer in layers}
    adapted = [path for layer in placed for path in paths[layer]]
    for name in ("ranks", "alphas"):
        for pattern, _ in getattr(technique, name):
            if not any(fnmatchcase(path, pattern) for path in adapted):
                raise ValueError(
                    f"{name}: pattern {pattern!r} matches no layer of {type(model).__name__} that gets an adapter; "
                    "check the pattern"
                )
    return placed


def techniques_by_layer(
    model: nn.Module, techniques: tuple[Technique, ...], layers: Iterable[nn.Module]
) -> dict[nn.Module, tuple[Technique, ...]]:
    """Return the techniques of each layer that ``convert`` takes, with LoRA as ``place_adapters`` places it.

    Raises:
        ValueError: as ``place_adapters``.
    """
    chosen = dict.fromkeys(layers, techniques)
    adaptable = [layer for layer in chosen if (LoRA, type(layer)) in REGISTRY or isinstance(layer, LoRALinear)]
    for lora in (technique for technique in techniques if isinstance(technique, LoRA)):
        for layer, own in place_adapters(model, lora, adaptable).items():
            chosen[layer] = tuple(own if technique is lora else technique for technique in techniques)
    return chosen
