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
from lowmem.kernels.decompositions import decomposes, dequantized
from lowmem.kernels.frozen_operator import FrozenOperator, StoredParts, parts_of, stands_for_plain_call, stored
from lowmem.kernels.memory import is_traced
from lowmem.nn.calls import exports_to_onnx, is_jit_tracing, is_plain_call, no_slow_autocast, refuse_nested
from lowmem.quant.backend import matmul_dtype
from lowmem.quant.tensor import QuantizedTensor, row_chunks


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
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of torch's convolutions between ``bias`` and ``groups``."""
        return self.stride, self.padding, self.dilation

    def output_size(self, size: Sequence[int]) -> list[int]:
        """Return the output size for an input size to which ``around`` was applied."""
        every = zip(size, self.kernel, *self.arguments, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in every]

    def transposed_size(self, size: Sequence[int], output_padding: Sequence[int]) -> list[int]:
        """Return the output size of the transposed convolution whose adjoint has this geometry."""
        added = tuple(output_padding) * (len(size) if len(output_padding) == 1 else 1)
        every = zip(size, self.kernel, *self.arguments, added, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in every]

    def chunks(self, itemsize: int, device: torch.device) -> list[tuple[slice, slice, int]]:
        """Return, for each chunk, its output channels, the input channels that they read, and its number of groups.

        A chunk consists of whole groups, or is a part of one group.
        """
        rows, channels = self.out_channels // self.groups, self.in_channels // self.groups  # per group
        columns = channels * prod(self.kernel)
        found = []
        for part in row_chunks(self.groups, rows * columns, itemsize, device=device):
            first, last = part.start * rows, part.stop * rows
            reads = slice(part.start * channels, part.stop * channels)
            # One chunk, unless a single group is too large.
            for chunk in row_chunks(last - first, columns, itemsize, device=device):
                found.append((slice(first + chunk.start, first + chunk.stop), reads, part.stop - part.start))
        return found


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
    dims, tracing = len(geometry.kernel), is_jit_tracing()  # a trace must not branch on sizes
    if not tracing:
        _check_input(x, geometry)
    batch = x if x.dim() == dims + 2 else x.unsqueeze(0)
    if geometry.around:
        batch = functional.pad(batch, geometry.around, geometry.mode)
    if not tracing and min(geometry.output_size(batch.shape[2:])) < 1:
        raise RuntimeError(f"input.shape={tuple(x.shape)} is smaller than the kernel {geometry.kernel}")
    if tracing and exports_to_onnx(weight):
        added = None if bias is None else bias.to(dtype)
        kernel = _dequantized(weight, slice(None), geometry, dtype)
        wide: Tensor = _CONVOLUTIONS[dims](batch.to(dtype), kernel, added, *geometry.arguments, geometry.groups)
        out = wide.to(x.dtype)
    elif is_plain_call(batch, bias):
        out = _compute(batch, weight, geometry, dtype, None, bias)
    else:
        out = _OPERATOR(batch, weight, geometry, dtype, None)
        if bias is not None:
            added = bias.to(x.dtype).view(-1, *[1] * dims)
            out = out.add_(added) if stands_for_plain_call((batch, bias)) else out + added
    return out if x.dim() == dims + 2 else out.squeeze(0)


def convolution(
    x: Tensor,
    weight: Weight | StoredParts,
    geometry: Geometry,
    dtype: torch.dtype,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Return the convolution of (batch, in_channels, *size), below autograd: (batch, out_channels, *out size).

    If ``size`` is given, return its adjoint: (batch, out_channels, *out size) -> (batch, in_channels, *size).
    """
    size = None if size is None else list(size)
    if is_traced() or isinstance(weight, StoredParts):
        return _record(x, weight, geometry, dtype, size)
    return _compute(x, weight, geometry, dtype, size)


def _check_input(x: Tensor, geometry: Geometry) -> None:
    refuse_nested(x)
    dims = len(geometry.kernel)
    if not x.is_floating_point():
        raise RuntimeError(f"input.dtype={x.dtype} must be a floating-point dtype")
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != geometry.in_channels:
        sizes = "length" if dims == 1 else "height, width"
        raise RuntimeError(
            f"input.shape={tuple(x.shape)} must be (batch, in_channels, {sizes}) or (in_channels, {sizes}), "
            f"with in_channels={geometry.in_channels}"
        )


def _convolve(x: Tensor, weight: Weight, geometry: Geometry, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """Return (batch, out_channels, *out size) in x's dtype, for x (batch, in_channels, *size)."""
    conv = _CONVOLUTIONS[len(geometry.kernel)]
    bias = None if bias is None else bias.to(dtype)
    chunks = _chunks(weight, geometry, dtype, x.device)
    if len(chunks) == 1:
        kernel = _dequantized(weight, slice(None), geometry, dtype)
        whole: Tensor = conv(x.to(dtype), kernel, bias, *geometry.arguments, geometry.groups)
        return whole.to(x.dtype)
    size = geometry.output_size(x.shape[2:])
    out = x.new_empty(x.shape[0], geometry.out_channels, *size)
    for rows, reads, groups in chunks:
        kernel = _dequantized(weight, rows, geometry, dtype)
        added = None if bias is None else bias[rows]
        for part in row_chunks(x.shape[0], (rows.stop - rows.start) * prod(size), dtype.itemsize, device=x.device):
            out[part, rows] = conv(x[part, reads].to(dtype), kernel, added, *geometry.arguments, groups)
        del kernel  # before the next chunk is dequantized
    return out


def _adjoint(grad: Tensor, weight: Weight, geometry: Geometry, dtype: torch.dtype, size: Sequence[int]) -> Tensor:
    """Return (batch, in_channels, *size) for grad (batch, out_channels, *out size), summed in float32 or wider."""
    adjoint = _ADJOINTS[len(geometry.kernel)]
    chunks = _chunks(weight, geometry, dtype, grad.device)
    shape = (grad.shape[0], geometry.in_channels, *size)
    if len(chunks) == 1:
        kernel = _dequantized(weight, slice(None), geometry, dtype)
        whole: Tensor = adjoint(shape, kernel, grad.to(dtype), *geometry.arguments, geometry.groups)
        return whole.to(grad.dtype)
    sums = grad.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    for rows, reads, groups in chunks:
        kernel = _dequantized(weight, rows, geometry, dtype)
        channels = reads.stop - reads.start
        for part in row_chunks(grad.shape[0], channels * prod(size), dtype.itemsize, device=grad.device):
            one = grad[part, rows].to(dtype)
            sums[part, reads] += adjoint((one.shape[0], channels, *size), kernel, one, *geometry.arguments, groups)
        del kernel  # before the next chunk is dequantized
    return sums.to(grad.dtype)


_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_ADJOINTS: dict[int, Any] = {1: gradients.conv1d_input, 2: gradients.conv2d_input, 3: gradients.conv3d_input}


def _chunks(
    weight: Weight, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> list[tuple[slice, slice, int]]:
    if isinstance(weight, Tensor) and weight.dtype is dtype:  # used as stored
        return [(slice(None), slice(None), geometry.groups)]
    return geometry.chunks(dtype.itemsize, device)


def _dequantized(weight: Weight, rows: slice, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        kernel = weight.dequantize_rows(rows, dtype)
    else:
        kernel = weight.detach()[rows].to(dtype)
    return kernel.view(-1, geometry.in_channels // geometry.groups, *geometry.kernel)


def _compute(
    x: Tensor,
    weight: Weight,
    geometry: Geometry,
    dtype: torch.dtype,
    size: Sequence[int] | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the convolution; if ``size`` is given, its adjoint of that size. Each is the other's derivative."""
    rounded, wide = x.to(dtype), matmul_dtype(dtype, x)  # rounded as a 16-bit product rounds it
    with no_slow_autocast(x):
        if size is None:
            out = _convolve(rounded, weight, geometry, wide, bias)
        else:
            out = _adjoint(rounded, weight, geometry, wide, size)
    return out.to(x.dtype)


def _fake(x: Tensor, weight: Weight, geometry: Geometry, dtype: torch.dtype, size: Sequence[int] | None) -> Tensor:
    if size is None:
        return x.new_empty(x.shape[0], geometry.out_channels, *geometry.output_size(x.shape[2:]))
    return x.new_empty(x.shape[0], geometry.in_channels, *size)


def _record(
    x: Tensor, weight: Weight | StoredParts, geometry: Geometry, dtype: torch.dtype, size: Sequence[int] | None
) -> Tensor:
    given: tuple[Any, ...] = (weight, None, "")
    if isinstance(weight, (QuantizedTensor, StoredParts)):
        weight.check_layout()  # here, since the operator is not told the number of rows
        given = parts_of(weight)
    sizes = [geometry.in_channels, geometry.out_channels, geometry.groups, *geometry.kernel]
    sizes += [number for of_dims in geometry.arguments for number in of_dims]
    return cast(Tensor, torch.ops.lowmem.convolve(x, *given, sizes, dtype, size))


def _derivatives(
    x: Tensor, geometry: Geometry, dtype: torch.dtype, size: Sequence[int] | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (geometry, dtype, size), (geometry, dtype, x.shape[2:] if size is None else None)


def _arguments(
    x: Tensor, weight: Tensor, scales: Tensor | None, text: str, sizes: Sequence[int], *rest: Any
) -> tuple[Any, ...]:
    return x, weight if scales is None else stored(weight, scales, text), _geometry(sizes), *rest


def _geometry(sizes: Sequence[int]) -> Geometry:
    """Return the geometry from the numbers that ``_record`` passes to the operator."""
    dims = (len(sizes) - 3) // 4
    kernel, stride, padding, dilation = (tuple(sizes[start : start + dims]) for start in range(3, len(sizes), dims))
    return Geometry(sizes[0], sizes[1], sizes[2], kernel, stride, padding, dilation)


_OPERATOR = FrozenOperator(lambda _, *given: _compute(*given), _fake, _record, _derivatives)
_OPERATOR.declare(
    "convolve(Tensor x, Tensor stored, Tensor? scales, str described, int[] sizes, ScalarType dtype, SymInt[]? size) "
    "-> Tensor",
    _arguments,
)


@decomposes("convolve")
def _written_out(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    text: str,
    sizes: Sequence[int],
    dtype: torch.dtype,
    size: Sequence[int] | None,
) -> Tensor:
    geometry = _geometry(sizes)
    kernel = weight.to(dtype) if scales is None else dequantized(weight, scales, text, dtype)
    kernel = kernel.view(-1, geometry.in_channels // geometry.groups, *geometry.kernel)
    more = [0] * len(geometry.kernel)
    if size is not None:
        more = [int(a - b) for a, b in zip(size, geometry.transposed_size(x.shape[2:], more), strict=True)]
    convolve = torch.ops.aten.convolution.default
    out = convolve(x.to(dtype), kernel, None, *geometry.arguments, size is not None, more, geometry.groups)
    return cast(Tensor, out).to(x.dtype)
