"""Which layers get an adapter, and of which rank and alpha."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lowmem.nn.adapter import parameter_layout
from lowmem.nn.techniques import LoRA
from lowmem.transforms.layer_roles import output_layer_reason_by_module, router_reason_by_module, weight_parameter_ids
from lowmem.transforms.module_registry import (
    ModuleFilter,
    adaptable_parameter_names,
    all_paths_by_module,
    conversion_skip_reason,
    layer_display_name,
    layer_or_parameter_path,
)

_TOLD_SHARE = 0.2  # of an adapter's numbers; convert warns if more are of ranks that no weight can use


def adaptable_module_and_name_by_path(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules and parameters that can have adapters, by all of their places."""
    return {
        layer_or_parameter_path(path, name): (module, name)
        for module, paths in all_paths_by_module(model).items()
        for path in paths
        for name in adaptable_parameter_names(module)
    }


def adapter_techniques_by_layer(
    model: nn.Module,
    technique: LoRA,
    layers: Iterable[nn.Module],
    where: ModuleFilter,
) -> dict[nn.Module, dict[str, LoRA]]:
    """Return the layers that get adapters, each with the technique for its parameters, of their own rank and alpha.

    ``layers`` are those that LoRA supports, and ``where`` selects; without ``where`` output layers and routers are
    left out. A ValueError says that none is left, that a pattern of ``ranks`` or ``alphas`` matches none of them, or
    that an embedding is taken without those that share its weight.
    """
    layers, paths = list(layers), all_paths_by_module(model)
    left = {**router_reason_by_module(model), **output_layer_reason_by_module(model)} if where is None else {}
    tied = _same_weight_embeddings_by_embedding(paths)
    known = {
        layer: {
            name: [*layer_paths, *(f"{path}.{name}".lstrip(".") for path in layer_paths)]
            for layer_paths in [[path for tied_layer in tied.get(layer, [layer]) for path in paths[tied_layer]]]
            for name in adaptable_parameter_names(layer)
        }
        for layer in layers
        if layer not in left
    }
    for layer in known:
        without = [
            layer_display_name(paths[tied_layer][0]) for tied_layer in tied.get(layer, ()) if tied_layer not in known
        ]
        if without and layer is tied[layer][0]:
            raise ValueError(
                f"{layer_display_name(paths[layer][0])} shares its weight with {', '.join(without)}, which get no "
                "adapter: "
                "one on it alone changes nothing where only these are called; select them all, or only those"
            )
    if layers and not known:
        raise ValueError(
            f"nothing to adapt: {layer_display_name(paths[layers[0]][0])} is left out, since {left[layers[0]]}; "
            "select it "
            "with where= to adapt it"
        )
    if where is not None:
        _check_where_keeps_lora_defaults(model, where, known)
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


def _check_where_keeps_lora_defaults(
    model: nn.Module, where: Callable[[str, nn.Module], bool], adapted_layers: Collection[Any]
) -> None:
    """Raise a ValueError for a ``where`` that only leaves out, if it takes layers that LoRA leaves out by default.

    It is true of the model itself, as ``path != "lm_head"`` is, but not of all modules.
    """
    left, paths = (
        {**router_reason_by_module(model), **output_layer_reason_by_module(model)},
        all_paths_by_module(model),
    )
    more = [layer for layer in adapted_layers if layer in left or not can_have_adapter(layer)]
    if not more or len(more) == len(adapted_layers) or model in adapted_layers or not where("", model):
        return
    if all(where(path, module) for module, all_paths in paths.items() for path in all_paths):
        return
    names = [f"{layer_display_name(paths[layer][0])} ({type(layer).__name__})" for layer in more]
    names[3:] = [f"{len(names) - 3} more"] if len(names) > 3 else []
    raise ValueError(
        f"where= is true of the model itself, and of {', '.join(names)}, which LoRA leaves out by default: skip= "
        "leaves out more than the default, or let where= be true of the layers to adapt alone"
    )


def _same_weight_embeddings_by_embedding(modules: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """Return the embeddings that share a weight with others of their kind, each with all of them in their order."""
    groups: dict[frozenset[int], list[nn.Module]] = {}
    for module in modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            groups.setdefault(frozenset(weight_parameter_ids(module)), []).append(module)
    return {module: group for group in groups.values() if len(group) > 1 for module in group}


def can_have_adapter(module: nn.Module, user_selected: bool = False) -> bool:
    """Whether adapters can be added to a module; ``user_selected``: by ``where=``, which takes all that can have
    one."""
    return conversion_skip_reason(LoRA, module, user_selected) is None


def adapter_warning_texts(
    model: nn.Module,
    layer_techniques: Mapping[nn.Module, Mapping[str, LoRA]],
) -> list[str]:
    """Return what to warn of before layers get adapters: shared weights, and large ranks."""
    return [
        *_iterate_tie_warning_texts(model, layer_techniques),
        *_iterate_rank_warning_texts(all_paths_by_module(model), layer_techniques),
    ]


def _iterate_tie_warning_texts(model: nn.Module, layers_to_adapt: Collection[nn.Module]) -> Iterator[str]:
    """Warn of the first linear layer whose weight another has without an adapter: adapters act in their layer."""
    paths, left = all_paths_by_module(model), output_layer_reason_by_module(model)
    taken = [
        linear_layer for linear_layer in paths if isinstance(linear_layer, nn.Linear) and linear_layer not in left
    ]
    linear: dict[nn.Module, set[int]] = {linear_layer: weight_parameter_ids(linear_layer) for linear_layer in taken}
    for layer in layers_to_adapt:
        without = [
            linear_layer
            for linear_layer in linear
            if linear_layer not in layers_to_adapt and linear[linear_layer] & linear.get(layer, set())
        ]
        if without:
            name, other_names = (
                layer_display_name(paths[layer][0]),
                ", ".join(layer_display_name(paths[linear_layer][0]) for linear_layer in without),
            )
            yield (
                f"{name} shares its weight with {other_names}, which get no adapter: the one of {name} acts in that "
                "layer "
                "alone. Select all of them to adapt each"
            )
            return


def _lora_shapes_by_layer_and_name(
    layer_techniques: Mapping[nn.Module, Mapping[str, LoRA]],
) -> dict[tuple[nn.Module, str], list[tuple[int, ...]]]:
    """Return the shapes of A (..., rank, in) and B (..., out, rank) by layer and parameter."""
    return {
        (layer, name): list(parameter_layout(layer, name).lora_matrix_shapes(technique.rank).values())
        for layer, techniques in layer_techniques.items()
        for name, technique in techniques.items()
    }


def _iterate_rank_warning_texts(
    paths_by_module: Mapping[nn.Module, list[str]], layer_techniques: Mapping[nn.Module, Mapping[str, LoRA]]
) -> Iterator[str]:
    """Warn of ranks above the smaller dimension of a weight, the most that its change can have."""
    shapes, useless, total = _lora_shapes_by_layer_and_name(layer_techniques), dict[tuple[nn.Module, str], int](), 0
    for key, (a, b) in shapes.items():
        size, rank, least = math.prod(a) + math.prod(b), a[-2], min(a[-1], b[-2])
        total += size
        if rank > least:
            useless[key] = size // rank * (rank - least)
    if sum(useless.values()) <= _TOLD_SHARE * total:
        return
    layer, name = largest = max(useless, key=lambda key: useless[key])
    (*_, rank, inputs), (*_, outputs, _) = shapes[largest]
    place, least = layer_or_parameter_path(paths_by_module[layer][0], name), min(inputs, outputs)
    more = f", one of {len(useless)} such layers," if len(useless) > 1 else ""
    yield (
        f"{sum(useless.values()) / total:.0%} of the adapter's numbers add nothing: {layer_display_name(place)} "
        f"({outputs} x {inputs}){more} can use a rank of {least} at most, and gets {rank}; lower rank=, or that of "
        f"such layers alone, as ranks={{{place!r}: {least}}}"
    )
