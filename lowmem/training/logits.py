"""Lazy logits: in training an output layer returns ``LazyLogits``. Views, casts and factors before ``cross_entropy``
are applied to the hidden states, and ``cross_entropy`` becomes ``linear_cross_entropy``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem.nn.calls import is_cast, is_plain_call
from lowmem.nn.sharded import is_fsdp_unit
from lowmem.nn.torch_functions import METADATA, name_of, registers_in, written_by
from lowmem.training.loss import linear_cross_entropy, loss_dtype
from lowmem.training.prepared_module import PreparedModule, prepare_module

_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
_delays = partial(registers_in, _FUNCTIONS)


@dataclass(frozen=True)
class _Product:
    """Logits ``scale * layer(hidden) + offset``."""

    layer: Any  # the output layer, with ``weight`` (vocabulary, width) and ``bias``
    hidden: Tensor  # floating point (..., width)
    dtype: torch.dtype  # in which the layer computes
    autocast: bool  # whether autocast to ``dtype`` was enabled
    versions: tuple[Any, ...]  # ``_versions`` when the layer was called
    chunk: int  # rows of logits that exist at once in the loss
    loss_dtype: torch.dtype  # in which the loss multiplies
    scale: float = 1.0
    offset: Tensor | None = None  # (vocabulary,), frozen

    def check(self) -> None:
        """Raise a RuntimeError if hidden, weight or bias was modified or replaced since the layer was called."""
        now = _versions(self.layer, self.hidden)
        if now != self.versions:
            written = "input" if now[:-1] == self.versions[:-1] else "weight"
            raise RuntimeError(
                f"the output layer's {written} was written to since it was called, as by an optimizer's step, "
                "or replaced, and its logits were not computed before: read them first, or call "
                "lowmem.release_training(model)"
            )

    def moved(self, move: Callable[[Tensor], Tensor]) -> _Product:
        """Return the product with ``move(hidden)`` as hidden states."""
        self.check()
        hidden = move(self.hidden)
        return replace(self, hidden=hidden, versions=_versions(self.layer, hidden))

    def logits(self) -> Tensor:
        """Compute all logits, differentiable."""
        self.check()
        with torch.autocast(self.hidden.device.type, self.dtype, enabled=self.autocast):
            out: Tensor = self.layer.dense_forward(self.hidden)
        out = out if self.scale == 1 else out * self.scale
        return out if self.offset is None else out + self.offset

    def cross_entropy(self, labels: Tensor, **options: Any) -> Tensor:
        """Return ``linear_cross_entropy`` of these rows, which never holds all logits."""
        self.check()
        hidden, bias = self.hidden, self.layer.bias
        if self.scale != 1:
            hidden, bias = hidden * self.scale, None if bias is None else bias * self.scale
        if self.offset is not None:
            bias = self.offset if bias is None else bias + self.offset
        return linear_cross_entropy(
            hidden, self.layer.weight, labels, bias=bias, chunk=self.chunk, dtype=self.loss_dtype, **options
        )


class LazyLogits(Tensor):
    """Logits of an output layer, (..., vocabulary), without values; each function that needs values computes them."""

    product: _Product

    @staticmethod
    def __new__(cls, product: _Product, dtype: torch.dtype) -> LazyLogits:
        """Make a tensor without values, whose ``dtype`` is the given one."""
        layer = product.layer
        trained = [one if type(one) is nn.Parameter else None for one in (layer.weight, layer.bias)]
        out: LazyLogits = _Lazily.apply(product, dtype, product.hidden, *trained)  # type: ignore[no-untyped-call, unused-ignore]
        return out

    @staticmethod
    def without_graph(product: _Product, dtype: torch.dtype) -> LazyLogits:
        """Make the tensor without connecting it to autograd's graph."""
        shape = (*product.hidden.shape[:-1], product.layer.weight.shape[0])
        out: LazyLogits = torch.Tensor._make_wrapper_subclass(
            LazyLogits, shape, dtype=dtype, device=product.hidden.device, requires_grad=False
        )
        out.product = product
        return out

    def values(self) -> Tensor:
        """Compute the logits, differentiable."""
        return self.product.logits().to(self.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        delayed = _FUNCTIONS.get(function)
        named = bool(kwargs) and function not in _TAKE_NAMES
        if delayed is not None and not named and isinstance(args[0] if args else kwargs.get("input"), cls):
            result = delayed(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        _refuse_writes(function, args, kwargs)
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        values = lambda one: one.values() if isinstance(one, LazyLogits) else one  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(values, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


class _Lazily(torch.autograd.Function):
    """Makes lazy logits a node of autograd's graph, for functions that bypass ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, product: _Product, dtype: torch.dtype, *sources: Tensor | None) -> Tensor:
        ctx.product, ctx.dtype, ctx.sources = product, dtype, sources
        return LazyLogits.without_graph(product, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = ctx.sources
        wanted = [one for one, needed in zip(trained, ctx.needs_input_grad[3:], strict=True) if needed]
        with torch.enable_grad():
            own = hidden.detach().requires_grad_()
            logits = ctx.product.moved(lambda _: own).logits().to(ctx.dtype)
            found = iter(torch.autograd.grad(logits, [own, *wanted], gradient))
        needed = [True, *ctx.needs_input_grad[3:]]
        return None, None, *(next(found) if one else None for one in needed)


class LazyOutput(PreparedModule):
    """Base of output layers that return lazy logits in training."""

    prepared_attributes = ("logits_chunk", "logits_dtype")
    logits_chunk: int
    logits_dtype: torch.dtype | None

    @property
    def note(self) -> str:
        """What was done to the layer, for reports."""
        in_dtype = f" in {self.logits_dtype}" * bool(self.logits_dtype)
        return f"logits in chunks of {self.logits_chunk} rows{in_dtype}, by the cross entropy that takes them"

    def dense_forward(self, input: Tensor) -> Tensor:
        """Return computed logits: (..., width) -> (..., vocabulary)."""
        out: Tensor = super().forward(input)
        return out

    def forward(self, input: Tensor) -> Tensor:
        """Return logits (..., vocabulary): lazy ones in training with gradients enabled."""
        if not (self.training and torch.is_grad_enabled() and _can_wait(self, input)):
            return self.dense_forward(input)
        casts = is_cast(input)
        dtype = torch.get_autocast_dtype(input.device.type) if casts else input.dtype
        chosen = self.logits_dtype if input.dtype is torch.float32 and not casts else None
        in_loss = chosen or loss_dtype(input, cast(Tensor, self.weight))
        return LazyLogits(
            _Product(self, input, dtype, casts, _versions(self, input), self.logits_chunk, in_loss), dtype
        )


def _can_wait(layer: nn.Module, input: Tensor) -> bool:
    """Whether logits may be computed later: a plain floating point input, and no compiler, tracer or transform."""
    if not is_plain_call() or type(input) not in (Tensor, nn.Parameter) or input.is_nested or input.is_meta:
        return False
    return input.is_floating_point() and not is_fsdp_unit(layer)  # FSDP2 frees the gathered weight


def _versions(layer: Any, hidden: Tensor) -> tuple[Any, ...]:
    """Return identity and version of a layer's weight and bias, and the version of its input."""
    counted = [one for one in (layer.weight, layer.bias) if type(one) is nn.Parameter]
    return *((id(one), one._version) for one in counted), 0 if hidden.is_inference() else hidden._version


def delay_logits(layer: nn.Module, chunk: int = 256, dtype: torch.dtype | None = None) -> None:
    """Let an output layer, an nn.Linear or a stored one, return ``LazyLogits`` in training.

    In the loss, ``chunk`` rows of logits exist at once. The loss multiplies in ``dtype`` if the hidden states are
    float32 and autocast is off; None: in the default of ``linear_cross_entropy``.
    """
    prepare_module(layer, LazyOutput, logits_chunk=chunk, logits_dtype=dtype)


_TAKE_NAMES = {functional.cross_entropy, Tensor.to, Tensor.contiguous, Tensor.flatten}
"""Functions whose delayed versions have the same parameter names, and so can be called with keyword arguments."""


def _refuse_writes(function: Any, args: Any, kwargs: Any) -> None:
    """Raise a RuntimeError if ``function`` would change lazy logits, or register a hook on their gradient."""
    name = name_of(function)
    hooks = args[:1] if name in ("register_hook", "retain_grad") else ()
    if any(isinstance(one, LazyLogits) for one in (*hooks, *written_by(function, args, kwargs))):
        raise RuntimeError(
            f"{name} would change logits of a prepared model, which are not computed: change a copy, as logits + 0, "
            "or call lowmem.release_training(model)"
        )


@_delays(functional.cross_entropy)
def _cross_entropy(
    input: LazyLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum")
    if not plain or target.dtype is not torch.int64 or input.dim() > 2:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return input.product.cross_entropy(target, **options).to(input.dtype)


@_delays(Tensor.float)
def _float(logits: LazyLogits) -> Any:
    return LazyLogits(logits.product, torch.float32)


@_delays(Tensor.to)
def _to(logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
    if form is not None or device not in (None, logits.device):
        return NotImplemented
    return LazyLogits(logits.product, dtype) if dtype is not None else logits


@_delays(Tensor.contiguous)
def _contiguous(logits: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return logits if memory_format is torch.contiguous_format else NotImplemented


@_delays(Tensor.view, Tensor.reshape)
def _view(logits: LazyLogits, *shape: Any) -> Any:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if isinstance(sizes, torch.dtype) or not sizes:
        return NotImplemented
    vocabulary, rows = logits.shape[-1], logits.shape[:-1].numel()
    leading = list(sizes[:-1])
    if sizes[-1] == -1 and -1 not in leading and math.prod(leading) == rows:
        pass  # the vocabulary is what is left
    elif sizes[-1] != vocabulary:
        return NotImplemented
    return LazyLogits(logits.product.moved(lambda hidden: hidden.reshape(*leading, hidden.shape[-1])), logits.dtype)


@_delays(Tensor.flatten)
def _flatten(logits: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = end_dim % logits.dim()
    if last == logits.dim() - 1:
        return NotImplemented
    return LazyLogits(logits.product.moved(lambda hidden: hidden.flatten(start_dim, last)), logits.dtype)


@_delays(Tensor.__getitem__)
def _getitem(logits: LazyLogits, index: Any) -> Any:
    """Index leading dimensions only, which logits and hidden states share."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = 0
    for part in parts:
        if isinstance(part, LazyLogits):
            return NotImplemented
        masks = isinstance(part, Tensor) and part.dtype is torch.bool
        taken += part.dim() if masks else part is not None and part is not Ellipsis
    reaches = any(part is Ellipsis for part in parts) or taken >= logits.dim()
    whole = isinstance(parts[-1], slice) and parts[-1] == slice(None)
    if (reaches and parts[-1] is not Ellipsis and not whole) or (parts[-1] is Ellipsis and taken >= logits.dim()):
        return NotImplemented
    return LazyLogits(logits.product.moved(lambda hidden: hidden[index]), logits.dtype)


@_delays(Tensor.register_hook)
def _register_hook(logits: LazyLogits, hook: Any) -> Any:
    """Register FSDP2's hook, which starts its backward in a sharded model, on the hidden states instead."""
    engine = str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
    hidden = logits.product.hidden
    return hidden.register_hook(hook) if engine and hidden.requires_grad else NotImplemented


@_delays(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
def _times(logits: LazyLogits, factor: Any) -> Any:
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        return NotImplemented
    product = logits.product
    offset = None if product.offset is None else product.offset * factor
    return LazyLogits(replace(product, scale=product.scale * factor, offset=offset), logits.dtype)


@_delays(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def _plus(logits: LazyLogits, other: Any) -> Any:
    """Add a frozen vector (vocabulary,), such as BART's ``final_logits_bias``."""
    if (
        type(other) not in (Tensor, nn.Parameter)
        or other.requires_grad
        or not other.is_floating_point()
        or other.numel() != logits.shape[-1]
        or other.shape[-1:] != logits.shape[-1:]
        or other.dim() > logits.dim()
    ):
        return NotImplemented
    product, own = logits.product, other.detach().reshape(-1).clone()  # it may be written to
    offset = own if product.offset is None else product.offset + own
    return LazyLogits(replace(product, offset=offset), torch.promote_types(logits.dtype, other.dtype))


@_delays(Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide)
def _divided(logits: LazyLogits, divisor: Any, **options: Any) -> Any:
    if options or isinstance(divisor, bool) or not isinstance(divisor, int | float) or divisor == 0:
        return NotImplemented
    return _times(logits, 1 / divisor)
