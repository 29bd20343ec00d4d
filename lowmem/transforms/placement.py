"""Which layers get an adapter, and of which rank and alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from lowmem.nn.adapted_module import base_of
from lowmem.nn.lora import LoRA
from lowmem.transforms.registry import (
    Step,
    Technique,
    expert_count,
    layer_name,
    module_paths,
    parameters_to_adapt,
    skip_reason,
)

__all__ = [
    "output_layers",
    "place_adapters",
    "place_name",
    "places_of",
    "routers",
    "takes_adapter",
    "techniques_by_layer",
]


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
            elif weight in tied and _computes_products(module):
                why.setdefault(module, f"its weight is tied to the embedding `{layer_name(tied[weight])}`")
    return why


def routers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the linear layers beside a mixture with an output for each expert, with the reason."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        counts = {expert_count(name, child) for name, child in parent.named_children()} - {None}
        for child in parent.children():
            base = base_of(child)
            if isinstance(base, nn.Linear) and base.out_features in counts:
                found[child] = "it chooses experts"
    return found


def place_name(path: str, parameter: str) -> str:
    """Return the name of an adapter's place: its layer's path, and the parameter's name unless it is ``weight``."""
    return path if parameter == "weight" else f"{path}.{parameter}".lstrip(".")


def places_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules and parameters that can have adapters, by all of their places."""
    return {
        place_name(path, name): (module, name)
        for module, paths in module_paths(model).items()
        for path in paths
        for name in parameters_to_adapt(module)
    }


def place_adapters(
    model: nn.Module,
    technique: LoRA,
    layers: Iterable[nn.Module],
    where: Callable[[str, nn.Module], bool] | None,
) -> dict[nn.Module, dict[str, LoRA]]:
    """Return the layers that get adapters, each with the technique for its parameters, of their own rank and alpha.

    Args:
        model: has the layers.
        technique: with patterns, of paths, and of paths with the name of a parameter.
        layers: that LoRA supports, and ``where`` selects.
        where: None leaves output layers and routers out.

    Raises:
        ValueError: all are left out, or a pattern of ``ranks`` or ``alphas`` matches none of the rest.
    """
    layers, paths = list(layers), module_paths(model)
    left = {**routers(model), **output_layers(model)} if where is None else {}
    known = {
        layer: {
            name: [*paths[layer], *(f"{path}.{name}".lstrip(".") for path in paths[layer])]
            for name in parameters_to_adapt(layer)
        }
        for layer in layers
        if layer not in left
    }
    if layers and not known:
        raise ValueError(
            f"nothing to adapt: {layer_name(paths[layers[0]][0])} is left out, since {left[layers[0]]}; select it "
            "with where= to adapt it"
        )
    adapted = [name for of_layer in known.values() for names in of_layer.values() for name in names]
    for kind in ("ranks", "alphas"):
        for pattern, _ in getattr(technique, kind):
            if not any(fnmatchcase(name, pattern) for name in adapted):
                raise ValueError(
                    f"{kind}: pattern {pattern!r} matches no layer of {type(model).__name__} that gets an adapter; "
                    "check the pattern"
                )
    return {
        layer: {name: technique.at(names) for name, names in of_layer.items()} for layer, of_layer in known.items()
    }


def techniques_by_layer(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    layers: Iterable[nn.Module],
    where: Callable[[str, nn.Module], bool] | None,
) -> dict[nn.Module, tuple[Step, ...]]:
    """Return the techniques of each layer that ``convert`` takes, with LoRA as ``place_adapters`` places it.

    Raises:
        ValueError: as ``place_adapters``.
    """
    chosen: dict[nn.Module, tuple[Step, ...]] = dict.fromkeys(layers, techniques)
    adaptable = [layer for layer in chosen if takes_adapter(layer, where is not None)]
    for index, lora in enumerate(techniques):
        if isinstance(lora, LoRA):
            placed = place_adapters(model, lora, adaptable, where)
            for layer in adaptable:
                own = (placed[layer], *techniques[index + 1 :]) if layer in placed else ()
                chosen[layer] = (*techniques[:index], *own)
    return chosen


def takes_adapter(module: nn.Module, chosen: bool = False) -> bool:
    """Whether adapters can be added to a module; ``chosen``: by ``where=``, which takes all that can have one."""
    return skip_reason(LoRA, module, chosen) is None


def _computes_products(module: nn.Module) -> bool:
    return isinstance(base_of(module), nn.Linear)


def _weights(module: nn.Module) -> set[int]:
    """Return the ids of a layer's own parameters, or of its base's, without the bias."""
    base = base_of(module)
    return {id(p) for name, p in base._parameters.items() if p is not None and not name.startswith("bias")}
