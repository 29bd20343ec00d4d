"""The operators, written out in plain ones, without a view of bytes as other numbers: for exporters, whose targets
have no lowmem (``torch.onnx.export``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels.frozen_weight_operator import parse_quantization_description
from lowmem.quant.backend import product_result_dtype
from lowmem.quant.formats import get_format
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.quant.scale_search import expand_block_scales


def register_decomposition(operator_name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as what ``torch.ops.lowmem.<name>`` does, with its arguments."""
    packet, _, overload = operator_name.partition(".")
    operator = getattr(getattr(torch.ops.lowmem, packet), overload or "default")

    def register_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # Exporters to other formats read all of this table. Fake tensors of dynamic sizes do, too, unless the other
        # one has the operator: then they call its fake implementation.
        torch._decomp.decomposition_table[operator] = function
        torch._decomp.meta_table[operator] = operator
        return function

    return register_function


def decomposed_dequantize(packed: Tensor, scales: Tensor, description: str, dtype: torch.dtype) -> Tensor:
    """Return the matrix (rows, columns) of ``codes_scales_and_description`` in ``dtype``."""
    columns, (format, block_size, scale_encoding), _ = parse_quantization_description(description)
    form = get_format(format)
    codes = form.width.unpack_float_rows(packed.float(), block_size, columns)
    # A table of 256 numbers would be as many nodes of a graph
    values = (codes - 128) / form.divisor if form.width.is_centered else _table_lookup(form.levels, codes)
    return (
        values * expand_block_scales(_decoded_scales(scales, scale_encoding, form.signed), block_size, columns)
    ).to(dtype)


def decomposed_product(x: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None, *low_rank: Any) -> Tensor:
    """Return ``x @ W.T + bias + s (x @ A.T) @ B.T`` for a dense weight, or ``x @ W``, in the weight's dtype."""
    wide = x.to(weight.dtype)
    out = wide @ weight if transposed else functional.linear(wide, weight)
    out = out if bias is None else out + bias.to(out.dtype)
    a, b, scaling = low_rank if low_rank else (None, None, None)
    if a is None or b is None:
        return out
    update: Tensor = functional.linear(functional.linear(x.to(a.dtype), a), b) * scaling
    return out + update.to(out.dtype)


def _decoded_scales(scales: Tensor, scale_encoding: str, signed: bool) -> Tensor:
    """Return the scales (rows, blocks) in float32, given as they are or as their bytes."""
    encoding = get_scale_encoding(scale_encoding, signed)
    if scales.dtype is not torch.uint8:
        decoded: Tensor = encoding.decode(scales)
        return decoded
    if encoding.name == "float32":
        return _floats_from_bytes(scales, 4)
    if encoding.name == "float16":
        return _floats_from_bytes(scales, 2)
    count = scales[:, : -encoding.extra_per_row].float()
    if encoding.signed:
        count = torch.where(count >= 128, 128 - count, count)
    return count * _floats_from_bytes(scales[:, -encoding.extra_per_row :], 2) / (127 if encoding.signed else 255)


def _floats_from_bytes(stored_bytes: Tensor, itemsize: int) -> Tensor:
    """Return the numbers (rows, n) of bytes (rows, n * size), by arithmetic that is exact in float32."""
    bits, bias = (10, 15) if itemsize == 2 else (23, 127)  # of the mantissa, and of the exponent
    *low, second, first = stored_bytes.unflatten(-1, (-1, itemsize)).float().unbind(-1)  # (rows, n) each
    negative = first >= 128
    # Exponent, and the mantissa's first bits
    head = torch.where(negative, first - 128, first) * 256 + second
    step = 2.0 ** (bits - 8 * len(low))
    exponent = (head / step).floor()
    mantissa = head - exponent * step
    for byte in reversed(low):
        mantissa = mantissa * 256 + byte
    fraction = torch.where(exponent == 0, mantissa, mantissa + 2.0**bits) * 2.0**-bits
    power = torch.where(exponent == 0, exponent, exponent - 1)  # of the number, less 1 - bias
    high = (power / 16).floor()
    fraction = fraction * _table_lookup([2.0**power_index for power_index in range(16)], power - 16 * high)
    magnitude = fraction * _table_lookup(
        [2.0 ** (16 * power_index + 1 - bias) for power_index in range(2 * bias // 16 + 1)], high
    )
    return torch.where(negative, -magnitude, magnitude)


def decomposed_product_4bit(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    description: str,
    dtype: torch.dtype | None,
    transposed: bool,
    *bias_and_low_rank: Any,
) -> Tensor:
    """Return the product with a 4-bit weight; a dtype of None is that of ``x``.

    Raises:
        RuntimeError: a product in 8-bit integers.
    """
    if dtype is torch.int8 and not transposed:
        raise RuntimeError(
            "lowmem has no plain operators for compute_dtype=torch.int8, as torch.onnx.export needs: convert the "
            "model with compute_dtype=None"
        )
    weight = decomposed_dequantize(packed, scales, description, product_result_dtype(dtype or x.dtype, x.dtype))
    return decomposed_product(x, weight, transposed, *(bias_and_low_rank or (None,)))


def _table_lookup(values: Sequence[float], indices: Tensor) -> Tensor:
    """Return ``values[indices]``. The table is stacked: of ``torch.tensor`` a graph would hold writes in place."""
    table = torch.stack([torch.full((), value, dtype=torch.float32, device=indices.device) for value in values])
    return table.index_select(0, indices.flatten().int()).view(indices.shape)
