"""Which layers get an adapter, and of which rank and alpha."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lowmem.nn.adapter import layout_of
from lowmem.nn.techniques import LoRA
from lowmem.transforms.registry import Where, layer_name, module_paths, parameters_to_adapt, place_name, skip_reason
from lowmem.transforms.roles import layer_weights, output_layers, routers

_TOLD_SHARE = 0.2  # of an adapter's numbers; convert warns if more are of ranks that no weight can use


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
    where: Where,
) -> dict[nn.Module, dict[str, LoRA]]:
    """Return the layers that get adapters, each with the technique for its parameters, of their own rank and alpha.

    ``layers`` are those that LoRA supports, and ``where`` selects; without ``where`` output layers and routers are
    left out. A ValueError says that none is left, that a pattern of ``ranks`` or ``alphas`` matches none of them, or
    that an embedding is taken without those that share its weight.
    """
    layers, paths = list(layers), module_paths(model)
    left = {**routers(model), **output_layers(model)} if where is None else {}
    tied = _tied_embeddings(paths)
    known = {
        layer: {
            name: [*own, *(f"{path}.{name}".lstrip(".") for path in own)]
            for own in [[path for one in tied.get(layer, [layer]) for path in paths[one]]]
            for name in parameters_to_adapt(layer)
        }
        for layer in layers
        if layer not in left
    }
    for layer in known:
        without = [layer_name(paths[one][0]) for one in tied.get(layer, ()) if one not in known]
        if without and layer is tied[layer][0]:
            raise ValueError(
                f"{layer_name(paths[layer][0])} shares its weight with {', '.join(without)}, which get no adapter: "
                "one on it alone changes nothing where only these are called; select them all, or only those"
            )
    if layers and not known:
        raise ValueError(
            f"nothing to adapt: {layer_name(paths[layers[0]][0])} is left out, since {left[layers[0]]}; select it "
            "with where= to adapt it"
        )
    if where is not None:
        _refuse_exclusions(model, where, known)
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


def _refuse_exclusions(model: nn.Module, where: Callable[[str, nn.Module], bool], layers: Collection[Any]) -> None:
    """Raise a ValueError for a ``where`` that only leaves out, if it takes layers that LoRA leaves out by default.

    It is true of the model itself, as ``path != "lm_head"`` is, but not of all modules.
    """
    left, paths = {**routers(model), **output_layers(model)}, module_paths(model)
    more = [layer for layer in layers if layer in left or not takes_adapter(layer)]
    if not more or len(more) == len(layers) or model in layers or not where("", model):
        return
    if all(where(path, module) for module, own in paths.items() for path in own):
        return
    names = [f"{layer_name(paths[layer][0])} ({type(layer).__name__})" for layer in more]
    names[3:] = [f"{len(names) - 3} more"] if len(names) > 3 else []
    raise ValueError(
        f"where= is true of the model itself, and of {', '.join(names)}, which LoRA leaves out by default: skip= "
        "leaves out more than the default, or let where= be true of the layers to adapt alone"
    )


def _tied_embeddings(found: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """Return the embeddings that share a weight with others of their kind, each with all of them in their order."""
    groups: dict[frozenset[int], list[nn.Module]] = {}
    for module in found:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            groups.setdefault(frozenset(layer_weights(module)), []).append(module)
    return {module: group for group in groups.values() if len(group) > 1 for module in group}


def takes_adapter(module: nn.Module, chosen: bool = False) -> bool:
    """Whether adapters can be added to a module; ``chosen``: by ``where=``, which takes all that can have one."""
    return skip_reason(LoRA, module, chosen) is None


def warnings_of_adapters(
    model: nn.Module,
    placed: Mapping[nn.Module, Mapping[str, LoRA]],
) -> list[str]:
    """Return what to warn of before layers get adapters: shared weights, and large ranks."""
    return [*_warning_of_ties(model, placed), *_warning_of_ranks(module_paths(model), placed)]


def _warning_of_ties(model: nn.Module, adapted: Collection[nn.Module]) -> Iterator[str]:
    """Warn of the first linear layer whose weight another has without an adapter: adapters act in their layer."""
    paths, left = module_paths(model), output_layers(model)
    taken = [one for one in paths if isinstance(one, nn.Linear) and one not in left]
    linear: dict[nn.Module, set[int]] = {one: layer_weights(one) for one in taken}
    for layer in adapted:
        without = [one for one in linear if one not in adapted and linear[one] & linear.get(layer, set())]
        if without:
            name, others = layer_name(paths[layer][0]), ", ".join(layer_name(paths[one][0]) for one in without)
            yield (
                f"{name} shares its weight with {others}, which get no adapter: the one of {name} acts in that layer "
                "alone. Select all of them to adapt each"
            )
            return


def _shapes(placed: Mapping[nn.Module, Mapping[str, LoRA]]) -> dict[tuple[nn.Module, str], list[tuple[int, ...]]]:
    """Return the shapes of A (..., rank, in) and B (..., out, rank) by layer and parameter."""
    return {
        (layer, name): list(layout_of(layer, name).shapes(technique.rank).values())
        for layer, own in placed.items()
        for name, technique in own.items()
    }


def _warning_of_ranks(
    paths: Mapping[nn.Module, list[str]], placed: Mapping[nn.Module, Mapping[str, LoRA]]
) -> Iterator[str]:
    """Warn of ranks above the smaller dimension of a weight, the most that its change can have."""
    shapes, useless, total = _shapes(placed), dict[tuple[nn.Module, str], int](), 0
    for key, (a, b) in shapes.items():
        size, rank, least = math.prod(a) + math.prod(b), a[-2], min(a[-1], b[-2])
        total += size
        if rank > least:
            useless[key] = size // rank * (rank - least)
    if sum(useless.values()) <= _TOLD_SHARE * total:
        return
    layer, name = largest = max(useless, key=lambda key: useless[key])
    (*_, rank, inputs), (*_, outputs, _) = shapes[largest]
    place, least = place_name(paths[layer][0], name), min(inputs, outputs)
    more = f", one of {len(useless)} such layers," if len(useless) > 1 else ""
    yield (
        f"{sum(useless.values()) / total:.0%} of the adapter's numbers add nothing: {layer_name(place)} "
        f"({outputs} x {inputs}){more} can use a rank of {least} at most, and gets {rank}; lower rank=, or that of "
        f"such layers alone, as ranks={{{place!r}: {least}}}"
    )
