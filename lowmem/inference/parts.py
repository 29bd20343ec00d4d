"""RMS norms and gated MLPs of stored layers, each computed by one call of C where nothing records gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.kernels.cpu import Kernel
from lowmem.kernels.memory import TYPES, is_real, is_traced
from lowmem.kernels.rowwise import ACTIVATIONS
from lowmem.kernels.sequence import Layer, Steps
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.calls import GLOBAL_HOOKS, autocast_enabled, hooks_of, is_plain_call
from lowmem.nn.coded_module import kept_weight
from lowmem.nn.linear import CodedLinear, HalfLinear, Linear4Bit, Linear8Bit
from lowmem.quant.backend import backend_of
from lowmem.training.fused import GatedMLP, RMSNorm


def kernel_for(x: Any) -> Kernel | None:
    """Return the backend of x if C computes with it: rows of float32 or bfloat16, without recorded gradients."""
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or not is_plain_call(x) or is_traced():
        return None
    kernel = backend_of(x)
    fits = x.dim() > 1 and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous() and x.numel() > 0
    return kernel if isinstance(kernel, Kernel) and fits and is_real(x) and not autocast_enabled("cpu") else None


@dataclass(frozen=True)
class Norm:
    """An RMS norm: the module, and how it computes."""

    module: nn.Module
    how: RMSNorm

    @property
    def columns(self) -> int:
        """The numbers of a row."""
        factor = self.module._parameters[self.how.weight]
        return 0 if factor is None else len(factor)

    def fits(self, x: Tensor) -> bool:
        """Whether C multiplies with the weight."""
        factor = self.module._parameters.get(self.how.weight)
        return type(factor) is nn.Parameter and factor.dtype is x.dtype and factor.is_contiguous() and is_real(factor)

    def add(self, steps: Steps, x: int, rows: int, out: int = 0) -> int:
        """Add the norm of rows to steps, and return the address of the result (``out``, or new room)."""
        factor, eps = self.module._parameters[self.how.weight], getattr(self.module, self.how.eps)
        assert factor is not None
        return steps.norm(x, rows, factor, eps, self.how.offset, self.how.rounds_first, out)


class NormPart:
    """Computes an RMS norm."""

    why_not: str | None = None

    def __init__(self, module: nn.Module, how: RMSNorm) -> None:
        self.norm = Norm(module, how)

    def __str__(self) -> str:
        return "RMS norm in one call"

    def __call__(self, x: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the norm of rows; None where the module's own forward must run."""
        kernel = kernel_for(x)
        if given or kernel is None or not self.norm.fits(x) or x.shape[-1] != self.norm.columns:
            return None
        out, steps = torch.empty_like(x), Steps(kernel, x, 0)
        self.norm.add(steps, x.data_ptr(), x.numel() // x.shape[-1], out.data_ptr())
        return out if steps.run() else None


class GatedPart:
    """Computes a gated MLP."""

    def __init__(self, module: nn.Module, how: GatedMLP) -> None:
        self.how = how
        names = [name for name in (how.gate, how.up, how.down) if name]
        self.layers = [getattr(module, name) for name in names]
        self.watched = Watched(module)
        self.why_not = next((f"{name} {why}" for name in names if (why := why_not(getattr(module, name)))), None)

    def __str__(self) -> str:
        return f"gated MLP in one call ({self.how.activation})"

    def __call__(self, x: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the output; None where the module's own forward must run."""
        kernel, down = kernel_for(x), self.layers[-1]
        if given or kernel is None or not self.watched.holds():
            return None
        layers = [layer_of(kernel, one, x.dtype) for one in self.layers]
        if None in layers or x.shape[-1] != down.out_features:
            return None
        columns, inner, rows = x.shape[-1], down.in_features, x.numel() // x.shape[-1]
        steps, out = Steps(kernel, x, 3 * rows * inner), torch.empty_like(x)
        hidden = add_gated(steps, self.how, x.data_ptr(), rows, columns, layers[:-1], inner)  # type: ignore[arg-type]
        steps.products(hidden, rows, inner, layers[-1:], out.data_ptr())  # type: ignore[arg-type]
        return out if steps.run() else None


class Watched:
    """What a call depends on: the modules inside a module and their hooks, and the memory of tensors.

    Args:
        module: each module inside it must stay where it is, of its class, in evaluation mode and without hooks.
        tensors: (dict, key) of each tensor that is read by its address, or of another object that must stay.
    """

    def __init__(self, module: nn.Module, tensors: Sequence[tuple[dict[str, Any], str]] = ()) -> None:
        entries: list[tuple[dict[str, Any], str, Any]] = [
            (owner._modules, name, part)
            for owner in module.modules()
            for name, part in owner._modules.items()
            if part is not None
        ]
        modules = [part for _, _, part in entries]
        entries += [(own, key, own.get(key)) for own, key in tensors]
        for part in modules:
            own = part.__dict__
            entries += [(own, "forward", None), (own, "_compiled_call_impl", None), (own, "training", False)]
        self._entries = list(zip(*entries, strict=True)) or [()] * 3
        self._modules, self._kinds = modules, list(map(type, modules))
        self._tensors = [one for own, key in tensors if isinstance(one := own.get(key), Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._hooks = [*GLOBAL_HOOKS, *(one for part in modules for one in hooks_of(part))]

    def holds(self) -> bool:
        """Whether all is as it was; asked at each call, hence without a loop in Python."""
        owns, keys, values = self._entries
        return (
            all(map(is_, map(dict.get, owns, keys), values))
            and all(map(is_, map(type, self._modules), self._kinds))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and not any(self._hooks)
        )


def add_gated(steps: Steps, how: GatedMLP, x: int, rows: int, columns: int, layers: list[Layer], inner: int) -> int:
    """Add the products of gate and up, and ``act(gate) up``: (rows, inner)."""
    found = steps.products(x, rows, columns, layers)
    if how.up is not None:
        return steps.gated(found[0], found[1], rows, inner, inner, ACTIVATIONS[how.activation])
    halves = found[0], found[0] + inner * steps.size
    gate, up = halves if how.gate_first else halves[::-1]
    return steps.gated(gate, up, rows, inner, 2 * inner, ACTIVATIONS[how.activation])


def layer_of(kernel: Kernel, layer: Any, dtype: torch.dtype) -> Layer | None:
    """Return a layer as C takes it, if its product with an input of a dtype is computed in that dtype."""
    own = layer._parameters
    if isinstance(layer, CodedLinear):
        weight = kept_weight(layer) or layer.quantized
        computed = layer._forms["weight"].form.compute_dtype
        given = kernel._given(weight) if computed in (None, dtype) else None
        bias = own.get("bias")
    else:
        stored, bias = own.get("weight_rounded"), own.get("bias_rounded", own.get("bias"))
        fits = type(stored) is nn.Parameter and (dtype is torch.float32 or stored.dtype is dtype)
        given = (None, stored, None) if fits else None
    if given is None or (bias is not None and (bias.dtype not in TYPES or not bias.is_contiguous())):
        return None
    return given, layer.out_features, bias


def tensors_of(layer: Any) -> list[tuple[dict[str, Any], str]]:
    """Return where a layer keeps what ``layer_of`` reads, as ``Watched`` takes it."""
    names = [name for name in layer._parameters if name != "weight"]
    kept = [(layer._kept, "weight")] if isinstance(layer, CodedLinear) else []
    return [*kept, *((layer._parameters, name) for name in names)]


def why_not(layer: nn.Module) -> str | None:
    """Return why no product with a layer is computed together with others, or None."""
    if type(layer) in (Linear4Bit, Linear8Bit, HalfLinear):
        return None
    if isinstance(layer, AdaptedModule):
        return "has an adapter"
    return "is dense" if type(layer) is nn.Linear else f"is a {type(layer).__name__}"
