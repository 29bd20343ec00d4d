"""RMS norms and gated MLPs of stored layers, each computed by one call of C where nothing records gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lowmem.kernels.cpu import Kernel
from lowmem.kernels.cpu_rows import ROW_TYPES
from lowmem.kernels.memory import TYPES, is_real, is_traced
from lowmem.kernels.rowwise import ACTIVATIONS
from lowmem.kernels.sequence import Address, Layer, Steps
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.calls import GLOBAL_HOOKS, autocasts, hooks_of, is_plain_call
from lowmem.nn.coded_module import kept_weight
from lowmem.nn.linear import CodedLinear, HalfLinear, Linear4Bit, Linear8Bit
from lowmem.quant.backend import backend_of
from lowmem.training.fused import GatedMLP, RMSNorm

LAYERS = Linear4Bit, Linear8Bit, HalfLinear
"""Classes of layers whose weights C multiplies."""


def kernel_for(x: Any) -> Kernel | None:
    """Return the backend of x if C computes with it: rows of float32 or bfloat16, without recorded gradients."""
    if torch.is_grad_enabled() or not isinstance(x, Tensor) or not is_plain_call(x) or is_traced():
        return None
    kernel = backend_of(x)
    fits = x.dim() > 1 and x.dtype in ROW_TYPES and x.is_contiguous() and x.numel() > 0
    return kernel if isinstance(kernel, Kernel) and fits and is_real(x) and not autocasts(x) else None


@dataclass(frozen=True)
class Norm:
    """Computes an RMS norm: the module, and how it computes."""

    module: nn.Module
    how: RMSNorm

    def __str__(self) -> str:
        fits = self.factor.dtype in ROW_TYPES
        return "RMS norm in one call" if fits else f"as before: C computes no norms of {self.factor.dtype}"

    @property
    def factor(self) -> Any:
        """The weight."""
        return self.module._parameters.get(self.how.weight)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether C multiplies with the weight, and results have the dtype of inputs."""
        factor = self.factor
        return type(factor) is nn.Parameter and factor.dtype is dtype and factor.is_contiguous() and is_real(factor)

    def add(self, steps: Steps, x: Address, count: int, out: Address = 0) -> Any:
        """Add the norm of rows, ``count`` numbers; return the address of the result (``out``, or new room)."""
        how, factor = self.how, self.factor
        terms = factor, getattr(self.module, how.eps), how.offset, how.rounds_first
        return steps.norm(x, count // len(factor), *terms, out)

    def __call__(self, x: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the norm of rows; None where the module's own forward must run."""
        kernel = kernel_for(x)
        if given or kernel is None or not self.fits(x.dtype) or x.shape[-1] != len(self.factor):
            return None
        out, steps = torch.empty_like(x), Steps(kernel, x.new_empty(0))
        self.add(steps, "x", x.numel(), "out")
        return out if steps.run(x=x, out=out) else None


class GatedPart:
    """Computes a gated MLP."""

    def __init__(self, module: nn.Module, how: GatedMLP) -> None:
        self.how, self.taken = how, Taken(module, layers_of(module, how))

    def __str__(self) -> str:
        return f"gated MLP in one call ({self.how.activation})"

    def __call__(self, x: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Return the output; None where the module's own forward must run."""
        kernel, down = kernel_for(x), self.taken.layers[-1]
        if given or kernel is None or x.shape[-1] != down.out_features:
            return None
        ready = self.taken.ready(kernel, x.dtype)
        if ready is None:
            return None
        rows, out = x.numel() // x.shape[-1], torch.empty_like(x)
        steps = Steps(kernel, x.new_empty(3 * rows * down.in_features))
        add_mlp(steps, self.how, "x", rows, ready.layers, "out")
        return out if steps.run(x=x, out=out) else None


def watch(module: nn.Module, others: Iterable[tuple[dict[str, Any], str]] = ()) -> Callable[[], bool]:
    """Return a function that tells whether all that calls depend on is as it is now.

    Args:
        module: each module inside it must stay where it is, of its class, in evaluation mode and without hooks.
        others: (dict, key) of each tensor that is read by its address, or of another object that must stay.
    """
    parts = [part for part in module.modules() if part is not module]
    places = [*others, *((one._modules, name) for one in module.modules() for name in one._modules)]
    entries = [(own, key, own.get(key)) for own, key in places]
    for own in map(vars, parts):
        entries += [(own, "forward", None), (own, "_compiled_call_impl", None), (own, "training", False)]
    dicts, keys, values = zip(*entries, strict=True)
    kinds, tensors = list(map(type, parts)), [one for one in values if isinstance(one, Tensor)]
    addresses = list(map(Tensor.data_ptr, tensors))
    hooks = [*GLOBAL_HOOKS, *(one for part in parts for one in hooks_of(part))]
    # Asked at each call, hence without a loop in Python.
    return lambda: (
        all(map(is_, map(dict.get, dicts, keys), values))
        and list(map(type, parts)) == kinds
        and list(map(Tensor.data_ptr, tensors)) == addresses
        and not any(hooks)
    )


class Ready(NamedTuple):
    """Layers as C takes them, and what is made of them; they serve until something has changed."""

    kernel: Kernel
    dtype: torch.dtype
    holds: Callable[[], bool]
    layers: list[Layer]
    programs: dict[Any, Any]


class Taken:
    """Layers and norms inside a module, which C reads where they are.

    Args:
        module: see ``watch``.
        layers: inside it.
        others: modules whose numbers and functions its code reads, such as the scaling of scores, beside norms.
        norms: inside it.
    """

    def __init__(
        self, module: nn.Module, layers: list[Any], others: Iterable[nn.Module] = (), norms: Sequence[Norm] = ()
    ) -> None:
        self.module, self.layers, self.norms = module, layers, norms
        owners = module, *others, *(one.module for one in norms)
        owned = [(vars(one), *item) for one in owners for item in vars(one).items()]
        self.values = [(own, key) for own, key, value in owned if type(value) in (int, float) or callable(value)]
        self.holds, self.found = watch(module, self.values), cast("Ready | None", None)

    def ready(self, kernel: Kernel, dtype: torch.dtype) -> Ready | None:
        """Return layers as C takes them; None where parts were changed, or C does not take one."""
        found = self.found
        if found is not None and found.kernel is kernel and found.dtype is dtype and found.holds():
            return found
        taken = as_taken(kernel, self.layers, dtype) if self.holds() else None
        if taken is None or not all(norm.fits(dtype) for norm in self.norms):
            return None
        tensors = [(one._parameters, name) for one in self.layers for name in one._parameters]
        tensors += [(one._kept, "weight") for one in self.layers]
        tensors += [(norm.module._parameters, norm.how.weight) for norm in self.norms]
        self.found = Ready(kernel, dtype, watch(self.module, [*tensors, *self.values]), taken, {})
        return self.found


def add_mlp(steps: Steps, how: GatedMLP, x: Address, rows: int, layers: Sequence[Layer], *outs: Address) -> Any:
    """Add ``down(act(gate) up)`` of rows to steps, and return the address of the result (``outs``, or new room)."""
    *first, down = layers
    wide = first[0][1]
    inner = wide if how.up is not None else wide // 2
    gate, *others = steps.products(x, rows, down[1], first)
    sides = gate, others[0] if others else gate + inner * steps.size
    sides = sides if how.gate_first else sides[::-1]
    hidden = steps.gated(*sides, rows, inner, wide, ACTIVATIONS[how.activation])
    return steps.products(hidden, rows, inner, [down], *outs)[0]


def layers_of(module: nn.Module, how: GatedMLP) -> list[Any]:
    """Return the layers of a gated MLP: gate, up if there is one, and down."""
    return [getattr(module, name) for name in (how.gate, how.up, how.down) if name]


def as_taken(kernel: Kernel, layers: Iterable[Any], dtype: torch.dtype) -> list[Layer] | None:
    """Return layers as C takes them, if products with inputs of a dtype are all computed in that dtype."""
    found: list[Layer] = []
    for layer in layers:
        own = layer._parameters
        if isinstance(layer, CodedLinear):
            weight, bias = kept_weight(layer) or layer.quantized, own.get("bias")
            computed = layer._forms["weight"].form.compute_dtype
            given = kernel._given(weight) if computed in (None, dtype) else None
        else:
            stored, bias = own.get("weight_rounded"), own.get("bias_rounded", own.get("bias"))
            fits = type(stored) is nn.Parameter and (dtype is torch.float32 or stored.dtype is dtype)
            given = (None, stored, None) if fits else None
        if given is None or (bias is not None and (bias.dtype not in TYPES or not bias.is_contiguous())):
            return None
        found.append((given, layer.out_features, bias))
    return found


def why_not(module: nn.Module, layers: Iterable[Any]) -> str | None:
    """Return which of a module's layers C does not multiply with, and why; or None."""
    names = {one: name for name, one in module.named_modules()}
    for layer in layers:
        if type(layer) not in LAYERS:
            adapted, dense = isinstance(layer, AdaptedModule), type(layer) is nn.Linear
            why = "has an adapter" if adapted else "is dense" if dense else f"is a {type(layer).__name__}"
            return f"{names[layer]} {why}"
        form, dtype = layer._forms["weight"].form, layer._forms["weight"].dtype
        computed = getattr(form, "compute_dtype", None) or dtype
        if computed is not dtype or dtype not in ROW_TYPES:
            return f"{names[layer]} takes {dtype} and computes in {computed}: C needs float32 for both, or bfloat16"
    return None
