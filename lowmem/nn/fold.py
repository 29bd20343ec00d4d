"""Merges adapters into a copy of a module, and removes them from one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowmem.nn.adapter_bank import parameter_of
from lowmem.nn.forms import freeze
from lowmem.nn.gathered_weight import GatheredTensor
from lowmem.nn.module_class import copied_module
from lowmem.nn.module_copy import flat_weights, restored_copy
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.quantize import relative_error, requantize, round_to
from lowmem.quant.tensor import QuantizedTensor


class Folded(NamedTuple):
    """A module with adapters merged into its weights, and the errors of these weights.

    Attributes:
        layer: the copy of the module without adapters, with those merged.
        errors: for each adapted parameter, ``rms(weight - adapted) / rms(adapted)``, first for the module's weight
            without adapters, then for the weight that the copy stores. ``adapted`` is the exact sum.
    """

    layer: nn.Module
    errors: Mapping[str, tuple[float, float]]


def fold_module(module: Any, names: Iterable[str], to: torch.dtype | None = None) -> Folded:
    """Return a copy of a module without adapters, with those of ``names`` merged into its parameters.

    The module does not change. Parameters whose adapters change nothing keep their bytes.

    Args:
        module: an ``AdaptedModule``.
        names: of the adapters to merge.
        to: dtype of a dense copy; None: parameters are stored in the same form as in the module.

    Raises:
        ValueError: an adapted weight is not finite, or exceeds the range of the dtype or scales.
    """
    names, bank = list(names), module.adapters
    base = without_adapters(module)
    dense: dict[str, Tensor] = {}
    made: dict[str, Any] = {}
    errors: dict[str, tuple[float, float]] = {}
    for parameter in dict.fromkeys(one for name in names for one in bank.parts(name)):
        own = parameter_of(module, parameter)
        stored: Any = own.stored if isinstance(own, StoredTensor) else own.detach()
        adapted = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.detach()
        added = [part for name in names if (part := bank.parts(name).get(parameter)) is not None]
        added = [part for part in added if not part.changes_nothing()]
        swapped = isinstance(own, StoredTensor) and own.swapped  # stored as the parameter's transpose
        order = own.order if isinstance(own, GatheredTensor) else None
        for part in added:
            delta = part.delta().mT if swapped else part.delta()
            delta = delta if order is None else delta.index_select(-1, order)
            adapted = adapted + delta.reshape(adapted.shape)
        if to is not None:
            new: Any = round_to(adapted, to, parameter)
            shown = new.mT.contiguous() if swapped else new
            dense[parameter] = shown if order is None else shown.index_select(-1, order.argsort())
        elif isinstance(stored, QuantizedTensor):
            new = made[parameter] = requantize(stored, adapted) if added else stored
        else:
            new = made[parameter] = round_to(adapted, stored.dtype, parameter) if added else stored
        errors[parameter] = relative_error(adapted, stored), relative_error(adapted, new)
    folded = _with_parameters(base, made) if to is None else _in_dtype(base, dense, to)
    return Folded(folded, errors)


def without_adapters(module: Any) -> nn.Module:
    """Return a copy of a module without its adapters; it has no hooks, and shares everything else."""
    copied = copied_module(module, module._plain_class)
    copied._modules.pop("adapters")
    hooks = copied.__dict__["_load_state_dict_post_hooks"]
    kept = [(key, hook) for key, hook in hooks.items() if hook is not remerge]
    copied.__dict__["_load_state_dict_post_hooks"] = type(hooks)(kept)
    if isinstance(copied, nn.RNNBase) and not isinstance(copied, StoredModule):
        copied.__dict__["_flat_weights"] = flat_weights(copied)
    return copied


def remerge(module: Any, _: object) -> None:
    """After a state_dict was loaded, merge the merged adapter again, from the new values."""
    bank = module.adapters
    if bank.merged is not None:
        name = bank.merged
        bank.unmerge()  # stays unmerged if the loaded values cannot be merged
        bank.merge(name, fold_module(module, [name]).layer)


def _with_parameters(base: nn.Module, made: Mapping[str, Any]) -> nn.Module:
    """Set parameters of ``base``, a copy of a module, to merged ones of the same form; return it."""
    own = base.__dict__
    own["_parameters"] = dict(own["_parameters"])
    if isinstance(base, StoredModule):
        own.update(_forms=dict(base._forms), _kept={})
    for name, value in made.items():
        if isinstance(base, StoredModule) and name in base._forms:
            form = base._forms[name]
            shaped = value.view(*form.rows, *form.tail) if isinstance(value, Tensor) else value
            base.store(name, shaped, form.tail, form.dtype)
        else:
            before = base._parameters[name]
            assert before is not None
            base._parameters[name] = nn.Parameter(value.view(before.shape), requires_grad=before.requires_grad)
    return base


def _in_dtype(base: nn.Module, dense: Mapping[str, Tensor], to: torch.dtype) -> nn.Module:
    """Return a copy of a module in which all parameters are dense and have the dtype ``to``."""
    values: dict[str, Tensor | None] = {}
    if isinstance(base, StoredModule):
        for name in base.forms:
            shape, value = base.stored_tensor(name).shape, dense.get(name)
            values[name] = freeze((base.stored_tensor(name).dequantize(to) if value is None else value).view(shape))
        base = restored_copy(base, values)
    parameters: dict[str, Any] = {}
    for name, parameter in base._parameters.items():
        value = dense.get(name, parameter)
        if parameter is not None and value is not None and name not in values:
            rounded = round_to(value, to, name).view(parameter.shape)
            parameter = nn.Parameter(rounded, requires_grad=parameter.requires_grad)
        parameters[name] = parameter
    base.__dict__["_parameters"] = parameters
    return base
