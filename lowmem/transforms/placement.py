"""Which layers get an adapter, and of which rank and alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from lowmem.nn.lora import LoRA, LoRALinear
from lowmem.transforms.registry import ADAPTED, Technique, layer_name, module_paths, read_by_attention

__all__ = ["output_layers", "place_adapters", "takes_adapter", "techniques_by_layer"]


def output_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that compute a language model's logits, each with the reason why it counts as one.

    These are what a ``get_output_embeddings()`` of the model or of a module in it returns, as Hugging Face models
    have it; every layer that shares a weight with that; and every linear layer whose weight is tied to an embedding.
    An adapter over them is as large as the vocabulary.
    """
    found = module_paths(model)
    why: dict[nn.Module, str] = {}
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):  # how models say that they have none
                continue
            if isinstance(head, nn.Module):
                why |= dict.fromkeys(head.modules(), "it is the model's output layer")
    named = {weight: found[module][0] for module in found if module in why for weight in _weights(module)}
    tied = {
        weight: found[module][0]
        for module in found
        if isinstance(module, nn.Embedding)
        for weight in _weights(module)
    }
    for module in found:
        for weight in _weights(module):
            if weight in named:
                why.setdefault(module, f"its weight is that of the output layer `{layer_name(named[weight])}`")
            elif weight in tied and takes_adapter(module):
                why.setdefault(module, f"its weight is tied to the embedding `{layer_name(tied[weight])}`")
    return why


def place_adapters(
    model: nn.Module,
    technique: LoRA,
    layers: Iterable[nn.Module],
    where: Callable[[str, nn.Module], bool] | None,
) -> dict[nn.Module, LoRA]:
    """Return the layers that get an adapter, each with the technique of its own rank and alpha.

    Args:
        model: has the layers.
        technique: with patterns.
        layers: that LoRA supports, and ``where`` selects.
        where: None leaves output layers out.

    Raises:
        ValueError: all are output layers, or a pattern of ``ranks`` or ``alphas`` matches none of the rest.
    """
    layers, paths = list(layers), module_paths(model)
    left = output_layers(model) if where is None else {}
    placed = {layer: technique.at(paths[layer]) for layer in layers if layer not in left}
    if layers and not placed:
        raise ValueError(
            f"nothing to adapt: {layer_name(paths[layers[0]][0])} is left out, since {left[layers[0]]}; select it "
            "with where= to adapt it"
        )
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
    model: nn.Module,
    techniques: tuple[Technique, ...],
    layers: Iterable[nn.Module],
    where: Callable[[str, nn.Module], bool] | None,
) -> dict[nn.Module, tuple[Technique, ...]]:
    """Return the techniques of each layer that ``convert`` takes, with LoRA as ``place_adapters`` places it.

    Raises:
        ValueError: as ``place_adapters``.
    """
    inside = read_by_attention(model)
    storing = tuple(technique for technique in techniques if not isinstance(technique, LoRA))
    chosen = {layer: storing if layer in inside else techniques for layer in layers}
    adaptable = [layer for layer in chosen if takes_adapter(layer) and layer not in inside]
    for index, lora in enumerate(techniques):
        if isinstance(lora, LoRA):
            placed = place_adapters(model, lora, adaptable, where)
            for layer in adaptable:
                own = (placed[layer], *techniques[index + 1 :]) if layer in placed else ()
                chosen[layer] = (*techniques[:index], *own)
    return chosen


def takes_adapter(module: nn.Module) -> bool:
    """Whether an adapter can be added to a module of this type."""
    return type(module) in ADAPTED or isinstance(module, LoRALinear)


def _weights(module: nn.Module) -> set[int]:
    """Return the ids of a layer's own parameters, or of its base's, without the bias."""
    base = module.base if isinstance(module, LoRALinear) else module
    return {id(p) for name, p in base._parameters.items() if p is not None and not name.startswith("bias")}
