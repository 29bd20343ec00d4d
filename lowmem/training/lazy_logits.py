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

from lowmem.nn.call_context import can_bypass_autograd, is_cast_by_autocast
from lowmem.nn.sharded_parameters import is_fsdp2_module
from lowmem.nn.torch_functions import METADATA, function_write_targets, registration_decorator, torch_function_name
from lowmem.training.chunked_cross_entropy import default_loss_matmul_dtype, linear_cross_entropy
from lowmem.training.prepared_module import PreparedModule, prepend_prepared_class

_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
_implements_lazily = partial(registration_decorator, _FUNCTIONS)


@dataclass(frozen=True)
class _DeferredLogitsProduct:
    """Logits ``scale * layer(hidden) + offset``."""

    layer: Any  # the output layer, with ``weight`` (vocabulary, width) and ``bias``
    hidden: Tensor  # floating point (..., width)
    dtype: torch.dtype  # in which the layer computes
    autocast: bool  # whether autocast to ``dtype`` was enabled
    versions: tuple[Any, ...]  # ``_weight_and_input_versions`` when the layer was called
    chunk: int  # rows of logits that exist at once in the loss
    loss_dtype: torch.dtype  # in which the loss multiplies
    scale: float = 1.0
    offset: Tensor | None = None  # (vocabulary,), frozen

    def check_weight_and_input_unmodified(self) -> None:
        """Raise a RuntimeError if hidden, weight or bias was modified or replaced since the layer was called."""
        now = _weight_and_input_versions(self.layer, self.hidden)
        if now != self.versions:
            written = "input" if now[:-1] == self.versions[:-1] else "weight"
            raise RuntimeError(
                f"the output layer's {written} was written to since it was called, as by an optimizer's step, "
                "or replaced, and its logits were not computed before: read them first, or call "
                "lowmem.release_training(model)"
            )

    def with_transformed_hidden(self, transform: Callable[[Tensor], Tensor]) -> _DeferredLogitsProduct:
        """Return the product with ``transform(hidden)`` as hidden states."""
        self.check_weight_and_input_unmodified()
        hidden = transform(self.hidden)
        return replace(self, hidden=hidden, versions=_weight_and_input_versions(self.layer, hidden))

    def compute_logits(self) -> Tensor:
        """Compute all logits, differentiable."""
        self.check_weight_and_input_unmodified()
        with torch.autocast(self.hidden.device.type, self.dtype, enabled=self.autocast):
            out: Tensor = self.layer.dense_forward(self.hidden)
        out = out if self.scale == 1 else out * self.scale
        return out if self.offset is None else out + self.offset

    def chunked_cross_entropy(self, labels: Tensor, **options: Any) -> Tensor:
        """Return ``linear_cross_entropy`` of these rows, which never holds all logits."""
        self.check_weight_and_input_unmodified()
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

    product: _DeferredLogitsProduct

    @staticmethod
    def __new__(cls, product: _DeferredLogitsProduct, dtype: torch.dtype) -> LazyLogits:
        """Make a tensor without values, whose ``dtype`` is the given one."""
        layer = product.layer
        trained = [parameter if type(parameter) is nn.Parameter else None for parameter in (layer.weight, layer.bias)]
        out: LazyLogits = _LazyLogitsFunction.apply(product, dtype, product.hidden, *trained)  # type: ignore[no-untyped-call, unused-ignore]
        return out

    @staticmethod
    def make_without_autograd(product: _DeferredLogitsProduct, dtype: torch.dtype) -> LazyLogits:
        """Make the tensor without connecting it to autograd's graph."""
        shape = (*product.hidden.shape[:-1], product.layer.weight.shape[0])
        out: LazyLogits = torch.Tensor._make_wrapper_subclass(
            LazyLogits, shape, dtype=dtype, device=product.hidden.device, requires_grad=False
        )
        out.product = product
        return out

    def compute_values(self) -> Tensor:
        """Compute the logits, differentiable."""
        return self.product.compute_logits().to(self.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        delayed = _FUNCTIONS.get(function)
        named = bool(kwargs) and function not in _KEYWORD_CALLABLE
        if delayed is not None and not named and isinstance(args[0] if args else kwargs.get("input"), cls):
            result = delayed(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        _check_does_not_modify_logits(function, args, kwargs)
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        values = lambda value: value.compute_values() if isinstance(value, LazyLogits) else value  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(values, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


class _LazyLogitsFunction(torch.autograd.Function):
    """Makes lazy logits a node of autograd's graph, for functions that bypass ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, product: _DeferredLogitsProduct, dtype: torch.dtype, *sources: Tensor | None) -> Tensor:
        ctx.product, ctx.dtype, ctx.sources = product, dtype, sources
        return LazyLogits.make_without_autograd(product, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *trained = ctx.sources
        wanted = [item for item, needed in zip(trained, ctx.needs_input_grad[3:], strict=True) if needed]
        with torch.enable_grad():
            hidden_leaf = hidden.detach().requires_grad_()
            logits = ctx.product.with_transformed_hidden(lambda _: hidden_leaf).compute_logits().to(ctx.dtype)
            gradients = iter(torch.autograd.grad(logits, [hidden_leaf, *wanted], gradient))
        needed = [True, *ctx.needs_input_grad[3:]]
        return None, None, *(next(gradients) if item else None for item in needed)


class LazyOutputLayer(PreparedModule):
    """Base of output layers that return lazy logits in training."""

    prepared_attributes = ("logits_chunk", "logits_dtype")
    logits_chunk: int
    logits_dtype: torch.dtype | None

    @property
    def report_note(self) -> str:
        """What was done to the layer, for reports."""
        in_dtype = f" in {self.logits_dtype}" * bool(self.logits_dtype)
        return f"logits in chunks of {self.logits_chunk} rows{in_dtype}, by the cross entropy that takes them"

    def dense_forward(self, input: Tensor) -> Tensor:
        """Return computed logits: (..., width) -> (..., vocabulary)."""
        out: Tensor = super().forward(input)
        return out

    def forward(self, input: Tensor) -> Tensor:
        """Return logits (..., vocabulary): lazy ones in training with gradients enabled."""
        if not (self.training and torch.is_grad_enabled() and _can_defer_logits(self, input)):
            return self.dense_forward(input)
        casts = is_cast_by_autocast(input)
        dtype = torch.get_autocast_dtype(input.device.type) if casts else input.dtype
        chosen = self.logits_dtype if input.dtype is torch.float32 and not casts else None
        in_loss = chosen or default_loss_matmul_dtype(input, cast(Tensor, self.weight))
        return LazyLogits(
            _DeferredLogitsProduct(
                self, input, dtype, casts, _weight_and_input_versions(self, input), self.logits_chunk, in_loss
            ),
            dtype,
        )


def _can_defer_logits(layer: nn.Module, input: Tensor) -> bool:
    """Whether logits may be computed later: a plain floating point input, and no compiler, tracer or transform."""
    if not can_bypass_autograd() or type(input) not in (Tensor, nn.Parameter) or input.is_nested or input.is_meta:
        return False
    # FSDP2 frees the gathered weight
    return input.is_floating_point() and not is_fsdp2_module(layer)


def _weight_and_input_versions(layer: Any, hidden: Tensor) -> tuple[Any, ...]:
    """Return identity and version of a layer's weight and bias, and the version of its input."""
    counted = [parameter for parameter in (layer.weight, layer.bias) if type(parameter) is nn.Parameter]
    return *(
        (id(parameter), parameter._version) for parameter in counted
    ), 0 if hidden.is_inference() else hidden._version


def make_logits_lazy(layer: nn.Module, chunk: int = 256, matmul_dtype: torch.dtype | None = None) -> None:
    """Let an output layer, an nn.Linear or a stored one, return ``LazyLogits`` in training.

    In the loss, ``chunk`` rows of logits exist at once. The loss multiplies in ``matmul_dtype`` if the hidden states
    are float32 and autocast is off; None: in the default of ``linear_cross_entropy``.
    """
    prepend_prepared_class(layer, LazyOutputLayer, logits_chunk=chunk, logits_dtype=matmul_dtype)


_KEYWORD_CALLABLE = {functional.cross_entropy, Tensor.to, Tensor.contiguous, Tensor.flatten}
"""Functions whose delayed versions have the same parameter names, and so can be called with keyword arguments."""


def _check_does_not_modify_logits(function: Any, args: Any, kwargs: Any) -> None:
    """Raise a RuntimeError if ``function`` would change lazy logits, or register a hook on their gradient."""
    name = torch_function_name(function)
    hooks = args[:1] if name in ("register_hook", "retain_grad") else ()
    if any(
        isinstance(argument, LazyLogits) for argument in (*hooks, *function_write_targets(function, args, kwargs))
    ):
        raise RuntimeError(
            f"{name} would change logits of a prepared model, which are not computed: change a copy, as logits + 0, "
            "or call lowmem.release_training(model)"
        )


@_implements_lazily(functional.cross_entropy)
def _lazy_cross_entropy(
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
    return input.product.chunked_cross_entropy(target, **options).to(input.dtype)


@_implements_lazily(Tensor.float)
def _lazy_cast_to_float32(logits: LazyLogits) -> Any:
    return LazyLogits(logits.product, torch.float32)


@_implements_lazily(Tensor.to)
def _lazy_to(logits: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
    if form is not None or device not in (None, logits.device):
        return NotImplemented
    return LazyLogits(logits.product, dtype) if dtype is not None else logits


@_implements_lazily(Tensor.contiguous)
def _lazy_contiguous(logits: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return logits if memory_format is torch.contiguous_format else NotImplemented


@_implements_lazily(Tensor.view, Tensor.reshape)
def _lazy_view(logits: LazyLogits, *shape: Any) -> Any:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if isinstance(sizes, torch.dtype) or not sizes:
        return NotImplemented
    vocabulary, rows = logits.shape[-1], logits.shape[:-1].numel()
    leading = list(sizes[:-1])
    if sizes[-1] == -1 and -1 not in leading and math.prod(leading) == rows:
        # The vocabulary is what is left
        pass
    elif sizes[-1] != vocabulary:
        return NotImplemented
    return LazyLogits(
        logits.product.with_transformed_hidden(lambda hidden: hidden.reshape(*leading, hidden.shape[-1])),
        logits.dtype,
    )


@_implements_lazily(Tensor.flatten)
def _lazy_flatten(logits: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = end_dim % logits.dim()
    if last == logits.dim() - 1:
        return NotImplemented
    return LazyLogits(
        logits.product.with_transformed_hidden(lambda hidden: hidden.flatten(start_dim, last)), logits.dtype
    )


@_implements_lazily(Tensor.__getitem__)
def _lazy_getitem_leading_dims(logits: LazyLogits, index: Any) -> Any:
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
    return LazyLogits(logits.product.with_transformed_hidden(lambda hidden: hidden[index]), logits.dtype)


@_implements_lazily(Tensor.register_hook)
def _register_fsdp_hook_on_hidden(logits: LazyLogits, hook: Any) -> Any:
    """Register FSDP2's hook, which starts its backward in a sharded model, on the hidden states instead."""
    engine = str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
    hidden = logits.product.hidden
    return hidden.register_hook(hook) if engine and hidden.requires_grad else NotImplemented


@_implements_lazily(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
def _lazy_mul_by_number(logits: LazyLogits, factor: Any) -> Any:
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        return NotImplemented
    product = logits.product
    offset = None if product.offset is None else product.offset * factor
    return LazyLogits(replace(product, scale=product.scale * factor, offset=offset), logits.dtype)


@_implements_lazily(Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)
def _lazy_add_frozen_bias(logits: LazyLogits, other: Any) -> Any:
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
    product, bias = logits.product, other.detach().reshape(-1).clone()  # it may be written to
    offset = bias if product.offset is None else product.offset + bias
    return LazyLogits(replace(product, offset=offset), torch.promote_types(logits.dtype, other.dtype))


@_implements_lazily(Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide)
def _lazy_div_by_number(logits: LazyLogits, divisor: Any, **options: Any) -> Any:
    if options or isinstance(divisor, bool) or not isinstance(divisor, int | float) or divisor == 0:
        return NotImplemented
    return _lazy_mul_by_number(logits, 1 / divisor)
