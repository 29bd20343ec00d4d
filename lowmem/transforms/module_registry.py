"""Which layer types each technique converts, where these are in a model, and why a layer is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from lowmem.errors import printable_line
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import is_transformers_conv1d
from lowmem.nn.adapter_bank import AdapterBank
from lowmem.nn.forms import HalfForm
from lowmem.nn.module_class import hookless_shallow_copy
from lowmem.nn.quantized_module import QuantizedModule
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, LoRA

Technique: TypeAlias = Half | EightBit | FourBit | Budget | LoRA
ModuleFilter: TypeAlias = Callable[[str, nn.Module], bool] | None
"""Selects modules by path; None: all."""
LayerTechnique: TypeAlias = Half | EightBit | FourBit | Budget | LoRA | dict[str, LoRA]
"""A technique for one module: ``LoRA`` as the technique of each parameter that it adapts."""


@dataclass(frozen=True)
class ModuleKindEntry:
    """Modules of one kind, and which of their parameters are stored, or adapted by ``LoRA``.

    Args:
        kind: what errors call it.
        matches: whether a module is of this kind.
        parameters: the names of what is stored; those that a module lacks, or has as None, are left out.
        dense_reason: why a module of this kind is left dense, or None.
        computation: how a call computes with what is stored; "as stored": in products and gathers of codes.
        no_adapter_reason: why no module of this kind can have an adapter, or a function that says why one cannot, or
            None.
        opt_in_reason: why ``LoRA`` takes modules of this kind only where ``where=`` selects them; None: it takes
            them.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    parameters: Callable[[nn.Module], Iterable[str]] = lambda module: ("weight",)
    dense_reason: Callable[[nn.Module], str | None] = lambda module: None
    computation: Callable[[nn.Module], str] = lambda module: "as stored"
    no_adapter_reason: str | Callable[[nn.Module], str | None] = lambda module: None
    opt_in_reason: str | None = None


def _isinstance_predicate(*module_types: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, module_types)


def _max_norm_dense_reason_or_none(module: nn.Module) -> str | None:
    if getattr(module, "max_norm", None) is None:
        return None
    return "max_norm rescales its rows in place: rescale all rows once (torch.renorm), and set max_norm = None"


def _max_mode_no_adapter_reason_or_none(module: nn.Module) -> str | None:
    largest = isinstance(module, nn.EmbeddingBag) and module.mode == "max"
    return "LoRA has no form of it: the largest of several rows is not linear in them" if largest else None


def _linear_subclass_dense_reason_or_none(module: nn.Module) -> str | None:
    if type(module).forward is nn.Linear.forward or is_weight_only_multiplied(module):
        return None
    return "a subclass of Linear that computes something else: where= or parameters= takes it nevertheless"


def _is_expert_stack(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("expert" in name or "moe" in name) and bool(_expert_weight_names(module))


def _expert_weight_names(module: nn.Module) -> list[str]:
    parameters = module._parameters.items()
    shaped = [(name, parameter) for name, parameter in parameters if parameter is not None and not is_lazy(parameter)]
    return [name for name, parameter in shaped if parameter.dim() >= 3 and "bias" not in name]


def expert_count_or_none(child_name: str, module: nn.Module) -> int | None:
    """Return the number of experts of a mixture, as stacks of matrices or a list of modules; else None."""
    if isinstance(module, nn.ModuleList) and "expert" in child_name:
        return len(module)
    if not _is_expert_stack(module):
        return None
    return int(module._parameters[_expert_weight_names(module)[0]].shape[0])  # type: ignore[union-attr]


def _is_xlnet_attention(module: nn.Module) -> bool:
    return any(kind.__name__ == "XLNetRelativeAttention" for kind in type(module).__mro__)


def _is_weight_norm_parametrization(module: nn.Module) -> bool:
    """Whether a module holds magnitude and direction of a weight, which is dequantized at each call."""
    return isinstance(module, ParametrizationList) and [
        type(parametrization).__name__ for parametrization in module
    ] == ["_WeightNorm"]


def _rnn_computation_text(module: nn.Module) -> str:
    """Return how: torch gives an LSTM to one operator of a library, which takes dense weights."""
    return "dequantized, a layer at a time" if isinstance(module, nn.LSTM) else "as stored"


def _linear_subclass_computation_text(module: nn.Module) -> str:
    dense = module.dense_class if isinstance(module, StoredModule) else type(module)
    return "as stored" if dense.forward is nn.Linear.forward or is_weight_only_multiplied(module) else _AS_READ


_AS_READ = "as its module reads it"
_REMOVE = ": torch.nn.utils.parametrize.remove_parametrizations makes it a parameter"
_RNN = (nn.RNNBase, nn.RNNCellBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# A new kind of module is one line here; the first that fits serves.
ENTRIES = (
    ModuleKindEntry(
        "Linear",
        _isinstance_predicate(nn.Linear),
        dense_reason=_linear_subclass_dense_reason_or_none,
        computation=_linear_subclass_computation_text,
    ),
    ModuleKindEntry(
        "Embedding",
        _isinstance_predicate(nn.Embedding, nn.EmbeddingBag),
        dense_reason=_max_norm_dense_reason_or_none,
        no_adapter_reason=lambda module: (
            _max_norm_dense_reason_or_none(module) or _max_mode_no_adapter_reason_or_none(module)
        ),
        opt_in_reason="LoRA leaves embeddings out: where= takes them",
    ),
    ModuleKindEntry(
        "convolutions",
        _isinstance_predicate(*_CONVOLUTIONS),
        opt_in_reason="LoRA leaves convolutions out: where= takes them",
    ),
    ModuleKindEntry(
        "Bilinear",
        _isinstance_predicate(nn.Bilinear),
        no_adapter_reason="LoRA has no form of it: both of its inputs are contracted with one weight",
    ),
    ModuleKindEntry(
        "MultiheadAttention",
        _isinstance_predicate(nn.MultiheadAttention),
        lambda _: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
    ModuleKindEntry(
        "LSTM, GRU and RNN",
        _isinstance_predicate(*_RNN),
        lambda module: [name for name in module._parameters if name.startswith("weight_")],
        computation=_rnn_computation_text,
        opt_in_reason="LoRA leaves recurrent layers out: where= takes them",
    ),
    ModuleKindEntry("Conv1D of transformers", is_transformers_conv1d),
    ModuleKindEntry("experts", _is_expert_stack, _expert_weight_names),
    ModuleKindEntry(
        "XLNet's attention",
        _is_xlnet_attention,
        lambda _: "qkvor",
        no_adapter_reason="LoRA has no form of it: its heads lie inside its matrices",
    ),
    ModuleKindEntry(
        "weight norm",
        _is_weight_norm_parametrization,
        lambda _: ("original1",),
        computation=lambda _: "dequantized in chunks, to a dense weight at each call",
        no_adapter_reason="a parametrization computes a weight from it",
    ),
)


def is_weight_only_multiplied(linear: nn.Module) -> bool:
    """Whether a subclass of nn.Linear reads its weight in products alone: found by a call on the meta device."""
    probe = _DequantizationProbe.reset_and_make_for_weight(linear)
    kind = linear.dense_class if isinstance(linear, StoredModule) else type(linear)
    copied = hookless_shallow_copy(linear, kind)
    copied.__dict__["_parameters"] = {
        name: None if parameter is None else parameter.detach().to("meta")
        for name, parameter in linear._parameters.items()
    } | {"weight": probe}
    copied.__dict__["_buffers"] = {name: None if b is None else b.to("meta") for name, b in linear._buffers.items()}
    try:
        read: Any = linear.in_features
        with torch.no_grad():
            kind.forward(copied, torch.empty(2, read, device="meta", dtype=probe.dtype))
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises on the meta device: it is not known to be linear
        return False
    return not _DequantizationProbe.dequantized


class _DequantizationProbe(StoredTensor):
    """A stored weight on the meta device that notes whether something dequantizes it."""

    dequantized: ClassVar[bool]

    @classmethod
    def reset_and_make_for_weight(cls, module: nn.Module) -> _DequantizationProbe:
        """Return a probe in place of a module's weight."""
        weight: Any = module.weight
        cls.dequantized = False
        half = torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
        return cls(HalfForm(torch.bfloat16), (half,), weight.shape[1:], weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        _DequantizationProbe.dequantized = True
        return super().dequantize(dtype)


# The attribute that holds it: copies of a module keep it, and files do not
_DENSE_BECAUSE = "_dense_because"


def set_or_clear_dense_reasons(reasons: Mapping[nn.Module, str | None]) -> None:
    """Record why modules with parameters of their own stay dense; None forgets it."""
    for module, why in reasons.items():
        vars(module).pop(_DENSE_BECAUSE, None)
        if why is not None and module._parameters:
            vars(module)[_DENSE_BECAUSE] = why


def recorded_dense_reason_or_none(module: nn.Module) -> str | None:
    """Return why a call left a module dense, or made it dense; None if no call did."""
    reason: str | None = vars(module).get(_DENSE_BECAUSE)
    return reason


def applied_technique_type_or_none(module: nn.Module) -> type[Technique] | None:
    """Return the technique that converted a module; None for a dense one."""
    if isinstance(module, AdaptedModule):
        return LoRA
    return storage_technique_type_or_none(module)


def storage_technique_type_or_none(module: nn.Module) -> type[Half | EightBit | FourBit] | None:
    """Return the technique that stores a module's weights, whether it has adapters or not; None for a dense one."""
    if isinstance(module, QuantizedModule):
        return EightBit if module.stored_bits == EightBit.bits else FourBit
    return Half if isinstance(module, StoredModule) else None


def storable_parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a technique stores in a module that an entry fits."""
    entry = matching_entry_or_none(module)
    if entry is None:
        return []
    parameters = module._parameters
    present_names = [name for name in entry.parameters(module) if parameters.get(name) is not None]
    return [name for name in present_names if not _is_empty_parameter(parameters[name])]


def _is_empty_parameter(parameter: Any) -> bool:
    return not is_lazy(parameter) and parameter.numel() == 0


def stored_computation_text(module: nn.Module) -> str:
    """Return how calls compute with what a module stores, as its entry says and calls have shown; "" if dense."""
    if not isinstance(module, StoredModule):
        return ""
    entry = matching_entry_or_none(module)
    how = _AS_READ if entry is None else entry.computation(module)
    readers = ", ".join(sorted(module.dequantized_by))
    return f"dequantized by {readers}" if readers and not how.startswith("dequantized") else how


def matching_entry_or_none(module: nn.Module) -> ModuleKindEntry | None:
    """Return the first entry that fits a module."""
    return next((entry for entry in ENTRIES if entry.matches(module)), None)


def check_is_module(model: object) -> None:
    """Raise a TypeError for a model that is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")


def all_paths_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all of its paths, in the order of ``named_modules``, without adapters."""
    check_is_module(model)
    banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
    of_adapters = {part for bank in banks for part in bank.modules()}
    paths_by_module: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module not in of_adapters:
            paths_by_module.setdefault(module, []).append(path)
    return paths_by_module


def conversion_skip_reason(
    technique_type: type[Technique], module: nn.Module, user_selected: bool = False
) -> str | None:
    """Return why a technique does not convert a module; None where it does.

    ``user_selected`` tells that the user has named the module, which may then be a subclass that computes something
    else.
    """
    # Before the type: parametrizing a module changes its class to a subclass
    if is_parametrized(module):
        return f"its weight or bias is computed by a parametrization{_REMOVE}"
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit.script or trace compiled it for dense weights: convert the module it was made of"
    if technique_type is LoRA:
        return _adapter_skip_reason_or_none(module, user_selected)
    if isinstance(module, AdaptedModule):
        return "it has an adapter: convert the base first"
    if isinstance(module, ParametrizationList) and not _is_weight_norm_parametrization(module):
        return f"a parametrization computes a weight from it{_REMOVE}"
    if isinstance(module, StoredModule):
        return f"it is stored in {next(iter(module.forms.values()), 'another form')} already"
    entry = matching_entry_or_none(module)
    if entry is None:
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(map(is_lazy, parameters)):
            return "it is lazy and has no shape yet: call the model once before convert"
        if parameters and all(parameter.dim() < 2 for parameter in parameters):
            return "vectors (biases, norms) stay dense"
        return f"{technique_type.__name__} has no form of it; parameters= names what to store"
    if not storable_parameter_names(module):
        return _no_storable_parameter_reason(module)
    return None if user_selected and isinstance(module, nn.Linear) else entry.dense_reason(module)


def _no_storable_parameter_reason(module: nn.Module) -> str:
    if any(_is_empty_parameter(parameter) for parameter in module._parameters.values() if parameter is not None):
        return "its weight is empty: there is nothing to store"
    if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return (
            "a hook of torch.nn.utils.weight_norm computes its weight: call remove_weight_norm first, or use "
            "torch.nn.utils.parametrizations.weight_norm, which FourBit, EightBit and Half store"
        )
    return "its weight is no parameter of its own: make it one, as torch.nn.utils.prune.remove does"


def _adapter_skip_reason_or_none(module: nn.Module, user_selected: bool) -> str | None:
    if isinstance(module, AdaptedModule):
        return None
    entry = matching_entry_or_none(module)
    if entry is None:
        return "LoRA has no form of it"
    if not adaptable_parameter_names(module):
        return _no_storable_parameter_reason(module)
    refused = entry.no_adapter_reason if isinstance(entry.no_adapter_reason, str) else entry.no_adapter_reason(module)
    if refused is None and not user_selected:
        computes = None if isinstance(module, StoredModule) else entry.dense_reason(module)
        refused = entry.opt_in_reason or computes
    return refused


def adaptable_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module that can have adapters."""
    if isinstance(module, AdaptedModule):
        return module._adapted_names
    if isinstance(module, StoredModule):
        return tuple(name for name in module.forms if "bias" not in name)
    return tuple(storable_parameter_names(module))


def supported_module_kinds_text(technique_type: type[Technique]) -> str:
    """Return the names of what a technique converts."""
    return ", ".join(
        entry.kind for entry in ENTRIES if technique_type is not LoRA or not isinstance(entry.no_adapter_reason, str)
    )


def abbreviated_layer_names(paths: Sequence[str]) -> str:
    """Return the names of the first three modules at ``paths`` for messages, and how many more there are."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(layer_display_name, paths[:3])) + more


def layer_or_parameter_path(path: str, parameter: str) -> str:
    """Return the name of a parameter's place: its layer's path, and the parameter's name unless it is ``weight``."""
    return path if parameter == "weight" else f"{path}.{parameter}".lstrip(".")


def layer_display_name(path: str) -> str:
    """Return the name of the module at ``path`` for errors."""
    return printable_line(path) or "the model itself"
