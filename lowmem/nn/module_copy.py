"""Copies of modules in which parameters are stored, or dense again, and the classes of these copies."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lowmem.kernels import Weight
from lowmem.kernels.torch_versions import leave_to_eager
from lowmem.nn.forms import CodedForm, Described, HalfForm, described, freeze, parts_of
from lowmem.nn.module_class import become, copied_module, derived_class
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor

LAYERS: dict[tuple[type[nn.Module], int], type[StoredModule]] = {}
"""(class of a dense layer, bits) -> a class with a faster forward, or the base of generated classes that has it."""

BASES: dict[int, type[StoredModule]] = {16: StoredModule}
"""Bits -> the base of all other generated classes."""


def stored_class(dense: Any, names: tuple[str, ...], bits: int) -> type[StoredModule]:
    """Return the class of modules of class ``dense`` whose parameters ``names`` are stored."""
    base = LAYERS.get((dense, bits), BASES[bits]) if "weight" in names else BASES[bits]
    if issubclass(base, dense):
        if set(names) <= set(base.stored_names):
            return base
        base = BASES[bits]
    body: dict[str, Any] = {name: stored_property(name) for name in names}
    body |= {"dense_class": dense, "stored_names": names, "stored_bits": bits, "__reduce_ex__": _reduce}
    if issubclass(dense, nn.RNNBase):
        body["_flat_weights"] = FLAT_WEIGHTS
    return cast("type[StoredModule]", derived_class(dense, base, **body))


@cache
def stored_property(name: str) -> property:
    """Return a property for a stored parameter ``name``."""

    def get(module: StoredModule) -> Any:
        if name in module.__dict__["_forms"]:
            return module.stored_tensor(name)
        found = module._parameters.get(name)
        return module.__dict__.get(name) if found is None else found  # a plain tensor that a hook has set

    def put(module: StoredModule, value: Any) -> None:
        if name in module.__dict__["_forms"]:
            _assign(module, name, value)
        else:
            module.__dict__[name] = value

    return property(get, put, doc=f"The parameter ``{name}``: a StoredTensor.")


def flat_weights(module: Any) -> list[Any]:
    """Return the weights of a recurrent layer, in the order in which torch's kernels take them."""
    return [getattr(module, name) for name in module.__dict__["_flat_weights_names"]]


leave_to_eager(flat_weights)  # torch.compile runs recurrent layers eagerly, too
FLAT_WEIGHTS = property(flat_weights, lambda module, weights: None)


def _reduce(module: StoredModule, protocol: Any) -> Any:
    return _empty, (module.dense_class, module.stored_names, module.stored_bits), module.__getstate__()


def _empty(dense: type[nn.Module], names: tuple[str, ...], bits: int) -> StoredModule:
    made = stored_class(dense, names, bits)
    return made.__new__(made)


def stored_copy(
    module: nn.Module,
    weights: Mapping[str, Weight],
    *,
    transposed: Container[str] = (),
    computed_in: torch.dtype | None = None,
    **attributes: Any,
) -> StoredModule:
    """Return a copy of a module in which parameters are stored; it has no hooks, and shares everything else.

    Args:
        module: dense.
        weights: for each parameter to store: (*lead, columns), with the leading dimensions of the parameter.
        transposed: names of the parameters that are stored with their last two dimensions transposed.
        computed_in: the ``compute_dtype`` of 4- and 8-bit forms.
        **attributes: further attributes of the copy.

    Raises:
        ValueError: the module has attributes that a stored module has, too.
    """
    forms = {name: described(weight, name in transposed, computed_in) for name, weight in weights.items()}
    plain = getattr(type(module), "_plain_class", type(module))
    made = stored_class(plain, tuple(weights), min(form.bits for form, _ in forms.values()))
    _refuse_collisions(module, made, forms)
    copied = copied_module(module, _with_adapters_of(module, made))
    described_by: dict[str, Described] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        if name not in forms:
            parameters[name] = parameter
            continue
        assert parameter is not None
        form, parts = forms[name]
        lead = leading_dims(module, parameter)
        shape = tuple(parameter.mT.shape if form.transposed else parameter.shape)
        described_by[name] = Described.of(form, shape[:lead], shape[lead:], parameter.dtype)
        if isinstance(form, HalfForm) and parts[0].shape != parameter.shape:
            parts = (freeze(parts[0].view(parameter.shape)),)
        parameters |= parts_of(name, form, parts)
    copied.__dict__.update(
        _parameters=parameters, _forms=described_by, _kept={}, **made.attributes_of(module), **attributes
    )
    if isinstance(module, nn.RNNBase):
        copied.__dict__.pop("_flat_weights", None)
    return copied  # type: ignore[return-value]


def _refuse_collisions(module: nn.Module, made: type[StoredModule], forms: Mapping[str, Any]) -> None:
    """Refuse a module with attributes that the stored module's class, or its parts, would hide."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    parts = {f"{name}_{part}" for name, (form, _) in forms.items() for part in form.parts}
    added = {
        name for name in dir(BASES[made.stored_bits]) if not hasattr(nn.Module, name) and not name.startswith("__")
    }
    hidden = (own & (added | parts)) | {name for name in added if hasattr(type(module), name)}
    if hidden:
        raise ValueError(
            f"{type(module).__name__} has {', '.join(sorted(hidden))} of its own, which a module with stored "
            "parameters has, too: rename it, or leave the module out with skip="
        )


def leading_dims(module: nn.Module, parameter: Tensor) -> int:
    """Return the number of leading dimensions of a parameter: 1 for convolutions, and else all but the last."""
    dims = parameter.dim()
    if isinstance(module, (nn.modules.conv._ConvNd, ParametrizationList)) and dims > 1:
        return 1
    return max(0, dims - 1)


def restored_copy(module: StoredModule, values: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a copy of a module in which the parameters in ``values`` are dense; of the dense class if all are."""
    left = {name: one for name, one in module._forms.items() if name not in values}
    names = tuple(name for name in module.stored_names if name in left)
    made = module.dense_class
    if names:
        made = stored_class(module.dense_class, names, min(one.form.bits for one in left.values()))
    copied = copied_module(module, _with_adapters_of(module, made))
    owners = {f"{one}_{part}": one for one in values for part in module._forms[one].form.parts}
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        owner = owners.get(name)
        if owner is None:
            parameters[name] = parameter
        elif owner not in parameters:
            value = values[owner]
            parameters[owner] = value if value is None or isinstance(value, nn.Parameter) else freeze(value)
    copied.__dict__["_parameters"] = parameters
    for name in ("_forms", "_kept", "weight_error", "chosen_because"):
        copied.__dict__.pop(name, None)
    if names:
        copied.__dict__.update(_forms=left, _kept={})
    if isinstance(copied, nn.RNNBase) and not names:
        copied.__dict__["_flat_weights"] = flat_weights(copied)
    return copied


def _assign(module: StoredModule, name: str, value: Any) -> None:
    """Set a stored parameter: to a stored tensor, or the module is dense again in this parameter."""
    if isinstance(value, StoredTensor):
        _share(module, name, value)
    elif value is None or isinstance(value, nn.Parameter):
        become(module, restored_copy(module, {name: value}))
    else:  # the error that torch raises for a dense parameter
        raise TypeError(
            f"cannot assign {type(value).__name__} as parameter {name!r}, which is stored in "
            f"{module._forms[name].form}: give a torch.nn.Parameter, or None; leave the module out with skip= if "
            "functional_call sets it"
        )


def _share(module: StoredModule, name: str, tensor: StoredTensor) -> None:
    """Set a parameter to a stored tensor of another module; both modules then share its parts."""
    if tensor.swapped != tensor.form.transposed:
        raise RuntimeError(
            f"{name} = weight.T: a transposed stored weight cannot be shared: give weight.dequantize()"
        )
    parts = tensor.__dict__.get("sources", tensor.parts)
    old = module._forms[name].form
    if old.bits != tensor.form.bits:
        _change_class(module, name, tensor)
    for part in old.parts:
        module._parameters.pop(f"{name}_{part}", None)
    form = tensor.form
    if isinstance(form, CodedForm):  # each module has its own compute_dtype
        form = replace(form, compute_dtype=old.compute_dtype)
    module._forms[name] = Described.of(form, tuple(tensor.parts[0].shape[:-1]), tensor.tail, tensor.dtype)
    module._parameters.update(parts_of(name, tensor.form, tuple(map(freeze, parts))))
    module._kept.pop(name, None)


def _change_class(module: StoredModule, name: str, tensor: StoredTensor) -> None:
    """Change a module's class to the one for the form of ``tensor``, which becomes the parameter ``name``."""
    shapes = {one: module.stored_tensor(one) for one in module.forms}
    empty = {one: freeze(torch.empty(own.shape, dtype=own.dtype, device="meta")) for one, own in shapes.items()}
    dense = restored_copy(module, empty)
    weights = {one: own.stored for one, own in shapes.items() if one != name} | {name: tensor.stored}
    become(module, stored_copy(dense, weights))


def _with_adapters_of(module: nn.Module, made: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``made``; if the module has adapters, its subclass with adapters."""
    over: Callable[[type[nn.Module]], type[nn.Module]] | None = getattr(type(module), "_over", None)
    return made if over is None else over(made)
