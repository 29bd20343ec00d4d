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
from lowmem.kernels.torch_versions import disable_dynamo
from lowmem.nn.forms import CodedForm, Described, HalfForm, as_frozen_parameter, form_and_frozen_parts, parts_by_name
from lowmem.nn.module_class import derived_class, hookless_shallow_copy, replace_class_and_parameters
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor

LAYERS: dict[tuple[type[nn.Module], int], type[StoredModule]] = {}
"""(class of a dense layer, bits) -> a class with a faster forward, or the base of generated classes that has it."""

BASES: dict[int, type[StoredModule]] = {16: StoredModule}
"""Bits -> the base of all other generated classes."""


def stored_module_class(dense_class: Any, parameter_names: tuple[str, ...], bits: int) -> type[StoredModule]:
    """Return the class of modules of class ``dense_class`` whose parameters ``parameter_names`` are stored."""
    base = LAYERS.get((dense_class, bits), BASES[bits]) if "weight" in parameter_names else BASES[bits]
    if issubclass(base, dense_class):
        if set(parameter_names) <= set(base.stored_names):
            return base
        base = BASES[bits]
    body: dict[str, Any] = {name: stored_parameter_property(name) for name in parameter_names}
    body |= {
        "dense_class": dense_class,
        "stored_names": parameter_names,
        "stored_bits": bits,
        "__reduce_ex__": _reduce_stored_module,
    }
    if issubclass(dense_class, nn.RNNBase):
        body["_flat_weights"] = FLAT_WEIGHTS
    return cast("type[StoredModule]", derived_class(dense_class, base, **body))


@cache
def stored_parameter_property(parameter_name: str) -> property:
    """Return a property for a stored parameter ``parameter_name``."""

    def get_stored_parameter(module: StoredModule) -> Any:
        if parameter_name in module.__dict__["_forms"]:
            return module.stored_tensor(parameter_name)
        parameter = module._parameters.get(parameter_name)
        return (
            module.__dict__.get(parameter_name) if parameter is None else parameter
        )  # a plain tensor that a hook has set

    def assign_parameter_or_attribute(module: StoredModule, value: Any) -> None:
        if parameter_name in module.__dict__["_forms"]:
            _share_stored_or_make_dense(module, parameter_name, value)
        else:
            module.__dict__[parameter_name] = value

    return property(
        get_stored_parameter,
        assign_parameter_or_attribute,
        doc=f"The parameter ``{parameter_name}``: a StoredTensor.",
    )


def rnn_flat_weights(module: Any) -> list[Any]:
    """Return the weights of a recurrent layer, in the order in which torch's kernels take them."""
    return [getattr(module, name) for name in module.__dict__["_flat_weights_names"]]


# torch.compile runs recurrent layers eagerly, too
disable_dynamo(rnn_flat_weights)
FLAT_WEIGHTS = property(rnn_flat_weights, lambda module, weights: None)


def _reduce_stored_module(module: StoredModule, protocol: Any) -> Any:
    return _empty, (module.dense_class, module.stored_names, module.stored_bits), module.__getstate__()


def _empty(dense_class: type[nn.Module], parameter_names: tuple[str, ...], bits: int) -> StoredModule:
    made = stored_module_class(dense_class, parameter_names, bits)
    return made.__new__(made)


def stored_shallow_copy(
    module: nn.Module,
    weights: Mapping[str, Weight],
    *,
    transposed: Container[str] = (),
    compute_dtype: torch.dtype | None = None,
    **attributes: Any,
) -> StoredModule:
    """Return a copy of a module in which parameters are stored; it has no hooks, and shares everything else.

    Args:
        module: dense.
        weights: for each parameter to store: (*lead, columns), with the leading dimensions of the parameter.
        transposed: names of the parameters that are stored with their last two dimensions transposed.
        compute_dtype: the ``compute_dtype`` of 4- and 8-bit forms.
        **attributes: further attributes of the copy.

    Raises:
        ValueError: the module has attributes that a stored module has, too.
    """
    forms = {
        name: form_and_frozen_parts(weight, name in transposed, compute_dtype) for name, weight in weights.items()
    }
    plain = getattr(type(module), "_plain_class", type(module))
    made = stored_module_class(plain, tuple(weights), min(form.bits for form, _ in forms.values()))
    _check_no_attribute_collisions(module, made, forms)
    copied = hookless_shallow_copy(module, _class_with_same_adapters(module, made))
    described_by: dict[str, Described] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        if name not in forms:
            parameters[name] = parameter
            continue
        assert parameter is not None
        form, parts = forms[name]
        lead = parameter_leading_dim_count(module, parameter)
        shape = tuple(parameter.mT.shape if form.transposed else parameter.shape)
        described_by[name] = Described.from_form(form, shape[:lead], shape[lead:], parameter.dtype)
        if isinstance(form, HalfForm) and parts[0].shape != parameter.shape:
            parts = (as_frozen_parameter(parts[0].view(parameter.shape)),)
        parameters |= parts_by_name(name, form, parts)
    copied.__dict__.update(
        _parameters=parameters,
        _forms=described_by,
        _kept={},
        **made.extra_attributes_from_dense(module),
        **attributes,
    )
    if isinstance(module, nn.RNNBase):
        copied.__dict__.pop("_flat_weights", None)
    return copied  # type: ignore[return-value]


def _check_no_attribute_collisions(
    module: nn.Module, replacement_class: type[StoredModule], forms: Mapping[str, Any]
) -> None:
    """Refuse a module with attributes that the stored module's class, or its parts, would hide."""
    module_attributes = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    parts = {f"{name}_{part}" for name, (form, _) in forms.items() for part in form.parts}
    added = {
        name
        for name in dir(BASES[replacement_class.stored_bits])
        if not hasattr(nn.Module, name) and not name.startswith("__")
    }
    hidden = (module_attributes & (added | parts)) | {name for name in added if hasattr(type(module), name)}
    if hidden:
        raise ValueError(
            f"{type(module).__name__} has {', '.join(sorted(hidden))} of its own, which a module with stored "
            "parameters has, too: rename it, or leave the module out with skip="
        )


def parameter_leading_dim_count(module: nn.Module, parameter: Tensor) -> int:
    """Return the number of leading dimensions of a parameter: 1 for convolutions, and else all but the last."""
    dims = parameter.dim()
    if isinstance(module, (nn.modules.conv._ConvNd, ParametrizationList)) and dims > 1:
        return 1
    return max(0, dims - 1)


def dense_shallow_copy(module: StoredModule, dense_values: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a copy of a module in which the parameters in ``dense_values`` are dense; of the dense class if all
    are."""
    left = {name: entry for name, entry in module._forms.items() if name not in dense_values}
    names = tuple(name for name in module.stored_names if name in left)
    made = module.dense_class
    if names:
        made = stored_module_class(module.dense_class, names, min(entry.form.bits for entry in left.values()))
    copied = hookless_shallow_copy(module, _class_with_same_adapters(module, made))
    owners = {f"{entry}_{part}": entry for entry in dense_values for part in module._forms[entry].form.parts}
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        owner = owners.get(name)
        if owner is None:
            parameters[name] = parameter
        elif owner not in parameters:
            value = dense_values[owner]
            parameters[owner] = (
                value if value is None or isinstance(value, nn.Parameter) else as_frozen_parameter(value)
            )
    copied.__dict__["_parameters"] = parameters
    for name in ("_forms", "_kept", "weight_error", "chosen_because"):
        copied.__dict__.pop(name, None)
    if names:
        copied.__dict__.update(_forms=left, _kept={})
    if isinstance(copied, nn.RNNBase) and not names:
        copied.__dict__["_flat_weights"] = rnn_flat_weights(copied)
    return copied


def _share_stored_or_make_dense(module: StoredModule, parameter_name: str, value: Any) -> None:
    """Set a stored parameter: to a stored tensor, or the module is dense again in this parameter."""
    if isinstance(value, StoredTensor):
        _share_stored_tensor(module, parameter_name, value)
    elif value is None or isinstance(value, nn.Parameter):
        replace_class_and_parameters(module, dense_shallow_copy(module, {parameter_name: value}))
    else:
        # The error that torch raises for a dense parameter
        raise TypeError(
            f"cannot assign {type(value).__name__} as parameter {parameter_name!r}, which is stored in "
            f"{module._forms[parameter_name].form}: give a torch.nn.Parameter, or None; leave the module out with "
            "skip= if "
            "functional_call sets it"
        )


def _share_stored_tensor(module: StoredModule, parameter_name: str, tensor: StoredTensor) -> None:
    """Set a parameter to a stored tensor of another module; both modules then share its parts."""
    if tensor.swapped != tensor.form.transposed:
        raise RuntimeError(
            f"{parameter_name} = weight.T: a transposed stored weight cannot be shared: give weight.dequantize()"
        )
    parts = tensor.__dict__.get("sources", tensor.parts)
    old = module._forms[parameter_name].form
    if old.bits != tensor.form.bits:
        _change_class_for_form(module, parameter_name, tensor)
    for part in old.parts:
        module._parameters.pop(f"{parameter_name}_{part}", None)
    form = tensor.form
    # Each module has its own compute_dtype
    if isinstance(form, CodedForm):
        form = replace(form, compute_dtype=old.compute_dtype)
    module._forms[parameter_name] = Described.from_form(
        form, tuple(tensor.parts[0].shape[:-1]), tensor.tail, tensor.dtype
    )
    module._parameters.update(parts_by_name(parameter_name, tensor.form, tuple(map(as_frozen_parameter, parts))))
    module._kept.pop(parameter_name, None)


def _change_class_for_form(module: StoredModule, parameter_name: str, tensor: StoredTensor) -> None:
    """Change a module's class to the one for the form of ``tensor``, which becomes the parameter
    ``parameter_name``."""
    shapes = {other_name: module.stored_tensor(other_name) for other_name in module.forms}
    empty = {
        other_name: as_frozen_parameter(torch.empty(stored_tensor.shape, dtype=stored_tensor.dtype, device="meta"))
        for other_name, stored_tensor in shapes.items()
    }
    dense = dense_shallow_copy(module, empty)
    weights = {
        other_name: stored_tensor.kernel_weight
        for other_name, stored_tensor in shapes.items()
        if other_name != parameter_name
    } | {parameter_name: tensor.kernel_weight}
    replace_class_and_parameters(module, stored_shallow_copy(dense, weights))


def _class_with_same_adapters(module: nn.Module, replacement_class: type[nn.Module]) -> type[nn.Module]:
    """Return ``replacement_class``; if the module has adapters, its subclass with adapters."""
    over: Callable[[type[nn.Module]], type[nn.Module]] | None = getattr(type(module), "_adapted_class_over", None)
    return replacement_class if over is None else over(replacement_class)
