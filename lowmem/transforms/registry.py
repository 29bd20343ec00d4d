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

from lowmem.errors import printable
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import is_conv1d
from lowmem.nn.adapter_bank import AdapterBank
from lowmem.nn.coded_module import CodedModule
from lowmem.nn.forms import HalfForm
from lowmem.nn.module_class import copied_module
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.techniques import Budget, EightBit, FourBit, Half, LoRA

Technique: TypeAlias = Half | EightBit | FourBit | Budget | LoRA
Where: TypeAlias = Callable[[str, nn.Module], bool] | None
"""Selects modules by path; None: all."""
Step: TypeAlias = Half | EightBit | FourBit | Budget | LoRA | dict[str, LoRA]
"""A technique for one module: ``LoRA`` as the technique of each parameter that it adapts."""


@dataclass(frozen=True)
class Entry:
    """Modules of one kind, and which of their parameters are stored, or adapted by ``LoRA``.

    Args:
        kind: what errors call it.
        fits: whether a module is of this kind.
        parameters: the names of what is stored; those that a module lacks, or has as None, are left out.
        refuses: why a module of this kind is left dense, or None.
        computes: how a call computes with what is stored; "as stored": in products and gathers of codes.
        no_adapter: why no module of this kind can have an adapter, or a function that says why one cannot, or None.
        asked: why ``LoRA`` takes modules of this kind only where ``where=`` selects them; None: it takes them.
    """

    kind: str
    fits: Callable[[nn.Module], bool]
    parameters: Callable[[nn.Module], Iterable[str]] = lambda module: ("weight",)
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    computes: Callable[[nn.Module], str] = lambda module: "as stored"
    no_adapter: str | Callable[[nn.Module], str | None] = lambda module: None
    asked: str | None = None


def _is(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kinds)


def _refuse_max_norm(module: nn.Module) -> str | None:
    if getattr(module, "max_norm", None) is None:
        return None
    return "max_norm rescales its rows in place: rescale all rows once (torch.renorm), and set max_norm = None"


def _refuse_largest(module: nn.Module) -> str | None:
    largest = isinstance(module, nn.EmbeddingBag) and module.mode == "max"
    return "LoRA has no form of it: the largest of several rows is not linear in them" if largest else None


def _refuse_other_linear(module: nn.Module) -> str | None:
    if type(module).forward is nn.Linear.forward or computes_linear(module):
        return None
    return "a subclass of Linear that computes something else: where= or parameters= takes it nevertheless"


def _is_experts(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("expert" in name or "moe" in name) and bool(_expert_weights(module))


def _expert_weights(module: nn.Module) -> list[str]:
    found = module._parameters.items()
    shaped = [(name, one) for name, one in found if one is not None and not is_lazy(one)]
    return [name for name, one in shaped if one.dim() >= 3 and "bias" not in name]


def expert_count(name: str, module: nn.Module) -> int | None:
    """Return the number of experts of a mixture, as stacks of matrices or a list of modules; else None."""
    if isinstance(module, nn.ModuleList) and "expert" in name:
        return len(module)
    if not _is_experts(module):
        return None
    return int(module._parameters[_expert_weights(module)[0]].shape[0])  # type: ignore[union-attr]


def _is_xlnet_attention(module: nn.Module) -> bool:
    return any(kind.__name__ == "XLNetRelativeAttention" for kind in type(module).__mro__)


def _is_weight_norm(module: nn.Module) -> bool:
    """Whether a module holds magnitude and direction of a weight, which is dequantized at each call."""
    return isinstance(module, ParametrizationList) and [type(one).__name__ for one in module] == ["_WeightNorm"]


def _computes_rnn(module: nn.Module) -> str:
    """Return how: torch gives an LSTM to one operator of a library, which takes dense weights."""
    return "dequantized, a layer at a time" if isinstance(module, nn.LSTM) else "as stored"


def _computes_subclass(module: nn.Module) -> str:
    dense = module.dense_class if isinstance(module, StoredModule) else type(module)
    return "as stored" if dense.forward is nn.Linear.forward or computes_linear(module) else _AS_READ


_AS_READ = "as its module reads it"
_REMOVE = ": torch.nn.utils.parametrize.remove_parametrizations makes it a parameter"
_RNN = (nn.RNNBase, nn.RNNCellBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# A new kind of module is one line here; the first that fits serves.
ENTRIES = (
    Entry("Linear", _is(nn.Linear), refuses=_refuse_other_linear, computes=_computes_subclass),
    Entry(
        "Embedding",
        _is(nn.Embedding, nn.EmbeddingBag),
        refuses=_refuse_max_norm,
        no_adapter=lambda module: _refuse_max_norm(module) or _refuse_largest(module),
        asked="LoRA leaves embeddings out: where= takes them",
    ),
    Entry("convolutions", _is(*_CONVOLUTIONS), asked="LoRA leaves convolutions out: where= takes them"),
    Entry(
        "Bilinear",
        _is(nn.Bilinear),
        no_adapter="LoRA has no form of it: both of its inputs are contracted with one weight",
    ),
    Entry(
        "MultiheadAttention",
        _is(nn.MultiheadAttention),
        lambda _: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
    Entry(
        "LSTM, GRU and RNN",
        _is(*_RNN),
        lambda module: [name for name in module._parameters if name.startswith("weight_")],
        computes=_computes_rnn,
        asked="LoRA leaves recurrent layers out: where= takes them",
    ),
    Entry("Conv1D of transformers", is_conv1d),
    Entry("experts", _is_experts, _expert_weights),
    Entry(
        "XLNet's attention",
        _is_xlnet_attention,
        lambda _: "qkvor",
        no_adapter="LoRA has no form of it: its heads lie inside its matrices",
    ),
    Entry(
        "weight norm",
        _is_weight_norm,
        lambda _: ("original1",),
        computes=lambda _: "dequantized in chunks, to a dense weight at each call",
        no_adapter="a parametrization computes a weight from it",
    ),
)


def computes_linear(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear reads its weight in products alone: found by a call on the meta device."""
    probe = _Probe.of(module)
    kind = module.dense_class if isinstance(module, StoredModule) else type(module)
    copied = copied_module(module, kind)
    copied.__dict__["_parameters"] = {
        name: None if one is None else one.detach().to("meta") for name, one in module._parameters.items()
    } | {"weight": probe}
    copied.__dict__["_buffers"] = {name: None if b is None else b.to("meta") for name, b in module._buffers.items()}
    try:
        read: Any = module.in_features
        with torch.no_grad():
            kind.forward(copied, torch.empty(2, read, device="meta", dtype=probe.dtype))
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises on the meta device: it is not known to be linear
        return False
    return not _Probe.dequantized


class _Probe(StoredTensor):
    """A stored weight on the meta device that notes whether something dequantizes it."""

    dequantized: ClassVar[bool]

    @classmethod
    def of(cls, module: nn.Module) -> _Probe:
        """Return a probe in place of a module's weight."""
        weight: Any = module.weight
        cls.dequantized = False
        half = torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
        return cls(HalfForm(torch.bfloat16), (half,), weight.shape[1:], weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        _Probe.dequantized = True
        return super().dequantize(dtype)


_DENSE_BECAUSE = "_dense_because"  # the attribute that holds it: copies of a module keep it, and files do not


def note_dense(whys: Mapping[nn.Module, str | None]) -> None:
    """Record why modules with parameters of their own stay dense, for ``dense_because``; None forgets it."""
    for module, why in whys.items():
        vars(module).pop(_DENSE_BECAUSE, None)
        if why is not None and module._parameters:
            vars(module)[_DENSE_BECAUSE] = why


def dense_because(module: nn.Module) -> str | None:
    """Return why a call left a module dense, or made it dense; None if no call did."""
    found: str | None = vars(module).get(_DENSE_BECAUSE)
    return found


def made_by(module: nn.Module) -> type[Technique] | None:
    """Return the technique that converted a module; None for a dense one."""
    if isinstance(module, AdaptedModule):
        return LoRA
    return stored_by(module)


def stored_by(module: nn.Module) -> type[Half | EightBit | FourBit] | None:
    """Return the technique that stores a module's weights, whether it has adapters or not; None for a dense one."""
    if isinstance(module, CodedModule):
        return EightBit if module.stored_bits == EightBit.bits else FourBit
    return Half if isinstance(module, StoredModule) else None


def parameters_to_store(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a technique stores in a module that an entry fits."""
    entry = entry_of(module)
    if entry is None:
        return []
    found = module._parameters
    there = [name for name in entry.parameters(module) if found.get(name) is not None]
    return [name for name in there if not _is_empty(found[name])]


def _is_empty(parameter: Any) -> bool:
    return not is_lazy(parameter) and parameter.numel() == 0


def how_computed(module: nn.Module) -> str:
    """Return how calls compute with what a module stores, as its entry says and calls have shown; "" if dense."""
    if not isinstance(module, StoredModule):
        return ""
    entry = entry_of(module)
    how = _AS_READ if entry is None else entry.computes(module)
    readers = ", ".join(sorted(module.dequantized_by))
    return f"dequantized by {readers}" if readers and not how.startswith("dequantized") else how


def entry_of(module: nn.Module) -> Entry | None:
    """Return the first entry that fits a module."""
    return next((entry for entry in ENTRIES if entry.fits(module)), None)


def check_module(model: object) -> None:
    """Raise a TypeError for a model that is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")


def module_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with all of its paths, in the order of ``named_modules``, without adapters."""
    check_module(model)
    banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
    of_adapters = {part for bank in banks for part in bank.modules()}
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module not in of_adapters:
            found.setdefault(module, []).append(path)
    return found


def skip_reason(technique: type[Technique], module: nn.Module, chosen: bool = False) -> str | None:
    """Return why a technique does not convert a module; None where it does.

    ``chosen`` tells that the user has named the module, which may then be a subclass that computes something else.
    """
    if is_parametrized(module):  # before the type: parametrizing a module changes its class to a subclass
        return f"its weight or bias is computed by a parametrization{_REMOVE}"
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit.script or trace compiled it for dense weights: convert the module it was made of"
    if technique is LoRA:
        return _adapter_skip_reason(module, chosen)
    if isinstance(module, AdaptedModule):
        return "it has an adapter: convert the base first"
    if isinstance(module, ParametrizationList) and not _is_weight_norm(module):
        return f"a parametrization computes a weight from it{_REMOVE}"
    if isinstance(module, StoredModule):
        return f"it is stored in {next(iter(module.forms.values()), 'another form')} already"
    entry = entry_of(module)
    if entry is None:
        own = [one for one in module._parameters.values() if one is not None]
        if any(map(is_lazy, own)):
            return "it is lazy and has no shape yet: call the model once before convert"
        if own and all(one.dim() < 2 for one in own):
            return "vectors (biases, norms) stay dense"
        return f"{technique.__name__} has no form of it; parameters= names what to store"
    if not parameters_to_store(module):
        return _no_parameter(module)
    return None if chosen and isinstance(module, nn.Linear) else entry.refuses(module)


def _no_parameter(module: nn.Module) -> str:
    if any(_is_empty(one) for one in module._parameters.values() if one is not None):
        return "its weight is empty: there is nothing to store"
    if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return (
            "a hook of torch.nn.utils.weight_norm computes its weight: call remove_weight_norm first, or use "
            "torch.nn.utils.parametrizations.weight_norm, which FourBit, EightBit and Half store"
        )
    return "its weight is no parameter of its own: make it one, as torch.nn.utils.prune.remove does"


def _adapter_skip_reason(module: nn.Module, chosen: bool) -> str | None:
    if isinstance(module, AdaptedModule):
        return None
    entry = entry_of(module)
    if entry is None:
        return "LoRA has no form of it"
    if not parameters_to_adapt(module):
        return _no_parameter(module)
    refused = entry.no_adapter if isinstance(entry.no_adapter, str) else entry.no_adapter(module)
    if refused is None and not chosen:
        computes = None if isinstance(module, StoredModule) else entry.refuses(module)
        refused = entry.asked or computes
    return refused


def parameters_to_adapt(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a module that can have adapters."""
    if isinstance(module, AdaptedModule):
        return module._adapted_names
    if isinstance(module, StoredModule):
        return tuple(name for name in module.forms if "bias" not in name)
    return tuple(parameters_to_store(module))


def supported_types(technique: type[Technique]) -> str:
    """Return the names of what a technique converts."""
    return ", ".join(one.kind for one in ENTRIES if technique is not LoRA or not isinstance(one.no_adapter, str))


def layer_names(paths: Sequence[str]) -> str:
    """Return the names of the first three modules at ``paths`` for messages, and how many more there are."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(layer_name, paths[:3])) + more


def place_name(path: str, parameter: str) -> str:
    """Return the name of a parameter's place: its layer's path, and the parameter's name unless it is ``weight``."""
    return path if parameter == "weight" else f"{path}.{parameter}".lstrip(".")


def layer_name(path: str) -> str:
    """Return the name of the module at ``path`` for errors."""
    return printable(path) or "the model itself"
