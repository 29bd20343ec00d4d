"""Quantizes a tensor block by block, or rounds it to 16 bits, and measures the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import short_repr
from lowmem.quant.backend import backend_of
from lowmem.quant.formats import Format, default_format_and_block_size, get_format
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.quant.tensor import QuantizedTensor, Squares, row_slices_within_scratch


def quantize(
    weight: Tensor,
    format: str | Sequence[str] | None = None,
    *,
    block_size: int | None = None,
    scales: str | None = None,
    search: bool | None = None,
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize a tensor to 4 bits per weight, block by block along its last dimension.

    Each block has one scale, its largest magnitude or the result of a search, and the code of a weight is the level
    nearest to ``weight / scale`` with the scale as stored (arXiv 2110.02861, section 2.1).

    Args:
        weight: floating point (..., n), n > 0, finite; any strides. It is read in float32.
        format: a key of ``FORMATS``; or several, of which the one with the least squared error is taken. None takes
            "bof4s", in blocks of 32 unless ``block_size`` is given, as ``FourBit()`` does.
        block_size: weights per scale, even, 8 to 4096; None takes the format's default.
        scales: "float32", "float16" or "double"; None takes the format's default.
        search: whether to search for the scale of each block with the least squared error, instead of taking its
            largest magnitude; None does as the format's default.
        importance: floating point (n,), at least 0: factor of each column's squared error in the search and in the
            choice of the format; None weighs all columns alike.

    Returns:
        The quantized tensor, of the same shape. Its bytes depend on the values alone: not on strides, threads or
        the run.

    Raises:
        TypeError: not a dense floating-point tensor.
        ValueError: an unknown format or scales, a bad block size, a meta tensor, an empty row, NaN or
            infinite weights, a magnitude that the scales cannot hold, or an importance of another length, negative
            or not finite.
    """
    check_quantizable_weight(weight)
    if format is None:
        format, block_size = default_format_and_block_size(block_size)
    if weight.shape[-1] == 0:
        raise ValueError(
            f"weight.shape={tuple(weight.shape)} has empty rows: there is nothing to quantize; leave it out"
        )
    if importance is not None:
        importance = _checked_importance(importance, weight)
    names = [format] if isinstance(format, str) or not isinstance(format, Sequence) else format
    tried = [_quantize_in_format(weight, name, block_size, scales, search, importance) for name in names]
    if not tried:
        raise ValueError("format=() names no format: name one, or several to choose from")
    if len(tried) == 1:
        return tried[0]
    return min(tried, key=lambda q: _column_weighted_squared_error(weight, q, importance))


def _quantize_in_format(
    weight: Tensor,
    format: str,
    block_size: int | None,
    scales: str | None,
    search: bool | None,
    importance: Tensor | None,
) -> QuantizedTensor:
    """Quantize a checked weight, a chunk of rows at a time, by the backend of its device."""
    form = get_format(format)
    encoding = get_scale_encoding(form.scales if scales is None else scales, form.signed)
    size = form.block_size if block_size is None else block_size
    method = checked_scale_method(form, search)
    quantized = QuantizedTensor.empty(weight.shape, form.name, size, encoding.name, method, device=weight.device)
    matrix = quantized.as_matrix()
    rows = weight.detach().reshape(-1, weight.shape[-1])
    backend = backend_of(rows)
    squares = Squares.total(
        backend.quantize_rows(rows[chunk], matrix, chunk, importance)
        for chunk in row_slices_within_scratch(
            len(rows), rows.shape[1], backend.quantizing_bytes(rows, matrix), device=rows.device
        )
    )
    # Float64 was rounded before, and what that lost counts as an error, too
    is_exact = weight.itemsize <= 4
    return replace(quantized, squares=squares if is_exact else None)


def checked_scale_method(form: Format, search: bool | None) -> str:
    """Return the key of ``METHODS`` for a ``search`` argument; None: the format's default."""
    if not isinstance(search, bool | None):
        raise ValueError(f"search={short_repr(search)} must be True or False, or None for the format's default")
    return "search" if (form.search if search is None else search) else "absmax"


def requantize_changed_rows(quantized: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    """Quantize a changed weight, of the same shape, as ``quantized`` was; rows with the same values keep their bytes.

    A search would find other scales for values that an earlier search has rounded. Of a calibrated weight, whose
    inputs are not known here, scales are searched for, as are those of another program's 4-bit weight. In 8 bits a
    search takes ten times as long, and lowers the error by a tenth.
    """
    is_centered, method = get_format(quantized.format).width.is_centered, quantized.method
    again = quantize(
        weight,
        quantized.format,
        block_size=quantized.block_size,
        scales=quantized.scale_encoding,
        search=method == "search" or (method != "absmax" and not is_centered),
    )
    before, after = quantized.as_matrix(), again.as_matrix()
    rows = weight.detach().reshape(after.shape)
    unchanged, dequantize, again = True, backend_of(rows).dequantize, replace(again, squares=None)
    for chunk in row_slices_within_scratch(*after.shape, device=rows.device):
        same = (dequantize(before, chunk, torch.float32) == rows[chunk]).all(-1, keepdim=True)  # (rows, 1)
        for stored, into in ((before.packed, after.packed), (before.scales, after.scales)):
            into[chunk] = torch.where(same, stored[chunk], into[chunk])
        unchanged = unchanged and bool(same.all())
    return replace(again, method=quantized.method) if unchanged else again


def _checked_importance(importance: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        raise TypeError(f"importance={type(importance).__name__} must be a floating-point tensor")
    if importance.is_nested:
        raise TypeError(f"importance is a nested tensor (layout={importance.layout}); pass one number a column")
    if importance.shape != weight.shape[-1:]:
        raise ValueError(f"importance.shape={tuple(importance.shape)} must be ({weight.shape[-1]},), one a column")
    importance = importance.detach().to(weight.device, torch.float32).contiguous()
    if not (importance.isfinite().all() and (importance >= 0).all()):
        raise ValueError("importance holds values that are negative, NaN or infinite; repair them first")
    return importance


def relative_error(weight: Tensor, stored: Tensor | QuantizedTensor) -> float:
    """Return ``rms(weight - stored) / rms(weight)``, rounded to 4 digits; 0 if the weight is empty or all zero.

    ``stored`` has as many values as the weight, in the same order.
    """
    return error_and_weight_squares(weight, stored).relative_error


def error_and_weight_squares(weight: Tensor, stored: Tensor | QuantizedTensor) -> Squares:
    """Return the squares of a weight and of its differences from ``stored``, a chunk of rows at a time."""
    if not weight.numel():
        return Squares(0.0, 0.0)
    rows = weight.detach().reshape(-1, stored.shape[-1])  # (rows, n), where n is that of stored
    matrix = stored.as_matrix() if isinstance(stored, QuantizedTensor) else stored.detach().reshape(rows.shape)
    backend = backend_of(rows)

    def stored_values(row_slice: slice) -> Tensor:
        return (
            matrix[row_slice] if isinstance(matrix, Tensor) else backend.dequantize(matrix, row_slice, torch.float32)
        )

    chunks = row_slices_within_scratch(*rows.shape, device=rows.device)
    return Squares.total(backend.squares(rows[chunk], stored_values(chunk)) for chunk in chunks)


def recorded_or_measured_squares(weight: Tensor, stored: Tensor | QuantizedTensor) -> Squares:
    """Return the squares of a weight and of its error: as quantizing summed them, if it did."""
    known = stored.squares if isinstance(stored, QuantizedTensor) else None
    return error_and_weight_squares(weight, stored) if known is None else known


def _column_weighted_squared_error(
    weight: Tensor, stored: Tensor | QuantizedTensor, importance: Tensor | None
) -> float:
    """Return the sum of squared errors, each multiplied by the importance of its column."""
    rows, total = weight.detach().reshape(-1, weight.shape[-1]), 0.0
    matrix = stored.as_matrix() if isinstance(stored, QuantizedTensor) else stored.detach().reshape(rows.shape)
    for chunk in row_slices_within_scratch(*rows.shape, device=rows.device):
        if isinstance(matrix, QuantizedTensor):
            values = backend_of(rows).dequantize(matrix, chunk, torch.float32)
        else:
            values = matrix[chunk]
        # In double: squares of float32 numbers may overflow or underflow float32.
        error = rows[chunk].to(torch.float64, copy=True).sub_(values).square_()
        total += float((error if importance is None else error.mul_(importance)).sum())
    return total


def check_quantizable_weight(weight: Tensor) -> None:
    """Raise a TypeError or ValueError unless ``weight`` is a dense floating-point tensor with values and rows."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, found {type(weight).__name__}")
    kind: Any = type(weight)
    library = kind.__module__.partition(".")[0]
    if kind.__torch_dispatch__ != Tensor.__torch_dispatch__ and library not in ("torch", "lowmem"):
        raise TypeError(
            f"weight is a {kind.__name__} of {library}, whose values cannot be read: quantize the dense weight "
            "that it was made of"
        )
    if not weight.is_floating_point():
        raise TypeError(f"weight.dtype={weight.dtype} must be a floating-point dtype; convert it first")
    if weight.is_nested:
        raise TypeError(
            f"weight is a nested tensor (layout={weight.layout}), which has no rows of one length; quantize each of "
            "weight.unbind()"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"weight.layout={weight.layout} must be dense; call weight.to_dense() first")
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values; load its values first")
    if weight.dim() == 0:
        raise ValueError("weight.shape=() has no last dimension to divide into blocks; reshape it to (1,)")


def checked_rounded_copy(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a contiguous copy in ``dtype``.

    Raises:
        TypeError, ValueError: see ``check_quantizable_weight``; values are not finite, or out of ``dtype``'s range.
    """
    check_quantizable_weight(tensor)
    broken = _count_nonfinite(tensor)
    if broken:
        raise ValueError(f"{name} holds {broken} values that are NaN or infinite; repair them first")
    rounded = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if _count_nonfinite(rounded):
        largest = float(tensor.detach().double().abs().max())
        raise ValueError(
            f"{name} holds the magnitude {largest:.6g}, above {torch.finfo(dtype).max:.6g}, the most that "
            f"{dtype} can hold; use Half(torch.bfloat16), or leave the layer out with skip="
        )
    return rounded


def _count_nonfinite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite, with scratch of a few rows: torch's own would copy the tensor."""
    rows, count = tensor.detach(), 0
    for chunk in row_slices_within_scratch(len(rows), rows[0].numel() if len(rows) else 0):
        # Float8 has no isfinite
        part = rows[chunk] if tensor.itemsize > 1 else rows[chunk].float()
        count += int((~part.isfinite()).sum())
    return count
