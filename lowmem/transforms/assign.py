"""Which technique each layer gets: embeddings in 8 bits, a ``Budget``'s choice, ``LoRA`` as it is placed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from lowmem.nn.techniques import CHOICES, Budget, FourBit, LoRA, of_embeddings
from lowmem.transforms.budget import Chosen, Importance, choose, losses_of, together, unit_of
from lowmem.transforms.calibration.sensitivity import importance_of
from lowmem.transforms.placement import place_adapters, takes_adapter
from lowmem.transforms.registry import Step, Technique, Where, layer_name, layer_names, place_name
from lowmem.transforms.roles import embeddings_and_outputs, kept_in_float32
from lowmem.transforms.store import store_parameters
from lowmem.transforms.ties import weight_key


def techniques_by_layer(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    layers: Iterable[nn.Module],
    where: Where,
) -> dict[nn.Module, tuple[Step, ...]]:
    """Return the techniques of each layer that ``convert`` takes, with LoRA as ``place_adapters`` places it.

    Embeddings and output layers get what ``FourBit.embeddings`` says in place of a ``FourBit``, and modules whose
    weights transformers keeps in float32 no narrower ``compute_dtype``.
    """
    chosen: dict[nn.Module, tuple[Step, ...]] = dict.fromkeys(layers, techniques)
    first, *rest = techniques
    if isinstance(first, FourBit):
        wider = (of_embeddings(first), *rest)
        chosen |= {layer: wider for layer in embeddings_and_outputs(model) if layer in chosen}
    for layer, _ in kept_in_float32(model, getattr(first, "compute_dtype", None)):
        if layer in chosen:
            own: Any = chosen[layer][0]
            chosen[layer] = (replace(own, compute_dtype=None), *rest)
    for index, lora in enumerate(techniques):
        if isinstance(lora, LoRA):
            adaptable = [layer for layer in chosen if takes_adapter(layer, where is not None)]
            placed = place_adapters(model, lora, adaptable, where)
            for layer in adaptable:
                after = (placed[layer], *techniques[index + 1 :]) if layer in placed else ()
                chosen[layer] = (*chosen[layer][:index], *after)
    return chosen


def assign(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    found: Mapping[nn.Module, tuple[str, list[str]]],
    where: Where,
    losses: Callable[[str, Tensor], Sequence[float] | None] | None = None,
) -> tuple[dict[nn.Module, tuple[Step, ...]], dict[nn.Module, Chosen]]:
    """Return the techniques of each layer, with a ``Budget`` divided, and what each layer got of the budget."""
    chosen = techniques_by_layer(model, techniques, found, where)
    first, got = techniques[0], dict[nn.Module, Chosen]()
    if isinstance(first, Budget):
        got = divided(model, first, found, losses)
        chosen = {module: (got[module].technique, *steps[1:]) for module, steps in chosen.items()}
    return chosen, got


def divided(
    model: nn.Module,
    budget: Budget,
    found: Mapping[nn.Module, tuple[str, list[str]]],
    losses: Callable[[str, Tensor], Sequence[float] | None] | None = None,
) -> dict[nn.Module, Chosen]:
    """Return what each module gets of a budget; weights of unknown losses, which stay dense, have no part in it.

    ``found`` has the paths of modules and the names of the parameters to store; ``losses`` are as in ``rebuild_all``.
    """
    stored: dict[nn.Module, dict[Hashable, tuple[str, nn.Parameter, Tensor]]] = {}
    for module, (path, names) in found.items():
        own = stored[module] = {}
        for name, tensor in _as_stored(module, path, names).items():
            parameter = cast(nn.Parameter, module._parameters[name])
            own[weight_key(parameter)] = place_name(path, name), parameter, tensor
    groups = together(stored)
    weights: list[dict[Hashable, tuple[str, nn.Parameter, Tensor]]] = []
    for group in groups:
        weights.append({})
        for module in group:
            for key, one in stored[module].items():
                weights[-1].setdefault(key, one)  # a shared weight has the name of the first
    important: Mapping[str, Importance] = {}
    if budget.inputs is not None and losses is None:
        sized = {name: (one, tensor.shape[-1]) for own in weights for name, one, tensor in own.values()}
        important = importance_of(model, budget.inputs, sized)
        if unseen := [name for name in sized if name not in important]:
            text = f"no batch of inputs= reached {layer_names(unseen)}, which get the least bits"
            warnings.warn(text, UserWarning, stacklevel=6)

    def measured(name: str, tensor: Tensor) -> Sequence[float] | None:
        if losses is not None:
            return losses(name, tensor)
        if budget.inputs is not None and name not in important:
            return (0.0,) * len(CHOICES)
        try:
            return losses_of(tensor, important.get(name))
        except (TypeError, ValueError) as reason:
            raise type(reason)(f"{layer_name(name)}: {reason}") from reason

    units = [unit_of({name: tensor for name, _, tensor in own.values()}, measured) for own in weights]
    known = [unit for unit in units if unit is not None]
    chosen = dict(zip(known, choose(known, budget), strict=True))
    unknown = Chosen(budget.choices[0], "")
    of_modules = {
        module: unknown if unit is None else chosen[unit]
        for group, unit in zip(groups, units, strict=True)
        for module in group
    }
    for module, _ in kept_in_float32(model, budget.compute_dtype):
        if module in of_modules:
            got = of_modules[module]
            of_modules[module] = replace(got, technique=replace(got.technique, compute_dtype=None))
    return of_modules


def _as_stored(module: nn.Module, path: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Return parameters of a module in the shapes in which a block-wise technique stores them."""
    found: dict[str, Tensor] = {}

    def note(tensor: Tensor, name: str) -> Any:
        found[name] = tensor
        return CHOICES[0].skeleton(tensor, name)

    store_parameters(module, CHOICES[0], path, names, note)
    return found
