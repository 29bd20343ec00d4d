"""Makes stored parameters dense again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem.errors import show
from lowmem.nn.forms import freeze
from lowmem.nn.module_class import become
from lowmem.nn.module_copy import restored_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.resident import returns_free_pages
from lowmem.transforms.commit import one_at_a_time, tell_integrations
from lowmem.transforms.refusals import refuse_layers, refuse_model, refuse_prepared
from lowmem.transforms.registry import layer_name, module_paths, note_dense
from lowmem.transforms.select import select_modules
from lowmem.transforms.ties import parameter_owners

M = TypeVar("M", bound=nn.Module)


@returns_free_pages
@one_at_a_time
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
    dtype = None if dtype is None else floating_dtype(dtype)
    refuse_model("restore", model)
    refuse_prepared("restore", {module: path for path, module in model.named_modules()})
    selected = select_modules(model, where, skip)
    found = {module: path for module, path in selected.items() if isinstance(module, StoredModule)}
    if not found and any(isinstance(module, StoredModule) for module in model.modules()):
        raise ValueError(f"no module of {type(model).__name__} that where= and skip= leave has stored parameters")
    refuse_layers("restore", found)
    _refuse_partial_ties(model, found)
    cast_to = {} if dtype is None else _cast_dense(model, selected, dtype)
    dense: dict[int, nn.Parameter] = {}
    copies: dict[StoredModule, nn.Module] = {}
    for module in found:
        values: dict[str, Tensor | None] = {}
        for name in module.forms:
            tensor = module.stored_tensor(name)
            if id(tensor) not in dense:
                dense[id(tensor)] = freeze(tensor.dequantize(dtype).contiguous().clone())
            values[name] = dense[id(tensor)]
        copies[module] = restored_copy(module, values)
    for old, copied in copies.items():
        become(old, copied)
    for layer, tensors in cast_to.items():
        for name, tensor in tensors.items():
            (layer._parameters if name in layer._parameters else layer._buffers)[name] = tensor
        if isinstance(layer, nn.RNNBase):
            layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    note_dense(dict.fromkeys(found, "lowmem.restore made it dense"))
    tell_integrations(model)
    return model


def floating_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating-point dtype that is given as itself or by its name; anything else is a TypeError."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise TypeError(f"dtype={show(dtype)} must be a floating-point dtype of torch or its name, as 'bfloat16' is")
    return named


def _refuse_partial_ties(model: nn.Module, found: Mapping[StoredModule, str]) -> None:
    """Raise a ValueError if a module that is left shares what is to become dense, which would untie them."""
    owners = parameter_owners(model)
    for module, path in found.items():
        for owner, other in (one for part in module.part_names for one in owners[id(getattr(module, part))]):
            if owner not in found:
                raise ValueError(
                    f"{layer_name(path)}: what it stores is shared with {layer_name(other)}, which where= and skip= "
                    "leave: restore both, or neither"
                )


def _cast_dense(
    model: nn.Module, selected: Mapping[nn.Module, str], dtype: torch.dtype
) -> dict[nn.Module, dict[str, Any]]:
    """Return the dense parameters and saved buffers of modules in another dtype; a ValueError if that cannot be."""
    taken = dict(selected)
    for module, path in list(taken.items()):
        if isinstance(module, nn.MultiheadAttention):  # which reads these parameters itself
            taken.setdefault(module.out_proj, f"{path}.out_proj".lstrip("."))
    others: dict[int, str] = {}
    for layer, paths in module_paths(model).items():
        if layer not in taken:
            others.update((id(one), paths[0]) for one in _own_tensors(layer).values())
    made: dict[int, Tensor] = {}
    cast_to: dict[nn.Module, dict[str, Any]] = {}
    for module, path in taken.items():
        for name, one in _own_tensors(module).items():
            if not one.is_floating_point() or one.dtype == dtype:
                continue
            if id(one) in others:
                raise ValueError(
                    f"{layer_name(path)}: its {name} is shared with {layer_name(others[id(one)])}, which stays "
                    f"{one.dtype}: call restore(model) without dtype=, then model.to({dtype})"
                )
            if id(one) not in made:
                rounded = one.detach().to(dtype)
                beyond = None if one.is_meta else one.detach()[rounded.isinf() & ~one.isinf()]
                if beyond is not None and beyond.numel():
                    raise ValueError(
                        f"{layer_name(path)}: {name} holds the magnitude {float(beyond.abs().max()):.6g}, above "
                        f"{torch.finfo(dtype).max:.6g}, the most that {dtype} can hold; take dtype=torch.bfloat16"
                    )
                is_parameter = isinstance(one, nn.Parameter)
                made[id(one)] = nn.Parameter(rounded, requires_grad=one.requires_grad) if is_parameter else rounded
            cast_to.setdefault(module, {})[name] = made[id(one)]
    return cast_to


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own dense parameters and saved buffers, by name."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}  # compiled for the dtypes that it has
    parts = module.part_names if isinstance(module, StoredModule) else ()
    own = {**module._parameters, **module._buffers}
    left_out = {*parts, *module._non_persistent_buffers_set}
    return {name: one for name, one in own.items() if not (one is None or name in left_out or is_lazy(one))}
