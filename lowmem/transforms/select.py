"""Which modules and parameters a call converts: ``where``, ``skip``, ``parameters``, and ties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import check_function, show
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.placement import takes_adapter
from lowmem.transforms.refusals import refuse_layers, refuse_model, refuse_peft, refuse_prepared, refuse_wrapped
from lowmem.transforms.registry import (
    Technique,
    Where,
    entry_of,
    layer_name,
    made_by,
    module_paths,
    note_dense,
    parameters_to_store,
    place_name,
    skip_reason,
    supported_types,
)
from lowmem.transforms.ties import drop_partial_ties, refuse_overlap, weight_key


def select_modules(model: nn.Module, where: Where, skip: str | Iterable[str]) -> dict[nn.Module, str]:
    """Return the modules that ``where`` and ``skip`` select, each with its first path; bad ones are errors."""
    left = _left_by(model, where, skip)
    return {module: paths[0] for module, paths in module_paths(model).items() if left[module] is None}


def note_left(model: nn.Module, where: Where, skip: str | Iterable[str], technique: type[Technique]) -> None:
    """Record which modules ``where`` and ``skip`` left dense; LoRA's choice counts where no weight is stored."""
    if technique is not LoRA or not any(isinstance(module, StoredModule) for module in model.modules()):
        note_dense(_left_by(model, where, skip))


def _left_by(model: nn.Module, where: Where, skip: str | Iterable[str]) -> dict[nn.Module, str | None]:
    """Return which argument leaves each module out; None where both select it."""
    found = module_paths(model)
    if where is not None:
        check_function("where", where, "callable with a path and a module, or None", "", model)
    skip = (skip,) if isinstance(skip, str) or not isinstance(skip, Iterable) else tuple(skip)
    if not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip={show(skip)} must be glob patterns of paths")
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for paths in found.values() for path in paths):
            raise ValueError(f"skip={show(pattern)} matches no module of {type(model).__name__}; check the pattern")
    left: dict[nn.Module, str | None] = {}
    for module, paths in found.items():
        matched = next((one for one in skip if any(fnmatchcase(path, one) for path in paths)), None)
        if matched is not None:
            left[module] = f"skip={matched!r} leaves it out"
        else:
            taken = where is None or all(where(path, module) for path in paths)
            left[module] = None if taken else "where= leaves it out"
    return left


def select_to_convert(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: Where,
    skip: str | Iterable[str],
    parameters: Callable[[str, Tensor], bool] | None = None,
) -> dict[nn.Module, tuple[str, list[str]]]:
    """Return the modules that the first technique converts, each with its first path and the parameters to store.

    Raises as ``convert`` for models and arguments that it rejects.
    """
    first = type(techniques[0])
    refuse_model("convert", model)
    refuse_prepared("convert", {module: path for path, module in model.named_modules()})
    if parameters is not None:
        check_function("parameters", parameters, "callable with a path and a parameter, or None", "", None)
    if first is LoRA and parameters is not None:
        raise ValueError(
            "parameters= names what FourBit, EightBit or Half store besides; LoRA alone stores nothing: leave it out"
        )
    found: dict[nn.Module, tuple[str, list[str]]] = {}
    selected = select_modules(model, where, skip)
    for module, path in selected.items():
        made = made_by(module)
        if made is not None and made in {type(t) for t in techniques}:
            remedy = "add another with add_adapter" if made is LoRA else "convert a model once"
            raise ValueError(
                f"{layer_name(path)} is a {type(module).__name__}: it has {made.__name__} already; "
                f"{remedy}, or leave the layer out with skip="
            )
        names = parameters_to_store(module) if skip_reason(first, module, where is not None) is None else []
        if parameters is not None and made is None:
            names += [name for name in _more_parameters(module, path, parameters) if name not in names]
        if names:
            found[module] = path, names
    if first is LoRA:  # LoRA keeps the weight, and with it all ties
        found = {m: (path, []) for m, path in selected.items() if takes_adapter(m, where is not None)}
    else:
        if parameters is not None and not any(set(n) - set(parameters_to_store(m)) for m, (_, n) in found.items()):
            raise ValueError(
                "parameters= chose no further parameter of two or more dimensions: check what it returns"
            )
        drop_partial_ties(model, found)
    refuse_layers("convert", {module: path for module, (path, _) in found.items()}, empty=True)
    if first is not LoRA:
        _check_parameters(model, found)
    refuse_peft(model, found, freezes=any(isinstance(t, LoRA) for t in techniques))
    if not found:
        raise ValueError(no_match_message(first, model, selected, where is not None))
    return found


def _more_parameters(module: nn.Module, path: str, parameters: Callable[[str, Tensor], bool]) -> list[str]:
    return [
        name
        for name, one in module._parameters.items()
        if one is not None
        and not isinstance(module, torch.jit.ScriptModule)
        and not is_lazy(one)
        and one.is_floating_point()
        and one.dim() >= 2
        and one.numel()
        and parameters(f"{path}.{name}".lstrip("."), one)
    ]


def _check_parameters(model: nn.Module, found: dict[nn.Module, tuple[str, list[str]]]) -> None:
    """Raise for parameters that cannot be stored on their own: sparse ones, and views of others, stored or not."""
    seen: dict[int, list[tuple[str, Hashable, range]]] = {}
    known: set[int] = set()
    for module, (path, names) in found.items():
        for name in names:
            parameter: Any = module._parameters[name]
            place = layer_name(place_name(path, name))
            leave = (
                f"leave it as it is, skip={path!r}, or convert the model before another library changes its weights"
            )
            refuse_wrapped("convert", place_name(path, name), parameter, leave)
            if parameter.layout is not torch.strided:
                raise ValueError(f"{place} has layout={parameter.layout}: make it dense (to_dense()), or use skip=")
            known.add(id(parameter))
            refuse_overlap(seen, place, weight_key(parameter), parameter)
    for path, parameter in model.named_parameters():  # what stays dense
        plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided
        shares = plain and id(parameter) not in known and parameter.untyped_storage()._cdata in seen
        if shares:  # a view would be cut off, and keep the memory
            refuse_overlap(seen, layer_name(path.removesuffix(".weight")), None, parameter)


def no_match_message(
    technique: type[Technique],
    model: nn.Module,
    selected: Mapping[nn.Module, str],
    chosen: bool,
) -> str:
    """Return the error text for a model without layers to convert: what was looked for, what was found, and why the
    first of the ``selected`` modules of a known kind is left; ``chosen`` tells that ``where=`` selected them."""
    found = Counter(type(module).__name__ for module in module_paths(model) if not list(module.children()))
    listed = ", ".join(f"{name} x{count}" for name, count in sorted(found.items()))
    known = {
        path: one
        for one, path in selected.items()
        if entry_of(one) is not None or isinstance(one, AdaptedModule | torch.jit.ScriptModule)
    }
    whys = {path: (one, skip_reason(technique, one, chosen)) for path, one in known.items()}
    why = next(
        (f"; {layer_name(p)} is a {type(one).__name__}: {text}" for p, (one, text) in whys.items() if text), ""
    )
    if chosen and not selected:
        paths = [path for own in module_paths(model).values() for path in own]
        why = f"; where= and skip= leave no module: where= gets paths as {', '.join(map(layer_name, paths[-3:]))}"
    return (
        f"nothing to convert: {technique.__name__} looks for {supported_types(technique)}, with a weight "
        f"of its own, not left out by where= or skip=; found {listed or 'no layers'}{why}"
    )
