"""Makes stored parameters dense again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import short_repr
from lowmem.nn.forms import as_frozen_parameter
from lowmem.nn.module_class import replace_class_and_parameters
from lowmem.nn.module_copy import dense_shallow_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.resident import release_memory_after_call
from lowmem.transforms.model_checks import check_layers_are_changeable, check_model_is_changeable, check_not_prepared
from lowmem.transforms.module_registry import all_paths_by_module, layer_display_name, set_or_clear_dense_reasons
from lowmem.transforms.module_replacement import let_integrations_adopt_model, with_model_lock
from lowmem.transforms.module_selection import first_path_by_selected_module
from lowmem.transforms.tied_weights import owners_and_paths_by_parameter_id

M = TypeVar("M", bound=nn.Module)


@release_memory_after_call
@with_model_lock
def restore(
    model: M,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    skip: str | Iterable[str] = (),
    dtype: torch.dtype | str | None = None,
) -> M:
    """Make stored parameters dense again: modules get their own class back, and values as ``dequantize`` gives them.

    Dense parameters do not require gradients; shared ones stay shared. Adapters are kept: their bases become dense.
    A call of the model by another thread meanwhile may fail.

    Args:
        model: any module; the root itself can be the layer.
        where, skip: as in ``convert``.
        dtype: of what is restored, and of all other floating-point parameters and saved buffers of the modules that
            ``where`` and ``skip`` select, such as norms; not of adapters. A name, as "bfloat16", is taken, too. With
            None, restored weights have the dtype as which they present themselves, which casts of the model follow,
            and the rest stays as it is.

    Returns:
        The model, changed in place; one that stores nothing is only cast to ``dtype``.

    Raises:
        TypeError: the model is not a module, or ``dtype`` is not floating point.
        RuntimeError: inference mode is active, or was when a parameter was made. Or the model is prepared for
            training.
        ValueError: nothing is stored in the modules that are selected, a module that is left shares what they store
            (or, with ``dtype``, any parameter), ``dtype`` cannot hold a value, ``skip`` matches nothing, a module is
            sharded or has no values, or the model is wrapped for several processes. The model is left as it was.
    """
    dtype = None if dtype is None else parse_floating_dtype(dtype)
    check_model_is_changeable("restore", model)
    check_not_prepared("restore", {module: path for path, module in model.named_modules()})
    selected = first_path_by_selected_module(model, where, skip)
    stored_modules = {module: path for module, path in selected.items() if isinstance(module, StoredModule)}
    if not stored_modules and any(isinstance(module, StoredModule) for module in model.modules()):
        raise ValueError(f"no module of {type(model).__name__} that where= and skip= leave has stored parameters")
    check_layers_are_changeable("restore", stored_modules)
    _check_ties_restored_together(model, stored_modules)
    cast_to = {} if dtype is None else _cast_dense_tensors_by_module(model, selected, dtype)
    dense: dict[int, nn.Parameter] = {}
    copies: dict[StoredModule, nn.Module] = {}
    for module in stored_modules:
        values: dict[str, Tensor | None] = {}
        for name in module.forms:
            tensor = module.stored_tensor(name)
            if id(tensor) not in dense:
                dense[id(tensor)] = as_frozen_parameter(tensor.dequantize(dtype).contiguous().clone())
            values[name] = dense[id(tensor)]
        copies[module] = dense_shallow_copy(module, values)
    for old, copied in copies.items():
        replace_class_and_parameters(old, copied)
    for layer, tensors in cast_to.items():
        for name, tensor in tensors.items():
            (layer._parameters if name in layer._parameters else layer._buffers)[name] = tensor
        if isinstance(layer, nn.RNNBase):
            layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    set_or_clear_dense_reasons(dict.fromkeys(stored_modules, "lowmem.restore made it dense"))
    let_integrations_adopt_model(model)
    return model


def parse_floating_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating-point dtype that is given as itself or by its name; anything else is a TypeError."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise TypeError(
            f"dtype={short_repr(dtype)} must be a floating-point dtype of torch or its name, as 'bfloat16' is"
        )
    return named


def _check_ties_restored_together(model: nn.Module, modules_to_restore: Mapping[StoredModule, str]) -> None:
    """Raise a ValueError if a module that is left shares what is to become dense, which would untie them."""
    owners = owners_and_paths_by_parameter_id(model)
    for module, path in modules_to_restore.items():
        for owner, other in (
            owner_and_path
            for part in module.part_parameter_names
            for owner_and_path in owners[id(getattr(module, part))]
        ):
            if owner not in modules_to_restore:
                raise ValueError(
                    f"{layer_display_name(path)}: what it stores is shared with {layer_display_name(other)}, which "
                    "where= and skip= "
                    "leave: restore both, or neither"
                )


def _cast_dense_tensors_by_module(
    model: nn.Module, module_paths_to_cast: Mapping[nn.Module, str], dtype: torch.dtype
) -> dict[nn.Module, dict[str, Any]]:
    """Return the dense parameters and saved buffers of modules in another dtype; a ValueError if that cannot be."""
    taken = dict(module_paths_to_cast)
    for module, path in list(taken.items()):
        if isinstance(module, nn.MultiheadAttention):  # which reads these parameters itself
            taken.setdefault(module.out_proj, f"{path}.out_proj".lstrip("."))
    outside_paths: dict[int, str] = {}
    for layer, paths in all_paths_by_module(model).items():
        if layer not in taken:
            outside_paths.update((id(tensor), paths[0]) for tensor in _dense_saved_tensors_by_name(layer).values())
    made: dict[int, Tensor] = {}
    cast_to: dict[nn.Module, dict[str, Any]] = {}
    for module, path in taken.items():
        for name, tensor in _dense_saved_tensors_by_name(module).items():
            if not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            if id(tensor) in outside_paths:
                raise ValueError(
                    f"{layer_display_name(path)}: its {name} is shared with "
                    f"{layer_display_name(outside_paths[id(tensor)])}, which stays "
                    f"{tensor.dtype}: call restore(model) without dtype=, then model.to({dtype})"
                )
            if id(tensor) not in made:
                rounded = tensor.detach().to(dtype)
                beyond = None if tensor.is_meta else tensor.detach()[rounded.isinf() & ~tensor.isinf()]
                if beyond is not None and beyond.numel():
                    raise ValueError(
                        f"{layer_display_name(path)}: {name} holds the magnitude {float(beyond.abs().max()):.6g}, "
                        "above "
                        f"{torch.finfo(dtype).max:.6g}, the most that {dtype} can hold; take dtype=torch.bfloat16"
                    )
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = (
                    nn.Parameter(rounded, requires_grad=tensor.requires_grad) if is_parameter else rounded
                )
            cast_to.setdefault(module, {})[name] = made[id(tensor)]
    return cast_to


def _dense_saved_tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own dense parameters and saved buffers, by name."""
    if isinstance(module, torch.jit.ScriptModule):
        # Compiled for the dtypes that it has
        return {}
    parts = module.part_parameter_names if isinstance(module, StoredModule) else ()
    tensors = {**module._parameters, **module._buffers}
    left_out = {*parts, *module._non_persistent_buffers_set}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (tensor is None or name in left_out or is_lazy(tensor))
    }
