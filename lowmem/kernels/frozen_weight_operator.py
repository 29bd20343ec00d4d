"""Operators on an input and a frozen weight, each declared once for eager calls, derivatives and recorded graphs,
which hold them as ``torch.ops.lowmem.<name>``. Codes, scales and a text stand for a 4-bit weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lowmem.kernels.tensor_checks import is_recorder_mode_active, is_recording_operations
from lowmem.quant.backend import Weight, backend_for, backend_of
from lowmem.quant.formats import get_format
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.quant.tensor import ANY, QuantizedTensor

# Not torch.library.custom_op: its checks take 10 microseconds a call, a third of a small product.
_LIBRARY = torch.library.Library("lowmem", "FRAGMENT")

# Device types
_served: list[str] = []
_declared: list[Callable[[str], None]] = []  # of each operator, what registers its kernel for a device type


def register_operators_for_device(device_type: str) -> None:
    """Register a kernel of every operator with torch's dispatcher: the device type's backend computes it."""
    if device_type not in _served:
        _served.append(device_type)
        for register in _declared:
            register(device_type)


class FrozenWeightOperator:
    """An operator ``f(x, weight, *rest)`` that is linear in x; or one without a gradient, of any arguments.

    Eager calls bypass torch's dispatcher, which costs more than the autograd function that they run.

    Args:
        compute: computes it from a backend and real tensors.
        fake: returns an empty output for the same arguments.
        record: calls the declared operator with the same arguments.
        derivatives: maps (x, *rest) to the ``rest`` with which f maps a tangent of x to that of the output, and the
            ``rest`` with which f maps a gradient of the output to that of x; None: there is no gradient.
        differentiable: computes it where a gradient is needed; None: ``compute_as_autograd_node``.
        rows_share_weight: whether each row of x meets the same weight, so that the rows of several inputs are one
            input.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        record: Callable[..., Tensor],
        derivatives: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]] | None = None,
        differentiable: Callable[..., Tensor] | None = None,
        rows_share_weight: bool = True,
    ) -> None:
        self.compute, self.fake, self.record = compute, fake, record
        self.derivatives, self.rows_share_weight = derivatives, rows_share_weight
        self.differentiable = differentiable or self.compute_as_autograd_node

    def __call__(self, *arguments: Any) -> Tensor:
        """Compute it, differentiable in x; or record it, where a graph is made."""
        return (self.record if _should_record_operator(arguments) else self.differentiable)(*arguments)

    def compute_as_autograd_node(self, x: Tensor, weight: Weight, *rest: Any) -> Tensor:
        """Compute it as one node of autograd's graph, which saves the stored weight only; without a node where
        nothing differentiates it."""
        is_transformed = _is_transformed()
        if not is_transformed and forward_ad._current_level < 0 and not _needs_gradient((x, weight)):
            return _compute_or_record(self, x, weight, *rest)
        function = _TransformableFrozenWeightFunction if is_transformed else _FrozenWeightFunction
        return cast(Tensor, function.apply(self, x, weight, *rest))  # type: ignore[no-untyped-call, unused-ignore]

    def register_torch_operator(self, schema: str, map_arguments: Callable[..., tuple[Any, ...]]) -> None:
        """Declare ``torch.ops.lowmem.<name>``, for every device type that is or will be served.

        ``map_arguments`` maps the schema's arguments to those of ``compute`` behind the backend.
        """
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        name = schema.partition("(")[0]
        operator = getattr(torch.ops.lowmem, name).default

        def register_kernel(device_type: str) -> None:
            def compute_on_device(*operands: Any) -> Tensor:
                return self.compute(backend_for(device_type), *map_arguments(*operands))

            torch.library.impl(
                f"lowmem::{name}", "default" if device_type == ANY else device_type, compute_on_device, lib=_LIBRARY
            )

        def compute_or_differentiate(*operands: Any) -> Tensor:
            if _needs_gradient(operands) or forward_ad._current_level >= 0:
                return self.differentiable(*map_arguments(*operands))
            if is_recording_operations() or _is_transformed():
                with torch._C._AutoDispatchBelowAutograd():
                    return cast(Tensor, operator(*operands))
            return self.compute(
                backend_of(operands[0]), *map_arguments(*operands)
            )  # a second dispatch costs as much again

        _declared.append(register_kernel)
        for device_type in _served:
            register_kernel(device_type)
        if self.derivatives is not None:
            _LIBRARY.impl(operator, compute_or_differentiate, "Autograd")
            torch.library.register_vmap(
                operator, partial(_vmapped_output_and_dim, operator, self.rows_share_weight), lib=_LIBRARY
            )
        torch.library.register_fake(operator, lambda *operands: self.fake(*map_arguments(*operands)), lib=_LIBRARY)


# Called often: globals are faster
_is_compiling, _is_tracing, _is_transformed = (
    torch.compiler.is_compiling,
    torch._C._is_tracing,
    torch._C._are_functorch_transforms_active,
)


def _should_record_operator(arguments: tuple[Any, ...]) -> bool:
    if _is_compiling():
        # The operator has no forward-mode derivative
        return not _is_transformed()
    # By torch.jit.trace; Dynamo cannot trace this call
    return _is_tracing() or _is_recorded_without_gradient(arguments)


def is_fake_call_without_gradient(arguments: Sequence[Any]) -> bool:
    """Whether a mode runs a call on fake tensors that bypasses autograd on real ones, since it needs no gradient."""
    return not _is_compiling() and not _is_tracing() and _is_recorded_without_gradient(arguments)


def _is_recorded_without_gradient(arguments: Sequence[Any]) -> bool:
    if not is_recorder_mode_active() or _is_transformed() or forward_ad._current_level >= 0:
        return False
    return not _needs_gradient(arguments)


def _needs_gradient(arguments: Sequence[Any]) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:  # any() of a generator takes twice as long
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def _compute_or_record(f: FrozenWeightOperator, x: Tensor, weight: Weight, *rest: Any) -> Tensor:
    if type(x) is not Tensor and is_recording_operations() and not _is_transformed():
        return f.record(x, weight, *rest)
    return f.compute(backend_of(x), x, weight, *rest)


def codes_scales_and_description(weight: QuantizedTensor | QuantizedOperands) -> tuple[Tensor, Tensor, str]:
    """Return the codes, the scales and the text of a 4-bit matrix, for ``quantized_tensor_from_operands``."""
    if isinstance(weight, QuantizedOperands):
        return weight.packed, weight.scales, weight.description
    return weight.packed, weight.scales, quantization_description(weight, weight.shape[-1])


def quantization_description(form: Any, columns: int) -> str:
    """Return the text of a matrix whose format, block size and scale encoding are attributes of ``form``."""
    return f"{form.format} {form.block_size} {form.scale_encoding} {columns}"


def check_requires_no_grad(weight: Tensor) -> None:
    """Refuse a stored 16-bit weight that requires a gradient; codes of 4 and 8 bits, which are integers, cannot.

    Raises:
        RuntimeError: it does; the remedy is named.
    """
    if weight.requires_grad:
        raise RuntimeError(
            f"a weight that is stored in {weight.dtype} requires a gradient, and would get none: it is frozen. Call "
            "requires_grad_(False) on it (its name ends in _rounded) and train an adapter (lowmem.LoRA), or make the "
            "layer dense again: lowmem.restore(model)"
        )


class QuantizedOperands:
    """A 4-bit matrix with the bytes of its scales, which stands for it where a graph is made.

    Not a named tuple, of which torch 2.9's compiler takes no property.

    Args:
        packed, scales: uint8 (rows, bytes).
        description: its format, block size, scale encoding and columns: torch.compile guards each value that it
            reads of a layer, at each call, and so reads one.
    """

    def __init__(self, packed: Tensor, scales: Tensor, description: str) -> None:
        self.packed, self.scales, self.description = packed, scales, description

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.packed.shape[0], int(self.description.split()[3])

    def check_layout(self) -> None:
        """Raise a RuntimeError unless ``packed`` has the shape of the matrix; a trace would record each size."""
        if not _is_compiling() and _is_tracing():
            return
        rows, columns = self.shape
        if self.packed.shape[1] != get_format(self.description.split()[0]).width.row_bytes(columns):
            raise RuntimeError(
                f"packed.shape={tuple(self.packed.shape)} does not hold a weight of shape {(rows, columns)} in "
                f"{self.description.split()[0]}"
            )


@lru_cache(maxsize=1024)
def parse_quantization_description(description: str) -> tuple[int, tuple[str, int, str], torch.dtype]:
    """Return what the text of a weight says: its columns; format, block size and encoding; and the scales' dtype."""
    format, block_size, scale_encoding, columns = description.split()
    dtype = get_scale_encoding(scale_encoding, get_format(format).signed).dtype
    return int(columns), (format, int(block_size), scale_encoding), dtype


def quantized_tensor_from_operands(packed: Tensor, scales: Tensor, description: str) -> QuantizedTensor:
    """Return the matrix (rows, columns) of ``codes_scales_and_description``, with what was cached for it before.

    The scales may be given as their bytes.
    """
    columns, described, dtype = parse_quantization_description(description)
    if scales.dtype is not dtype and scales.dtype is torch.uint8:
        scales = scales.view(dtype)
    # Fake tensors have no address
    if type(packed) is not nn.Parameter and type(packed) is not Tensor:
        return QuantizedTensor(packed, scales, torch.Size((packed.shape[0], columns)), *described)
    weight = object.__new__(QuantizedTensor)  # its __init__ takes as long as the rest of a small operator
    weight.__dict__.update(
        _cached_quantized_tensor_dict(packed.data_ptr(), packed.shape, description), packed=packed, scales=scales
    )
    return weight


@lru_cache(maxsize=4096)  # of a few hundred bytes each
def _cached_quantized_tensor_dict(codes_address: int, packed_shape: torch.Size, description: str) -> dict[str, Any]:
    """Return a weight's state with the cache for what is stored at an address; backends check what they cached."""
    columns, described, _ = parse_quantization_description(description)
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    return dict(QuantizedTensor(nothing, nothing, torch.Size((packed_shape[0], columns)), *described).__dict__)


class _FrozenWeightFunction(torch.autograd.Function):
    """``f(x, weight, *rest)`` for a ``FrozenWeightOperator`` f. Derivatives are f again, so all orders exist."""

    @staticmethod
    def forward(ctx: Any, f: FrozenWeightOperator, x: Tensor, weight: Weight, *rest: Any) -> Tensor:
        out = _compute_or_record(f, x, weight, *rest)
        _save_for_derivatives(ctx, f, x, weight, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *scales = ctx.saved_tensors
        if scales:
            weight = quantized_tensor_from_operands(weight, scales[0], codes_scales_and_description(ctx.weight)[2])
        return None, ctx.f.compute_as_autograd_node(grad, weight, *ctx.of_gradient).to(ctx.dtype), None, *ctx.unused

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *__: None) -> Tensor:
        return cast(Tensor, ctx.f.compute_as_autograd_node(tangent, ctx.weight, *ctx.of_tangent))


class _TransformableFrozenWeightFunction(_FrozenWeightFunction):
    """The same function for the transforms of torch.func, which need a separate ``setup_context``. Each call of a
    function that has one reads the signature of ``forward``, and that takes longer than a small product."""

    @staticmethod
    def forward(f: FrozenWeightOperator, x: Tensor, weight: Weight, *rest: Any) -> Tensor:  # type: ignore[override]
        return _compute_or_record(f, x, weight, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_for_derivatives(ctx, *inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], f: FrozenWeightOperator, *arguments: Any) -> tuple[Tensor, int]:
        return _vmapped_output_and_dim(f.compute_as_autograd_node, f.rows_share_weight, info, in_dims[1:], *arguments)


def _save_for_derivatives(ctx: Any, f: FrozenWeightOperator, x: Tensor, weight: Weight, *rest: Any) -> None:
    ctx.f, ctx.weight, ctx.dtype, ctx.unused = f, weight, x.dtype, [None] * len(rest)
    assert f.derivatives is not None
    ctx.of_tangent, ctx.of_gradient = f.derivatives(x, *rest)
    # save_for_backward raises an error if the weight is changed in place before backward.
    if isinstance(weight, QuantizedTensor):
        ctx.save_for_backward(weight.packed, weight.scales)
    else:
        check_requires_no_grad(weight)
        ctx.save_for_backward(weight)


def _vmapped_output_and_dim(
    function: Callable[..., Tensor], rows_share_weight: bool, info: Any, in_dims: Sequence[Any], x: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """Return what vmap makes of ``function(x, *rest)`` with examples in ``in_dims``, and the dimension of these."""
    several = [dim is not None for dim, item in zip(in_dims[1:], rest, strict=True) if isinstance(item, Tensor)]
    # Such as weights or biases of several models
    if in_dims[0] is None or any(several) or not rows_share_weight:
        outs = []
        for number in range(info.batch_size):
            item = (
                value.select(dim, number) if isinstance(value, Tensor) and dim is not None else value
                for value, dim in zip((x, *rest), in_dims, strict=True)
            )
            outs.append(function(*item))
        return torch.stack(outs), 0
    examples = x.movedim(in_dims[0], 0)  # (examples, batch, ...), flattened into one batch
    return function(examples.flatten(0, 1), *rest).unflatten(0, examples.shape[:2]), 0
