"""Convolution with a frozen weight, a matrix (out_channels, in_channels / groups * prod(kernel)): only the input gets
a gradient. Chunks of at most 1 MiB of output channels (144 MiB on other devices) are dequantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as gradients

from lowmem.kernels import Weight
from lowmem.kernels.decompositions import decomposed_dequantize, register_decomposition
from lowmem.kernels.frozen_weight_operator import (
    FrozenWeightOperator,
    QuantizedOperands,
    codes_scales_and_description,
    is_fake_call_without_gradient,
    quantized_tensor_from_operands,
)
from lowmem.kernels.tensor_checks import is_recording_operations
from lowmem.nn.call_context import (
    autocast_disabled_if_slow,
    can_bypass_autograd,
    check_not_nested,
    is_jit_tracing,
    is_onnx_export_or_raise_if_quantized,
)
from lowmem.quant.backend import fast_matmul_dtype
from lowmem.quant.tensor import QuantizedTensor, row_slices_within_scratch


@dataclass(frozen=True)
class Geometry:
    """The hyperparameters of a convolution.

    Args:
        in_channels, out_channels, groups: as in nn.Conv2d.
        kernel, stride, padding, dilation: one number per dimension; zeros are padded on both sides.
        around: additional padding that ``functional.pad`` applies first, in its order (last dimension first); or ().
        mode: of ``around``.
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    around: tuple[int, ...] = ()
    mode: str = "constant"

    def __str__(self) -> str:
        """Return the description that nn.Conv2d would give."""
        padding = f"{self.around} {self.mode}" if self.around else self.padding
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel}, stride={self.stride}, "
            f"padding={padding}, dilation={self.dilation}, groups={self.groups}"
        )

    @property
    def stride_padding_dilation(self) -> tuple[Any, ...]:
        """The positional arguments of torch's convolutions between ``bias`` and ``groups``."""
        return self.stride, self.padding, self.dilation

    def output_size(self, padded_input_size: Sequence[int]) -> list[int]:
        """Return the output size for an input size to which ``around`` was applied."""
        every = zip(padded_input_size, self.kernel, *self.stride_padding_dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in every]

    def transposed_conv_output_size(self, input_size: Sequence[int], output_padding: Sequence[int]) -> list[int]:
        """Return the output size of the transposed convolution whose adjoint has this geometry."""
        added = tuple(output_padding) * (len(input_size) if len(output_padding) == 1 else 1)
        every = zip(input_size, self.kernel, *self.stride_padding_dilation, added, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in every]

    def chunk_channel_slices_and_groups(self, itemsize: int, device: torch.device) -> list[tuple[slice, slice, int]]:
        """Return, for each chunk, its output channels, the input channels that they read, and its number of groups.

        A chunk consists of whole groups, or is a part of one group.
        """
        # Per group
        rows, channels = self.out_channels // self.groups, self.in_channels // self.groups
        columns = channels * prod(self.kernel)
        chunks = []
        for part in row_slices_within_scratch(self.groups, rows * columns, itemsize, device=device):
            first, last = part.start * rows, part.stop * rows
            reads = slice(part.start * channels, part.stop * channels)
            # One chunk, unless a single group is too large.
            for chunk in row_slices_within_scratch(last - first, columns, itemsize, device=device):
                chunks.append((slice(first + chunk.start, first + chunk.stop), reads, part.stop - part.start))
        return chunks


def frozen_conv(
    x: Tensor, weight: Weight, geometry: Geometry, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Return the convolution of ``x``, computed in ``dtype``, without a gradient for the weight.

    Args:
        x: floating point (batch, in_channels, *size) or (in_channels, *size); the result has its dtype.
        weight: float16 or bfloat16 (out_channels, ...), or a QuantizedTensor of out_channels rows.
        geometry: of the convolution.
        dtype: to compute in, floating point.
        bias: floating point (out_channels,), or None.
    """
    # A trace must not branch on sizes
    dims, tracing = len(geometry.kernel), is_jit_tracing()
    if not tracing:
        _check_conv_input(x, geometry)
    batch = x if x.dim() == dims + 2 else x.unsqueeze(0)
    if geometry.around:
        batch = functional.pad(batch, geometry.around, geometry.mode)
    if not tracing and min(geometry.output_size(batch.shape[2:])) < 1:
        raise RuntimeError(f"input.shape={tuple(x.shape)} is smaller than the kernel {geometry.kernel}")
    if tracing and is_onnx_export_or_raise_if_quantized(weight):
        added = None if bias is None else bias.to(dtype)
        kernel = _dequantized_kernel(weight, slice(None), geometry, dtype)
        wide: Tensor = _CONVOLUTIONS[dims](
            batch.to(dtype), kernel, added, *geometry.stride_padding_dilation, geometry.groups
        )
        out = wide.to(x.dtype)
    elif can_bypass_autograd(batch, bias):
        out = _compute_conv_or_adjoint(batch, weight, geometry, dtype, None, bias)
    else:
        out = _OPERATOR(batch, weight, geometry, dtype, None)
        if bias is not None:
            added = bias.to(x.dtype).view(-1, *[1] * dims)
            out = out.add_(added) if is_fake_call_without_gradient((batch, bias)) else out + added
    return out if x.dim() == dims + 2 else out.squeeze(0)


def convolution_or_adjoint(
    x: Tensor,
    weight: Weight | QuantizedOperands,
    geometry: Geometry,
    dtype: torch.dtype,
    adjoint_size: Sequence[int] | None = None,
) -> Tensor:
    """Return the convolution of (batch, in_channels, *size), below autograd: (batch, out_channels, *out size).

    If ``adjoint_size`` is given, return its adjoint: (batch, out_channels, *out size) -> (batch, in_channels, *size).
    """
    adjoint_size = None if adjoint_size is None else list(adjoint_size)
    if is_recording_operations() or isinstance(weight, QuantizedOperands):
        return _call_convolve_operator(x, weight, geometry, dtype, adjoint_size)
    return _compute_conv_or_adjoint(x, weight, geometry, dtype, adjoint_size)


def _check_conv_input(x: Tensor, geometry: Geometry) -> None:
    check_not_nested(x)
    dims = len(geometry.kernel)
    if not x.is_floating_point():
        raise RuntimeError(f"input.dtype={x.dtype} must be a floating-point dtype")
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != geometry.in_channels:
        sizes = "length" if dims == 1 else "height, width"
        raise RuntimeError(
            f"input.shape={tuple(x.shape)} must be (batch, in_channels, {sizes}) or (in_channels, {sizes}), "
            f"with in_channels={geometry.in_channels}"
        )


def _convolve_in_chunks(
    x: Tensor, weight: Weight, geometry: Geometry, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """Return (batch, out_channels, *out size) in x's dtype, for x (batch, in_channels, *size)."""
    conv = _CONVOLUTIONS[len(geometry.kernel)]
    bias = None if bias is None else bias.to(dtype)
    chunks = _channel_chunks(weight, geometry, dtype, x.device)
    if len(chunks) == 1:
        kernel = _dequantized_kernel(weight, slice(None), geometry, dtype)
        whole: Tensor = conv(x.to(dtype), kernel, bias, *geometry.stride_padding_dilation, geometry.groups)
        return whole.to(x.dtype)
    size = geometry.output_size(x.shape[2:])
    out = x.new_empty(x.shape[0], geometry.out_channels, *size)
    for rows, reads, groups in chunks:
        kernel = _dequantized_kernel(weight, rows, geometry, dtype)
        added = None if bias is None else bias[rows]
        for part in row_slices_within_scratch(
            x.shape[0], (rows.stop - rows.start) * prod(size), dtype.itemsize, device=x.device
        ):
            out[part, rows] = conv(x[part, reads].to(dtype), kernel, added, *geometry.stride_padding_dilation, groups)
        # Before the next chunk is dequantized
        del kernel
    return out


def _conv_adjoint_in_chunks(
    grad: Tensor, weight: Weight, geometry: Geometry, dtype: torch.dtype, input_size: Sequence[int]
) -> Tensor:
    """Return (batch, in_channels, *size) for grad (batch, out_channels, *out size), summed in float32 or wider."""
    adjoint = _ADJOINTS[len(geometry.kernel)]
    chunks = _channel_chunks(weight, geometry, dtype, grad.device)
    shape = (grad.shape[0], geometry.in_channels, *input_size)
    if len(chunks) == 1:
        kernel = _dequantized_kernel(weight, slice(None), geometry, dtype)
        whole: Tensor = adjoint(shape, kernel, grad.to(dtype), *geometry.stride_padding_dilation, geometry.groups)
        return whole.to(grad.dtype)
    sums = grad.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    for rows, reads, groups in chunks:
        kernel = _dequantized_kernel(weight, rows, geometry, dtype)
        channels = reads.stop - reads.start
        for part in row_slices_within_scratch(
            grad.shape[0], channels * prod(input_size), dtype.itemsize, device=grad.device
        ):
            chunk = grad[part, rows].to(dtype)
            sums[part, reads] += adjoint(
                (chunk.shape[0], channels, *input_size), kernel, chunk, *geometry.stride_padding_dilation, groups
            )
        # Before the next chunk is dequantized
        del kernel
    return sums.to(grad.dtype)


_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_ADJOINTS: dict[int, Any] = {1: gradients.conv1d_input, 2: gradients.conv2d_input, 3: gradients.conv3d_input}


def _channel_chunks(
    weight: Weight, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> list[tuple[slice, slice, int]]:
    # Used as stored
    if isinstance(weight, Tensor) and weight.dtype is dtype:
        return [(slice(None), slice(None), geometry.groups)]
    return geometry.chunk_channel_slices_and_groups(dtype.itemsize, device)


def _dequantized_kernel(weight: Weight, out_channels: slice, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        kernel = weight.dequantize_rows(out_channels, dtype)
    else:
        kernel = weight.detach()[out_channels].to(dtype)
    return kernel.view(-1, geometry.in_channels // geometry.groups, *geometry.kernel)


def _compute_conv_or_adjoint(
    x: Tensor,
    weight: Weight,
    geometry: Geometry,
    dtype: torch.dtype,
    adjoint_size: Sequence[int] | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the convolution; if ``adjoint_size`` is given, its adjoint of that size. Each is the other's
    derivative."""
    # Rounded as a 16-bit product rounds it
    rounded, wide = x.to(dtype), fast_matmul_dtype(dtype, x)
    with autocast_disabled_if_slow(x):
        if adjoint_size is None:
            out = _convolve_in_chunks(rounded, weight, geometry, wide, bias)
        else:
            out = _conv_adjoint_in_chunks(rounded, weight, geometry, wide, adjoint_size)
    return out.to(x.dtype)


def _fake_conv_or_adjoint(
    x: Tensor, weight: Weight, geometry: Geometry, dtype: torch.dtype, adjoint_size: Sequence[int] | None
) -> Tensor:
    if adjoint_size is None:
        return x.new_empty(x.shape[0], geometry.out_channels, *geometry.output_size(x.shape[2:]))
    return x.new_empty(x.shape[0], geometry.in_channels, *adjoint_size)


def _call_convolve_operator(
    x: Tensor,
    weight: Weight | QuantizedOperands,
    geometry: Geometry,
    dtype: torch.dtype,
    adjoint_size: Sequence[int] | None,
) -> Tensor:
    operator_arguments: tuple[Any, ...] = (weight, None, "")
    if isinstance(weight, (QuantizedTensor, QuantizedOperands)):
        # Here, since the operator is not told the number of rows
        weight.check_layout()
        operator_arguments = codes_scales_and_description(weight)
    sizes = [geometry.in_channels, geometry.out_channels, geometry.groups, *geometry.kernel]
    sizes += [number for of_dims in geometry.stride_padding_dilation for number in of_dims]
    return cast(Tensor, torch.ops.lowmem.convolve(x, *operator_arguments, sizes, dtype, adjoint_size))


def _tangent_and_gradient_arguments(
    x: Tensor, geometry: Geometry, dtype: torch.dtype, adjoint_size: Sequence[int] | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (geometry, dtype, adjoint_size), (geometry, dtype, x.shape[2:] if adjoint_size is None else None)


def _compute_arguments_from_operator(
    x: Tensor, weight: Tensor, scales: Tensor | None, form_text: str, sizes: Sequence[int], *dtype_and_size: Any
) -> tuple[Any, ...]:
    return (
        x,
        weight if scales is None else quantized_tensor_from_operands(weight, scales, form_text),
        _geometry_from_operator_sizes(sizes),
        *dtype_and_size,
    )


def _geometry_from_operator_sizes(sizes: Sequence[int]) -> Geometry:
    """Return the geometry from the numbers that ``_call_convolve_operator`` passes to the operator."""
    dims = (len(sizes) - 3) // 4
    kernel, stride, padding, dilation = (tuple(sizes[start : start + dims]) for start in range(3, len(sizes), dims))
    return Geometry(sizes[0], sizes[1], sizes[2], kernel, stride, padding, dilation)


_OPERATOR = FrozenWeightOperator(
    lambda _, *operator_arguments: _compute_conv_or_adjoint(*operator_arguments),
    _fake_conv_or_adjoint,
    _call_convolve_operator,
    _tangent_and_gradient_arguments,
)
_OPERATOR.register_torch_operator(
    "convolve(Tensor x, Tensor stored, Tensor? scales, str described, int[] sizes, ScalarType dtype, SymInt[]? size) "
    "-> Tensor",
    _compute_arguments_from_operator,
)


@register_decomposition("convolve")
def _decomposed_convolve(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    form_text: str,
    sizes: Sequence[int],
    dtype: torch.dtype,
    adjoint_size: Sequence[int] | None,
) -> Tensor:
    geometry = _geometry_from_operator_sizes(sizes)
    kernel = weight.to(dtype) if scales is None else decomposed_dequantize(weight, scales, form_text, dtype)
    kernel = kernel.view(-1, geometry.in_channels // geometry.groups, *geometry.kernel)
    more = [0] * len(geometry.kernel)
    if adjoint_size is not None:
        more = [
            int(a - b)
            for a, b in zip(adjoint_size, geometry.transposed_conv_output_size(x.shape[2:], more), strict=True)
        ]
    convolve = torch.ops.aten.convolution.default
    out = convolve(
        x.to(dtype), kernel, None, *geometry.stride_padding_dilation, adjoint_size is not None, more, geometry.groups
    )
    return cast(Tensor, out).to(x.dtype)
