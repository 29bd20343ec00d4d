"""Fused norms, gated MLPs and activations, which save only their inputs for backward.

A fused norm saves x, where a module written in torch functions saves three or four tensors of that size. A fused
gated MLP saves the outputs of its gate and up projections and recomputes ``act(gate) * up``, where the unfused one
also saves the activation and the product (Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2). A module is fused
by giving it a generated subclass of its class. The layers inside are still called as modules, so adapters, hooks and
stored weights work as before. ``lowmem.training.recognize`` finds the modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowmem.kernels import rowwise
from lowmem.kernels.memory import is_batch, keeps_results
from lowmem.kernels.rowwise import ACTIVATIONS
from lowmem.kernels.torch_versions import TORCH
from lowmem.nn.adapted_module import LoRALinear
from lowmem.nn.adapter_autograd import is_narrow, narrow_results
from lowmem.nn.calls import is_observed
from lowmem.nn.linear import Linear4Bit
from lowmem.nn.module_copy import copied_module
from lowmem.nn.recomputed import (
    Recompute,
    can_recompute,
    differentiable_once,
    in_checkpoint,
    note_recompute,
    recomputed_input,
    saves_in_any_dtype,
)
from lowmem.quant.backend import backend_of
from lowmem.training.prepared_module import PreparedModule

__all__ = [
    "Act",
    "FusedModule",
    "GatedMLP",
    "How",
    "LayerNorm",
    "RMSNorm",
    "activated",
    "fuse",
    "gated_product",
    "rms_norm",
]


_OF_TORCH: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "SiLU": (functional.silu, torch.ops.aten.silu_backward),
    "GELU (tanh)": (
        partial(functional.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "GELU": (functional.gelu, torch.ops.aten.gelu_backward),
}
"""For each activation that torch has a function for: that function, and the one that computes its gradient."""


@dataclass(frozen=True)
class RMSNorm:
    """How a module computes an RMS norm: ``x / sqrt(mean(x^2) + eps) * (offset + weight)``.

    Attributes:
        weight: name of the module's parameter.
        eps: name of the attribute that holds epsilon.
        offset: 0 or 1.
        rounds_first: whether the quotient is rounded to x's dtype before the multiplication; the result then has the
            wider dtype of x and the weight, else that of x.
        mixes: whether the module computes this also where one of x and the weight is float32 and the other bfloat16;
            if not, it is fused only for calls where both have the same dtype.
    """

    weight: str
    eps: str
    offset: float
    rounds_first: bool
    mixes: bool = False

    def __str__(self) -> str:
        return "RMS norm fused: keeps its input"


@dataclass(frozen=True)
class GatedMLP:
    """How a module computes ``down(act(gate(x)) * up(x))``.

    Attributes:
        gate: name of the gate layer, or of one layer whose output is gate and up, concatenated.
        up: name of the up layer; None: ``gate`` computes both.
        down: name of the down layer.
        activation: a key of ``ACTIVATIONS``.
        gate_first: whether the concatenated output starts with the gate.
        again: whether backward calls the gate and up layers again instead of saving their outputs ("lean").
    """

    gate: str
    up: str | None
    down: str
    activation: str
    gate_first: bool = True
    again: bool = False

    def __str__(self) -> str:
        does = "computes again" if self.again else "keeps"
        return (
            f"gated MLP fused ({self.activation}): {does} the outputs of {self.gate}{f', {self.up}' * bool(self.up)}"
        )


@dataclass(frozen=True)
class Act:
    """How a module without parameters computes an activation, a key of ``ACTIVATIONS``."""

    activation: str

    def __str__(self) -> str:
        return f"activation fused ({self.activation}): keeps its input"


@dataclass(frozen=True)
class LayerNorm:
    """An ``nn.LayerNorm``, which saves only its input anyway; the layers that read its output can recompute it."""

    def __str__(self) -> str:
        return "layer norm fused: adapted layers compute again what it returns"


How: TypeAlias = "RMSNorm | GatedMLP | Act | LayerNorm"
"""How a fusable module computes its output."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds_first: bool = False) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * (offset + weight)``; only x and the weight are saved for backward.

    Args:
        x: floating point (..., n).
        weight: floating point (n,).
        eps: added to the mean.
        offset: added to the weight, in float32 (float64 for a float64 x).
        rounds_first: whether the quotient is rounded to x's dtype before the multiplication; the result then has the
            wider dtype of x and the weight.

    Returns:
        (..., n), in the dtype of x, or in the wider one.
    """
    out: Tensor = _Norm.apply(x, weight, eps, offset, rounds_first)  # type: ignore[no-untyped-call, unused-ignore]
    return _noted(out)


class _Reader:
    """Identifies a reader of a result whose backward has not run yet; ``recompute`` itself would be a cycle.

    Attributes:
        edge: what owns the graph that made the result, in versions of torch where its node in Python does not.
    """

    edge: GradientEdge | None = None


def _noted(out: Tensor) -> Tensor:
    """Let the layers that read a function's result recompute it in backward, once for all of them.

    The note on the result's storage holds the autograd node weakly, since a detached copy of the result may outlive
    the graph; only readers hold the node. Without the node, a reader saves the result itself.
    """
    if out.grad_fn is None:
        return out
    held, result = weakref.ref(cast(Any, out.grad_fn)), weakref.ref(out)

    def read() -> Recompute | None:
        made: Any = held()
        if made is None or made.done:
            return None

        reader = _Reader()
        if TORCH < (2, 13):  # where the graph alone owns a node in Python, whose saved tensors are freed with it
            known = result()
            if known is None:
                return None
            reader.edge = get_gradient_edge(known)

        def recompute(dtype: torch.dtype | None) -> Tensor:
            made.waiting.discard(reader)
            wanted = dtype or made.dtype
            if made.left is not None:
                return cast(Tensor, made.left.to(wanted))
            if made.again is None or made.again.dtype is not wanted:
                made.again = made.compute(*_saved(made), wanted)
            return cast(Tensor, made.again)

        made.waiting.add(reader)
        return recompute

    note_recompute(out, read)
    return out


def _begin(ctx: Any, dtype: torch.dtype, compute: Callable[..., Tensor]) -> None:
    """Initialize the state that readers of an autograd function's result use to recompute it.

    Args:
        ctx: of the autograd function. Gets these attributes:
            ``kept``: its saved tensors, once they are unpacked;
            ``again``: the recomputed result, from the first reader's backward until this function's own;
            ``waiting``: the readers whose backward has not run yet;
            ``left``: the result for readers whose backward runs after this function's own, as readers of a detached
            copy may;
            ``done``: whether this function's backward has run; later readers save the result themselves.
        dtype: of the result.
        compute: returns the result from the saved tensors and a dtype.
    """
    ctx.dtype, ctx.compute, ctx.waiting = dtype, compute, weakref.WeakSet()
    ctx.kept, ctx.again, ctx.left, ctx.done = None, None, None, False


def _end(ctx: Any) -> Any:
    """Return the saved tensors for the function's own backward, and release all that late readers do not need."""
    saved = _saved(ctx)
    if ctx.waiting and ctx.left is None:
        ctx.left = ctx.compute(*saved, ctx.dtype)
    ctx.kept, ctx.again, ctx.done = None, None, True
    return saved


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward: it runs without grad, and differentiating its gradients again is an error."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, grad)
        return tuple(one if one is None else differentiable_once(one) for one in found)

    return run


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype
    if dtype is x.dtype:
        return rowwise.norm(x, _factor(x, weight, offset), eps, rounds_first)
    ones = torch.ones_like(weight, dtype=torch.float32)
    return (rowwise.norm(x, ones, eps) * _factor(x, weight, offset)).to(dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = eps, offset, rounds_first
        out = _normed(x, weight, *ctx.how)
        _begin(ctx, out.dtype, lambda x, weight, dtype: _normed(x, weight, eps, offset, rounds_first).to(dtype))
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (eps, offset, _) = _end(ctx), ctx.how
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = rowwise.norm_grad(grad, x, _factor(x, weight, offset), eps)
        if ctx.needs_input_grad[1]:
            of_weight = rowwise.factor_grad(grad, x, eps).to(weight.dtype)
        return of_x, of_weight, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        out, mean, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, weight, bias)
        ctx.shape = shape

        def compute(x: Tensor, mean: Tensor, inverse: Tensor, weight: Any, bias: Any, dtype: torch.dtype) -> Tensor:
            return torch.native_layer_norm(x, shape, weight, bias, eps)[0].to(dtype)

        _begin(ctx, out.dtype, compute)
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, weight, bias = _end(ctx)
        asked = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_layer_norm_backward(grad, x, ctx.shape, mean, inverse, weight, bias, asked)
        return *found, None, None


def _factor(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    wide = weight.detach().to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    return wide + offset if offset else wide


def gated_product(
    gate: Tensor, up: Tensor | None, activation: str, gate_first: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``act(gate) * up``; gate and up are saved for backward, in bfloat16 where that is lossless.

    Args:
        gate: floating point (..., n); without ``up``, (..., 2n): gate and up, concatenated.
        up: (..., n), of the same dtype, or None.
        activation: a key of ``ACTIVATIONS``.
        gate_first: whether the gate is the first half.
        dtype: of the result; None: that of gate and up.
    """
    out: Tensor = _Gated.apply(gate, up, activation, gate_first, dtype or gate.dtype)  # type: ignore[no-untyped-call, unused-ignore]
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, activation: str, gate_first: bool, dtype: torch.dtype
    ) -> Tensor:
        ctx.activation, ctx.dtype, ctx.out, ctx.gate_first = ACTIVATIONS[activation], gate.dtype, dtype, gate_first
        ctx.kept = None
        kept = [one if one is None else _narrowed(one) for one in (gate, up)]
        if up is not None and len({one.dtype for one in kept if one is not None}) > 1:
            kept = [gate, up]
        ctx.save_for_backward(*kept)
        return rowwise.gated(*_halves(kept[0], kept[1], gate_first), ctx.activation, dtype)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = _saved(ctx)
        ctx.kept = None
        if is_batch(grad):
            found = rowwise.gated_grads(grad, *_halves(gate, up, ctx.gate_first), ctx.activation)
            of_gate, of_up = (cast(Tensor, one).to(ctx.dtype) for one in found)
            if up is not None:
                return of_gate, of_up, None, None, None
            return torch.cat((of_gate, of_up) if ctx.gate_first else (of_up, of_gate), -1), None, None, None, None
        into = [None if one is None else torch.empty_like(one, dtype=ctx.dtype) for one in (gate, up)]
        halves = _halves(into[0], into[1], ctx.gate_first)
        rowwise.gated_grad(grad, *_halves(gate, up, ctx.gate_first), ctx.activation, halves)
        return into[0], into[1], None, None, None


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.activation, own = activation, x.dtype
        _begin(ctx, own, lambda kept, dtype: _act(kept, activation, own, dtype))
        # A checkpoint that recomputes its region may get another input then, of which _narrowed may decide otherwise.
        kept = x if in_checkpoint() else _narrowed(x)
        ctx.save_for_backward(kept)
        return _act(x if _by_torch(activation, x) else kept, activation, own, own)

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = _end(ctx)
        if _by_torch(ctx.activation, x, grad):
            of_torch = _OF_TORCH[ctx.activation][1]
            return _in_parts(lambda x, grad: of_torch(grad, x.to(ctx.dtype)), ctx.dtype, ctx.dtype, x, grad), None
        if is_batch(grad):
            return rowwise.gated_grads(grad, x, None, ACTIVATIONS[ctx.activation])[0].to(ctx.dtype), None
        of_x = torch.empty_like(x, dtype=ctx.dtype)
        rowwise.gated_grad(grad, x, None, ACTIVATIONS[ctx.activation], (of_x, None))
        return of_x, None


def _act(x: Tensor, activation: str, own: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Return an activation of x in ``dtype``; ``own`` is x's dtype before it was narrowed."""
    if _by_torch(activation, x):
        return _in_parts(lambda x: _OF_TORCH[activation][0](x.to(own)), own, dtype, x)
    return rowwise.gated(x, None, ACTIVATIONS[activation], dtype)


def _by_torch(activation: str, x: Tensor, grad: Tensor | None = None) -> bool:
    """Whether to call torch's function for an activation: the backend has none, or vmap asks."""
    ours = backend_of(x).serves_rows(x) and (grad is None or not is_batch(grad))
    return activation in _OF_TORCH and not ours


def _in_parts(function: Callable[..., Tensor], own: torch.dtype, dtype: torch.dtype, *of: Tensor) -> Tensor:
    """Apply an elementwise function that returns ``own``, and convert to ``dtype``, chunk by chunk to save memory."""
    if of[0].dtype is own is dtype or any(map(is_batch, of)):
        return function(*of).to(dtype)
    out = torch.empty_like(of[0], dtype=dtype)
    for into, *parts in zip(*(one.reshape(-1).split(_CHUNK) for one in (out, *of)), strict=True):
        into.copy_(function(*parts))
    return out


def activated(x: Tensor, activation: str) -> Tensor:
    """Return one of ``ACTIVATIONS`` of x; only x is saved for backward, and readers can recompute the result."""
    out: Tensor = _Activated.apply(x, activation)  # type: ignore[no-untyped-call, unused-ignore]
    return _noted(out)


def _saved(ctx: Any) -> Any:
    """Return the saved tensors, unpacked only once: a checkpoint frees a tensor when it is first unpacked."""
    if ctx.kept is None:
        ctx.kept = ctx.saved_tensors
    return ctx.kept


def _halves(gate: Any, up: Any, gate_first: bool) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


_CHUNK = 2**18
"""Elements that are processed at a time, so that temporaries stay in the processor's cache."""


def _narrowed(x: Tensor) -> Tensor:
    """Return a float32 tensor as bfloat16 if that is lossless, as for the result of a product in bfloat16; else x.

    All elements are compared, unless the product marked its result (``is_narrow``): a sample would miss single
    columns. The comparison stops at the first chunk that differs, so float32 products lose little time. The first row
    is compared even in marked results, since writes through ``.data`` do not clear the mark.
    """
    if x.dtype is not torch.float32 or not x.numel():
        return x
    first = x.detach()[(0,) * (x.dim() - 1)]
    if not torch.equal(first.bfloat16().float(), first):
        return x
    if is_narrow(x):
        return x.detach().bfloat16()
    rows, few = x.detach().reshape(-1, x.shape[-1]), max(1, _CHUNK // x.shape[-1])
    narrow = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    for part, into in zip(rows.split(few), narrow.view(-1, x.shape[-1]).split(few), strict=True):
        if not torch.equal(into.copy_(part).float(), part):
            return x
    return narrow


class FusedModule(PreparedModule):
    """Base of modules whose forward is fused.

    Attributes:
        fused_as: how the module computes its output.
        fused_with: of a gated MLP, its activation classes and functions when it was fused; if they have changed, the
            module's own forward runs. Otherwise empty.
    """

    prepared_attributes = ("fused_as", "fused_with")
    fused_as: How
    fused_with: list[Any]

    @property
    def training_note(self) -> str:
        """What was done to the module, for reports."""
        return str(self.fused_as)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the plain module, and fuse the copy."""
        if issubclass(self.plain_class, PreparedModule):  # the class of "lean" is a subclass of the fused one
            return super().__reduce_ex__(protocol)
        plain = copied_module(self, self.plain_class)
        for name, value in self.__dict__.items():  # with its hooks
            plain.__dict__[name] = value
        for name in self.prepared_attributes:
            plain.__dict__.pop(name)
        return fuse, (plain, self.fused_as)


def fuse(module: nn.Module, how: How) -> nn.Module:
    """Fuse a module that computes ``how``, in place; it stays an instance of its class. Returns the module."""
    module.__dict__.update(fused_as=how, fused_with=_functions_of(module, how))
    module.__class__ = cast(Any, _fused_class(cast(Any, type(module)), cast(Any, type(how))))
    return module


def _functions_of(module: nn.Module, how: How) -> list[Any]:
    """Return a gated MLP's activation classes and callable attributes; the fused forward checks them on each call."""
    if not isinstance(how, GatedMLP):
        return []
    return [*map(type, activations(module, how)), *(one for one in module.__dict__.values() if callable(one))]


@cache
def _fused_class(kind: Any, how: Any) -> type[FusedModule]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if x is None or not self.training or not _is_eager(x):
            return kind.forward(self, *args, **kwargs)
        found = run(self, x, self.fused_as)
        return kind.forward(self, *args, **kwargs) if found is None else found

    run: Any = {
        RMSNorm: _run_norm, GatedMLP: _run_mlp, Act: _run_activation, LayerNorm: _run_layer_norm,
    }[how]  # fmt: skip
    names = {"plain_class": kind, "forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    made: type[FusedModule] = type(kind.__name__, (FusedModule, kind), names)
    made.__qualname__ = kind.__qualname__
    return made


def _is_eager(x: Any) -> bool:
    """Whether x is a plain, nonempty floating point tensor, and no compiler, tracer or functorch transform runs."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing() or forward_ad._current_level >= 0:
        return False
    numbers = x.is_floating_point() and x.dim() > 0 and x.numel() > 0 and x.layout is torch.strided
    return numbers and not x.is_nested and not x.is_meta


def _run_norm(module: Any, x: Tensor, how: RMSNorm) -> Tensor | None:
    weight = getattr(module, how.weight)
    if type(weight) not in (Tensor, nn.Parameter) or x.shape[-1:] != weight.shape or x.device != weight.device:
        return None
    dtypes = {x.dtype, weight.dtype}
    if len(dtypes) > 1 and not (how.mixes and dtypes == {torch.float32, torch.bfloat16}):
        return None
    return rms_norm(x, weight, getattr(module, how.eps), how.offset, how.rounds_first)


def _run_layer_norm(module: Any, x: Tensor, how: LayerNorm) -> Tensor | None:
    own = module.weight, module.bias
    plain = all(one is None or (type(one) in (Tensor, nn.Parameter) and one.dtype is x.dtype) for one in own)
    if not plain or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    out: Tensor = _LayerNorm.apply(x, *own, module.normalized_shape, module.eps)  # type: ignore[no-untyped-call, unused-ignore]
    return _noted(out)


def _run_activation(module: Any, x: Tensor, how: Act) -> Tensor | None:
    """Fuse contiguous inputs only: torch's result has the input's layout, such as channels last."""
    return activated(x, how.activation) if x.is_contiguous() else None


def _run_mlp(module: Any, x: Tensor, how: GatedMLP) -> Tensor | None:
    """Call the layers and fuse what is between them; return None, before any call, if hooks observe the activation.

    If the outputs of the layers are not plain tensors of one dtype and shape, torch computes the product instead; the
    module's own forward would call the layers a second time.
    """
    if any(is_observed(child) for child in activations(module, how)):
        return None
    if module.fused_with != _functions_of(module, how):
        return None
    down, layers = getattr(module, how.down), [getattr(module, name) for name in (how.gate, how.up) if name]
    narrow = x.dtype is torch.float32 and all(_is_narrow(layer) for layer in (*layers, down))

    state: list[Any] = []

    def product(x: Tensor) -> Tensor:
        now = [_state_of(layer) for layer in layers] if again else None
        if state and state != [now]:
            raise RuntimeError(
                "layers of a gated MLP, which lean computes again in backward, have other parameters, adapters or "
                'another mode than in forward: change them after backward, or prepare_training(model, "fast")'
            )
        state[:] = [now]
        with narrow_results(narrow):
            gate, *rest = (layer(x) for layer in layers)
        up = rest[0] if rest else None
        plain = all(type(one) is Tensor for one in (gate, up) if one is not None)
        if not plain or (up is not None and (gate.dtype is not up.dtype or gate.shape != up.shape)):
            dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
            wide = None if up is None else up.to(dtype)
            halves = _halves(gate.to(dtype), wide, how.gate_first)
            return rowwise.gated_in_torch(*halves, ACTIVATIONS[how.activation], dtype)
        return gated_product(gate, up, how.activation, how.gate_first)

    # Only directly under the hooks of "lean": a checkpoint recomputes the layers anyway.
    again = how.again and torch.is_grad_enabled() and saves_in_any_dtype()
    again = again and not any(is_observed(one) for layer in layers for one in layer.modules())
    hidden: Tensor = checkpoint(product, x, use_reentrant=False) if again else product(x)
    node: Any = hidden.grad_fn
    own: Any = _Gated._backward_cls
    # A selective checkpoint recomputes this anyway, and would take our saved-tensor hooks for the user's.
    if type(node) is not own or not can_recompute() or keeps_results():
        return _in_dtype_of(x, down(hidden), narrow)

    def recompute(dtype: torch.dtype | None) -> Tensor:
        gate, up = _saved(node)
        return rowwise.gated(*_halves(gate, up, how.gate_first), node.activation, dtype or node.dtype)

    with recomputed_input(hidden, recompute):
        return _in_dtype_of(x, down(hidden), narrow)


def _state_of(layer: nn.Module) -> list[Any]:
    """Return the state that a layer's output depends on: parameters by identity, mode, and active adapters."""
    return [
        (one.training, [*map(id, one._parameters.values())], str(getattr(one, "active", "")))
        for one in layer.modules()
    ]


def _is_narrow(layer: nn.Module) -> bool:
    """Whether a layer rounds its input to bfloat16 and its output is exact in bfloat16."""
    if not isinstance(layer, LoRALinear) or layer._plain_class is not Linear4Bit or is_observed(layer):
        return False
    bank = layer.adapters
    return bank.merged is None and len(bank.active) == 1 and cast(Any, layer).compute_dtype is torch.bfloat16


def _in_dtype_of(x: Tensor, out: Tensor, narrow: bool) -> Tensor:
    return out.to(x.dtype) if narrow else out


def activations(module: nn.Module, how: GatedMLP) -> list[nn.Module]:
    """Return the children of a gated MLP other than its linear layers, which the fused forward does not call."""
    return [child for name, child in module.named_children() if name not in (how.gate, how.up, how.down)]
