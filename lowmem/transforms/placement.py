"""Which layers get an adapter, and of which rank and alpha; and which get one that nobody has named."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from lowmem.nn.adapter import layout_of
from lowmem.nn.techniques import LoRA
from lowmem.transforms.registry import Where, layer_name, module_paths, parameters_to_adapt, skip_reason
from lowmem.transforms.roles import layer_weights, output_layers, routers

_TOLD_SHARE = 0.2  # of an adapter's numbers; convert warns if more are of ranks that no weight can use


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
    where: Where,
) -> list[str]:
    """Return what to warn of before layers get adapters: shared weights, layers that nobody named, large ranks."""
    unnamed = _warning_of_unnamed(model, placed, where)
    return [*_warning_of_ties(model, placed), *unnamed, *_warning_of_ranks(module_paths(model), placed)]


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


def _warning_of_unnamed(
    model: nn.Module,
    placed: Mapping[nn.Module, Mapping[str, LoRA]],
    where: Where,
) -> Iterator[str]:
    """Warn of adapters on layers that LoRA leaves out without ``where``, where that has only left out others: a
    ``where`` names a layer if it is true of the layer and not of the module around it."""
    if where is None:
        return
    left = {**routers(model), **output_layers(model)}
    more = [layer for layer in placed if layer in left or not takes_adapter(layer)]
    paths, modules = module_paths(model), dict(model.named_modules(remove_duplicate=False))

    def is_unnamed(path: str) -> bool:
        around = path.rpartition(".")[0]
        return bool(path) and where(around, modules[around])

    unnamed = [layer for layer in more if all(map(is_unnamed, paths[layer]))]
    if not unnamed or len(more) == len(placed) or all(where(p, one) for one, own in paths.items() for p in own):
        return
    sizes = {key: sum(map(math.prod, shapes)) for key, shapes in _shapes(placed).items()}
    largest = sorted((key for key in sizes if key[0] in unnamed), key=lambda key: -sizes[key])
    told = [
        f"{layer_name(place_name(paths[layer][0], name))} ({type(layer).__name__})" for layer, name in largest[:3]
    ]
    more_text = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    share = sum(sizes[key] for key in largest) / sum(sizes.values())
    yield (
        f"where= gave adapters to layers that LoRA leaves out by default, {share:.0%} of the adapter's numbers: "
        f"{', '.join(told)}{more_text}. skip= keeps the default and leaves more out; a where= that is true of such a "
        "layer, not of the module around it takes it without this warning"
    )


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
