"""Which modules and parameters a call converts: ``where``, ``skip``, ``parameters``, and ties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import check_callable_with, short_repr
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import LoRA
from lowmem.transforms.adapter_placement import can_have_adapter
from lowmem.transforms.model_checks import (
    check_layers_are_changeable,
    check_model_is_changeable,
    check_no_foreign_tensor_class,
    check_no_peft_conflict,
    check_not_prepared,
)
from lowmem.transforms.module_registry import (
    ModuleFilter,
    Technique,
    all_paths_by_module,
    applied_technique_type_or_none,
    conversion_skip_reason,
    layer_display_name,
    layer_or_parameter_path,
    matching_entry_or_none,
    set_or_clear_dense_reasons,
    storable_parameter_names,
    supported_module_kinds_text,
)
from lowmem.transforms.tied_weights import check_and_record_byte_range, drop_partial_ties, weight_memory_key


def first_path_by_selected_module(
    model: nn.Module, where: ModuleFilter, skip: str | Iterable[str]
) -> dict[nn.Module, str]:
    """Return the modules that ``where`` and ``skip`` select, each with its first path; bad ones are errors."""
    left = _exclusion_reason_by_module(model, where, skip)
    return {module: paths[0] for module, paths in all_paths_by_module(model).items() if left[module] is None}


def record_user_exclusions(
    model: nn.Module, where: ModuleFilter, skip: str | Iterable[str], technique_type: type[Technique]
) -> None:
    """Record which modules ``where`` and ``skip`` left dense; LoRA's choice counts where no weight is stored."""
    if technique_type is not LoRA or not any(isinstance(module, StoredModule) for module in model.modules()):
        set_or_clear_dense_reasons(_exclusion_reason_by_module(model, where, skip))


def _exclusion_reason_by_module(
    model: nn.Module, where: ModuleFilter, skip: str | Iterable[str]
) -> dict[nn.Module, str | None]:
    """Return which argument leaves each module out; None where both select it."""
    paths_by_module = all_paths_by_module(model)
    if where is not None:
        check_callable_with("where", where, "callable with a path and a module, or None", "", model)
    skip = (skip,) if isinstance(skip, str) or not isinstance(skip, Iterable) else tuple(skip)
    if not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"skip={short_repr(skip)} must be glob patterns of paths")
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for paths in paths_by_module.values() for path in paths):
            raise ValueError(
                f"skip={short_repr(pattern)} matches no module of {type(model).__name__}; check the pattern"
            )
    left: dict[nn.Module, str | None] = {}
    for module, paths in paths_by_module.items():
        matched = next(
            (skip_pattern for skip_pattern in skip if any(fnmatchcase(path, skip_pattern) for path in paths)), None
        )
        if matched is not None:
            left[module] = f"skip={matched!r} leaves it out"
        else:
            taken = where is None or all(where(path, module) for path in paths)
            left[module] = None if taken else "where= leaves it out"
    return left


def select_paths_and_names_by_module(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    where: ModuleFilter,
    skip: str | Iterable[str],
    parameter_filter: Callable[[str, Tensor], bool] | None = None,
) -> dict[nn.Module, tuple[str, list[str]]]:
    """Return the modules that the first technique converts, each with its first path and the parameters to store.

    Raises as ``convert`` for models and arguments that it rejects.
    """
    first = type(techniques[0])
    check_model_is_changeable("convert", model)
    check_not_prepared("convert", {module: path for path, module in model.named_modules()})
    if parameter_filter is not None:
        check_callable_with("parameters", parameter_filter, "callable with a path and a parameter, or None", "", None)
    if first is LoRA and parameter_filter is not None:
        raise ValueError(
            "parameters= names what FourBit, EightBit or Half store besides; LoRA alone stores nothing: leave it out"
        )
    selection: dict[nn.Module, tuple[str, list[str]]] = {}
    selected = first_path_by_selected_module(model, where, skip)
    for module, path in selected.items():
        made = applied_technique_type_or_none(module)
        if made is not None and made in {type(t) for t in techniques}:
            remedy = "add another with add_adapter" if made is LoRA else "convert a model once"
            raise ValueError(
                f"{layer_display_name(path)} is a {type(module).__name__}: it has {made.__name__} already; "
                f"{remedy}, or leave the layer out with skip="
            )
        names = (
            storable_parameter_names(module)
            if conversion_skip_reason(first, module, where is not None) is None
            else []
        )
        if parameter_filter is not None and made is None:
            names += [name for name in _extra_parameter_names(module, path, parameter_filter) if name not in names]
        if names:
            selection[module] = path, names
    # LoRA keeps the weight, and with it all ties
    if first is LoRA:
        selection = {m: (path, []) for m, path in selected.items() if can_have_adapter(m, where is not None)}
    else:
        if parameter_filter is not None and not any(
            set(n) - set(storable_parameter_names(m)) for m, (_, n) in selection.items()
        ):
            raise ValueError(
                "parameters= chose no further parameter of two or more dimensions: check what it returns"
            )
        drop_partial_ties(model, selection)
    check_layers_are_changeable("convert", {module: path for module, (path, _) in selection.items()}, allow_meta=True)
    if first is not LoRA:
        _check_storable_parameters(model, selection)
    check_no_peft_conflict(model, selection, will_freeze=any(isinstance(t, LoRA) for t in techniques))
    if not selection:
        raise ValueError(nothing_to_convert_message(first, model, selected, where is not None))
    return selection


def _extra_parameter_names(
    module: nn.Module, path: str, parameter_filter: Callable[[str, Tensor], bool]
) -> list[str]:
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not isinstance(module, torch.jit.ScriptModule)
        and not is_lazy(parameter)
        and parameter.is_floating_point()
        and parameter.dim() >= 2
        and parameter.numel()
        and parameter_filter(f"{path}.{name}".lstrip("."), parameter)
    ]


def _check_storable_parameters(model: nn.Module, selection: dict[nn.Module, tuple[str, list[str]]]) -> None:
    """Raise for parameters that cannot be stored on their own: sparse ones, and views of others, stored or not."""
    seen: dict[int, list[tuple[str, Hashable, range]]] = {}
    known: set[int] = set()
    for module, (path, names) in selection.items():
        for name in names:
            parameter: Any = module._parameters[name]
            place = layer_display_name(layer_or_parameter_path(path, name))
            leave = (
                f"leave it as it is, skip={path!r}, or convert the model before another library changes its weights"
            )
            check_no_foreign_tensor_class("convert", layer_or_parameter_path(path, name), parameter, leave)
            if parameter.layout is not torch.strided:
                raise ValueError(f"{place} has layout={parameter.layout}: make it dense (to_dense()), or use skip=")
            known.add(id(parameter))
            check_and_record_byte_range(seen, place, weight_memory_key(parameter), parameter)
    # What stays dense
    for path, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided
        shares = plain and id(parameter) not in known and parameter.untyped_storage()._cdata in seen
        # A view would be cut off, and keep the memory
        if shares:
            check_and_record_byte_range(seen, layer_display_name(path.removesuffix(".weight")), None, parameter)


def nothing_to_convert_message(
    technique_type: type[Technique],
    model: nn.Module,
    selected_paths: Mapping[nn.Module, str],
    has_where: bool,
) -> str:
    """Return the error text for a model without layers to convert: what was looked for, what was found, and why the
    first of the ``selected_paths`` modules of a known kind is left; ``has_where`` tells that ``where=`` selected
    them."""
    type_counts = Counter(
        type(module).__name__ for module in all_paths_by_module(model) if not list(module.children())
    )
    listed = ", ".join(f"{name} x{count}" for name, count in sorted(type_counts.items()))
    known = {
        path: layer
        for layer, path in selected_paths.items()
        if matching_entry_or_none(layer) is not None or isinstance(layer, AdaptedModule | torch.jit.ScriptModule)
    }
    whys = {path: (layer, conversion_skip_reason(technique_type, layer, has_where)) for path, layer in known.items()}
    why = next(
        (
            f"; {layer_display_name(p)} is a {type(layer).__name__}: {text}"
            for p, (layer, text) in whys.items()
            if text
        ),
        "",
    )
    if has_where and not selected_paths:
        paths = [path for all_paths in all_paths_by_module(model).values() for path in all_paths]
        examples = ", ".join(map(layer_display_name, paths[-3:]))
        why = f"; where= and skip= leave no module: where= gets paths as {examples}"
    return (
        f"nothing to convert: {technique_type.__name__} looks for {supported_module_kinds_text(technique_type)}, "
        "with a weight "
        f"of its own, not left out by where= or skip=; found {listed or 'no layers'}{why}"
    )
