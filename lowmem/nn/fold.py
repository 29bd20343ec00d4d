"""Merges adapters into a copy of a module, and removes them from one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.forms import as_frozen_parameter
from lowmem.nn.gathered_weight import GatheredTensor
from lowmem.nn.module_class import hookless_shallow_copy
from lowmem.nn.module_copy import dense_shallow_copy, rnn_flat_weights
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.quantize_tensor import checked_rounded_copy, relative_error, requantize_changed_rows
from lowmem.quant.tensor import QuantizedTensor


class MergedCopyAndErrors(NamedTuple):
    """A module with adapters merged into its weights, and the errors of these weights.

    Attributes:
        layer: the copy of the module without adapters, with those merged.
        errors: for each adapted parameter, ``rms(weight - adapted) / rms(adapted)``, first for the module's weight
            without adapters, then for the weight that the copy stores. ``adapted`` is the exact sum.
    """

    layer: nn.Module
    errors: Mapping[str, tuple[float, float]]


def merged_copy_and_errors(
    module: Any, adapter_names: Iterable[str], dtype: torch.dtype | None = None
) -> MergedCopyAndErrors:
    """Return a copy of a module without adapters, with those of ``adapter_names`` merged into its parameters.

    The module does not change. Parameters whose adapters change nothing keep their bytes.

    Args:
        module: an ``AdaptedModule``.
        adapter_names: of the adapters to merge.
        dtype: dtype of a dense copy; None: parameters are stored in the same form as in the module.

    Raises:
        ValueError: an adapted weight is not finite, or exceeds the range of the dtype or scales.
    """
    adapter_names, bank = list(adapter_names), module.adapters
    base = unadapted_shallow_copy(module)
    dense: dict[str, Tensor] = {}
    made: dict[str, Any] = {}
    errors: dict[str, tuple[float, float]] = {}
    for parameter in dict.fromkeys(
        adapted_name for name in adapter_names for adapted_name in bank.adapters_by_parameter(name)
    ):
        base_parameter = unadapted_parameter(module, parameter)
        stored: Any = (
            base_parameter.kernel_weight if isinstance(base_parameter, StoredTensor) else base_parameter.detach()
        )
        adapted = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.detach()
        added = [
            part for name in adapter_names if (part := bank.adapters_by_parameter(name).get(parameter)) is not None
        ]
        added = [part for part in added if not part.is_zero()]
        swapped = (
            isinstance(base_parameter, StoredTensor) and base_parameter.swapped
        )  # stored as the parameter's transpose
        order = base_parameter.order if isinstance(base_parameter, GatheredTensor) else None
        for part in added:
            delta = part.delta().mT if swapped else part.delta()
            delta = delta if order is None else delta.index_select(-1, order)
            adapted = adapted + delta.reshape(adapted.shape)
        if dtype is not None:
            new: Any = checked_rounded_copy(adapted, dtype, parameter)
            shown = new.mT.contiguous() if swapped else new
            dense[parameter] = shown if order is None else shown.index_select(-1, order.argsort())
        elif isinstance(stored, QuantizedTensor):
            new = made[parameter] = requantize_changed_rows(stored, adapted) if added else stored
        else:
            new = made[parameter] = checked_rounded_copy(adapted, stored.dtype, parameter) if added else stored
        errors[parameter] = relative_error(adapted, stored), relative_error(adapted, new)
    folded = (
        _replace_with_merged_parameters(base, made) if dtype is None else _dense_copy_in_dtype(base, dense, dtype)
    )
    return MergedCopyAndErrors(folded, errors)


def unadapted_shallow_copy(module: Any) -> nn.Module:
    """Return a copy of a module without its adapters; it has no hooks, and shares everything else."""
    copied = hookless_shallow_copy(module, module._plain_class)
    copied._modules.pop("adapters")
    hooks = copied.__dict__["_load_state_dict_post_hooks"]
    other_hooks = [(key, hook) for key, hook in hooks.items() if hook is not remerge]
    copied.__dict__["_load_state_dict_post_hooks"] = type(hooks)(other_hooks)
    if isinstance(copied, nn.RNNBase) and not isinstance(copied, StoredModule):
        copied.__dict__["_flat_weights"] = rnn_flat_weights(copied)
    return copied


def remerge(module: Any, _: object) -> None:
    """After a state_dict was loaded, merge the merged adapter again, from the new values."""
    bank = module.adapters
    if bank.merged_name is not None:
        name = bank.merged_name
        # Stays unmerged if the loaded values cannot be merged
        bank.drop_merged_copy()
        bank.adopt_merged_copy(name, merged_copy_and_errors(module, [name]).layer)


def _replace_with_merged_parameters(module_copy: nn.Module, merged_weights: Mapping[str, Any]) -> nn.Module:
    """Set parameters of ``module_copy``, a copy of a module, to merged ones of the same form; return it."""
    attributes = module_copy.__dict__
    attributes["_parameters"] = dict(attributes["_parameters"])
    if isinstance(module_copy, StoredModule):
        attributes.update(_forms=dict(module_copy._forms), _kept={})
    for name, value in merged_weights.items():
        if isinstance(module_copy, StoredModule) and name in module_copy._forms:
            form = module_copy._forms[name]
            shaped = value.view(*form.rows, *form.tail) if isinstance(value, Tensor) else value
            module_copy.set_stored_weight(name, shaped, form.tail, form.dtype)
        else:
            before = module_copy._parameters[name]
            assert before is not None
            module_copy._parameters[name] = nn.Parameter(value.view(before.shape), requires_grad=before.requires_grad)
    return module_copy


def _dense_copy_in_dtype(module: nn.Module, merged_values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module in which all parameters are dense and have the dtype ``dtype``."""
    values: dict[str, Tensor | None] = {}
    if isinstance(module, StoredModule):
        for name in module.forms:
            tensor, value = module.stored_tensor(name), merged_values.get(name)
            value = tensor.dequantize(dtype) if value is None else value
            values[name] = as_frozen_parameter(value.view(tensor.shape))
        dense_copy = dense_shallow_copy(module, values)
    else:
        dense_copy = hookless_shallow_copy(module, type(module))
    parameters: dict[str, Any] = {}
    for name, parameter in dense_copy._parameters.items():
        value = merged_values.get(name, parameter)
        if parameter is not None and value is not None and name not in values:
            rounded = checked_rounded_copy(value, dtype, name).view(parameter.shape)
            parameter = nn.Parameter(rounded, requires_grad=parameter.requires_grad)
        parameters[name] = parameter
    dense_copy.__dict__["_parameters"] = parameters
    return dense_copy
