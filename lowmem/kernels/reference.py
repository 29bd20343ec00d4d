"""The backend in plain torch, on any device, against which all others are tested. It dequantizes a chunk of rows at a
time, and reads no value of a tensor, so that it never waits for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lowmem.kernels import int8_rounding
from lowmem.kernels.cached_attention import attention, encode_states
from lowmem.kernels.codes_8bit import decode_8bit, encode_8bit
from lowmem.kernels.column_rounding import round_columns
from lowmem.kernels.rms_norm_and_gating import entropies, gated, gated_grad, norm, norm_grad
from lowmem.kernels.tensor_checks import hide_from_selective_checkpoints
from lowmem.quant.backend import Backend, LowRank, Weight, fast_matmul_dtype
from lowmem.quant.formats import Format, get_format
from lowmem.quant.packing import apply_to_blocks_and_rest
from lowmem.quant.scale_encodings import ScaleEncoding
from lowmem.quant.scale_search import (
    block_absmax,
    block_range_offsets,
    block_sums,
    expand_block_scales,
    least_error_scales,
    least_unclipped_scales,
    nearest_codes,
)
from lowmem.quant.tensor import QuantizedTensor, Squares, row_slices_within_scratch

__all__ = [
    "add_low_rank",
    "add_product",
    "attention",
    "cpu_backends_and_description",
    "decode_8bit",
    "dequantize",
    "encode_8bit",
    "encode_states",
    "entropies",
    "explain",
    "fast_bfloat16",
    "gated",
    "gated_grad",
    "input_grad",
    "is_asynchronous",
    "linear",
    "name",
    "norm",
    "norm_grad",
    "quantize_rows",
    "quantizing_bytes",
    "round_columns",
    "serves_rows",
    "squares",
]

name = "reference"
fast_bfloat16 = True
is_asynchronous = True  # of the devices that no other backend serves

ChunkDequantizer: TypeAlias = Callable[[Weight, slice, torch.dtype, "tuple[float, ...] | None"], Tensor]
"""Returns rows of a weight in a dtype; numbers replace the levels of its format."""


class _ReferenceCpuBackend:
    """This module as the backend of CPUs: torch's report of the CPU says whether bfloat16 products are fast."""

    fast_bfloat16 = torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT")
    is_asynchronous = False

    def __getattr__(self, name: str) -> Any:
        return globals()[name]


def cpu_backends_and_description() -> tuple[list[Backend], str]:
    """Return this module for CPUs, and how it computes."""
    return [cast(Backend, _ReferenceCpuBackend())], "plain torch dequantizes rows in chunks"


def dequantized_rows(
    weight: Weight, rows: slice, dtype: torch.dtype, levels: tuple[float, ...] | None = None
) -> Tensor:
    """Return rows of a weight, dequantized in float32 and rounded once; ``levels`` replace those of its format."""
    return weight.restore(rows, levels).to(dtype) if isinstance(weight, QuantizedTensor) else weight[rows].to(dtype)


def check_input_dtype_and_width(x: Tensor, in_features: int) -> None:
    """Raise a RuntimeError for an input that is not floating point, or does not end in ``in_features`` columns."""
    if not x.is_floating_point():
        raise RuntimeError(f"input.dtype={x.dtype} must be a floating-point dtype")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(f"input.shape={tuple(x.shape)} must end in in_features={in_features}")


def call_on_flattened_batch(function: Callable[..., Tensor], x: Tensor, weight: Weight, *arguments: Any) -> Tensor:
    """Return ``function(x, weight, *arguments)`` of an input (..., in) for a function that takes (batch, in)."""
    check_input_dtype_and_width(x, weight.shape[1])
    return function(x.flatten(0, -2), weight, *arguments).view(*x.shape[:-1], weight.shape[0])


@hide_from_selective_checkpoints
def linear(
    x: Tensor,
    weight: Weight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    dequantize_chunk: ChunkDequantizer = dequantized_rows,
) -> Tensor:
    """Return ``x @ W.T + bias + s (x @ A.T) @ B.T``: (..., in) -> (..., out), in ``dtype``.

    Where torch is slow at ``dtype`` (``fast_matmul_dtype``), the dequantized weight is not rounded to it, and
    products are computed in float32. With torch.int8 the input, and the levels of formats that need it, are rounded
    to 8 bits (``lowmem.kernels.int8_rounding``); products are summed in float32, and the result has the dtype of x.
    Offsets are multiplied with the sums of the input over blocks, of which neither is rounded.

    Args:
        x: floating point (..., in), of at least two dimensions.
        weight: (out, in); a QuantizedTensor for torch.int8.
        dtype: to compute in, and of the result.
        bias: (out,), or None.
        low_rank: A, B and s, applied to x by ``add_low_rank``; or None.
        dequantize_chunk: dequantizes a chunk of rows.

    Raises:
        RuntimeError: x has another shape, or is not floating point; or a 4-bit weight's stored tensors do not have
            the layout that its shape needs.
        TypeError: torch.int8 with a 16-bit weight.
    """
    if x.dim() != 2:
        return call_on_flattened_batch(linear, x, weight, dtype, bias, low_rank, dequantize_chunk)
    out_features, in_features = weight.shape
    check_input_dtype_and_width(x, in_features)
    levels = None
    if dtype is torch.int8:
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(f"dtype={dtype} is for weights of 4 bits, not for {weight.dtype}: give a float dtype")
        form = get_format(weight.format)
        dtype, levels = (
            torch.float32,
            form.levels if form.width.is_centered else int8_rounding.step_count_and_rounded_levels(form.levels)[1],
        )
        factor = int8_rounding.round_inputs_to_int8_grid(x, weight.block_size)
    else:
        factor = x.to(dtype)
    out, wide = factor.new_empty(x.shape[0], out_features), fast_matmul_dtype(dtype, x)
    factor = factor.to(wide)
    for rows in row_slices_within_scratch(out_features, in_features, device=x.device):
        part = dequantize_chunk(weight, rows, wide, levels)  # (rows, in)
        if levels is None or not isinstance(weight, QuantizedTensor) or not weight.has_offsets:
            matmul_into(out[:, rows], factor, part.t())
            continue
        offsets = weight.encoding.decode_offsets(weight.scales[rows])  # (rows, blocks)
        part = weight.without_offsets().restore(rows, levels)
        torch.mm(factor, part.t(), out=out[:, rows])
        out[:, rows].addmm_(block_sums(x.float(), weight.block_size), offsets.t())
    if bias is not None:
        out.add_(bias)
    out = out if levels is None else out.to(x.dtype)
    return out if low_rank is None else add_low_rank(out, x, *low_rank)


def input_grad(
    grad: Tensor, weight: Weight, dtype: torch.dtype, dequantize_chunk: ChunkDequantizer = dequantized_rows
) -> Tensor:
    """Return ``grad @ W``: (batch, out) -> (batch, in), in ``dtype``, which is floating point.

    Sums over chunks of rows are kept in float32 at least, as those inside one half-precision product are. Where torch
    is slow at ``dtype``, products are as those of ``linear``.
    """
    out_features, in_features = weight.shape
    if grad.shape[1] != out_features:
        raise RuntimeError(f"grad.shape={tuple(grad.shape)} must end in out_features={out_features}")
    grad = grad.to(dtype)
    sums = torch.zeros(
        grad.shape[0], in_features, dtype=torch.promote_types(dtype, torch.float32), device=grad.device
    )
    wide = fast_matmul_dtype(dtype, grad)
    for rows in row_slices_within_scratch(out_features, in_features, device=grad.device):
        part = dequantize_chunk(weight, rows, wide, None)  # (rows, in)
        if sums.dtype == wide:
            sums.addmm_(grad[:, rows].to(wide), part)
        else:
            sums += grad[:, rows] @ part
        # Before the next chunk is dequantized
        del part
    return sums.to(dtype)


def add_low_rank(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``base + scaling * (x @ A.T) @ B.T``: (batch, out), in the dtype of ``base``.

    A (rank, in) and B (out, rank) have the dtype of x.
    """
    wide = fast_matmul_dtype(x.dtype, x)
    x, a, b = x.to(wide), a.to(wide), b.to(wide)
    narrow = x @ a.t()  # (batch, rank)
    if base.dtype == b.dtype:
        return torch.addmm(base, narrow, b.t(), alpha=scaling)
    return base + ((narrow * scaling) @ b.t()).to(base.dtype)


def add_product(
    out: Tensor, x: Tensor, weight: Weight, transposed: bool, dequantize_chunk: ChunkDequantizer = dequantized_rows
) -> Tensor:
    """Add ``x @ W.T`` to ``out``, or ``x @ W`` if transposed, in place: sums in float32 or wider, rounded once.

    ``out`` and x are floating point, of one dtype.
    """
    of_torch = fast_matmul_dtype(x.dtype, x)
    if transposed:
        wide = torch.promote_types(out.dtype, torch.float32)
        sums = out.to(wide)
        for rows in row_slices_within_scratch(*weight.shape, device=x.device):
            sums.addmm_(x[:, rows].to(wide), dequantize_chunk(weight, rows, of_torch, None).to(wide))
        return out.copy_(sums)
    x = x.to(of_torch)
    for rows in row_slices_within_scratch(*weight.shape, device=x.device):
        part = dequantize_chunk(weight, rows, of_torch, None).t()  # (in, rows)
        if of_torch is out.dtype:
            out[:, rows].addmm_(x, part)
        else:
            out[:, rows] = out[:, rows].to(of_torch).addmm_(x, part)
    return out


def matmul_into(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """Write ``x @ factor`` to ``out``, whose dtype may differ from x's. ``out=`` keeps autocast from casting."""
    same = x.dtype is out.dtype
    product = torch.mm(x, factor, out=out if same else x.new_empty(out.shape))
    if not same:
        out.copy_(product)


def dequantize(weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return rows of a 4-bit matrix (out, in), dequantized in float32 and rounded once to ``dtype``."""
    # Here, since an empty slice never gets to ``restore``
    weight.check_layout()
    chosen, columns = range(weight.shape[0])[rows], weight.shape[-1]
    out = torch.empty(len(chosen), columns, dtype=dtype, device=weight.packed.device)
    for chunk in row_slices_within_scratch(len(chosen), columns, device=out.device):
        out[chunk] = weight.restore(slice(chosen.start + chunk.start, chosen.start + chunk.stop))
    return out


def quantizing_bytes(rows: Tensor, into: QuantizedTensor) -> float:
    """Return the scratch of ``quantize_rows`` in bytes per weight; a search for scales takes twice as much."""
    return 16 if into.method == "absmax" else 32


def quantize_rows(rows: Tensor, into: QuantizedTensor, chunk: slice, importance: Tensor | None) -> Squares:
    """Quantize rows (rows, n), read in float32, into the rows ``chunk`` of the matrix ``into``, by its method.

    Returns:
        The squares of the weights and of their errors, which are rounded to float32.

    Raises:
        ValueError: NaN or infinite weights, or a magnitude that the scales cannot hold.
    """
    form, size = get_format(into.format), into.block_size
    weights = rows.float().contiguous()
    rows, stored = subtract_offsets_and_encode_scales(weights, into, importance)
    codes = nearest_codes(rows, into.encoding.decode(stored), form, size)
    into.packed[chunk] = form.width.pack_rows(codes, size, form.zero_code)
    used = apply_to_blocks_and_rest(codes != form.zero_code, size, lambda block: block.any(-1, keepdim=True))
    into.scales[chunk] = zero_unused_scales(stored, used, form)
    # Before a chunk is dequantized
    del rows, stored, codes, used
    return chunk_square_sums(weights, into, chunk)


def chunk_square_sums(weights: Tensor, quantized: QuantizedTensor, chunk: slice) -> Squares:
    """Return what rows lost that were quantized into the rows ``chunk`` of a matrix."""
    first = chunk.indices(quantized.shape[0])[0]
    return Squares.total(
        squares(weights[part], quantized.restore(slice(first + part.start, first + part.stop)))
        for part in row_slices_within_scratch(*weights.shape, device=weights.device)
    )


def squares(x: Tensor, other: Tensor) -> Squares:
    """Return the sums of ``(x - other)^2`` and ``x^2`` of two matrices: differences in float32, or float64 where x
    or ``other`` is; sums in float64, since squares of float32 numbers may overflow or underflow float32."""
    wide = torch.promote_types(torch.promote_types(x.dtype, other.dtype), torch.float32)
    numbers = x.to(wide)
    # Freed before the next sum
    lost = float((numbers - other.to(wide)).double().square_().sum())
    return Squares(lost, float(numbers.to(torch.float64, copy=True).square_().sum()))


def subtract_offsets_and_encode_scales(
    rows: Tensor, target: QuantizedTensor, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what is left of float32 (rows, n) when offsets are taken off, and scales and offsets as stored.

    Raises:
        ValueError: see ``quantize_rows``.
    """
    form, encoding, size = get_format(target.format), target.encoding, target.block_size
    scales = block_absmax(rows, size, form.signed)  # (rows, blocks)
    # Twice: dequantized weights then give the same float32 scale again
    if form.width.is_centered:
        once = scales / form.top
        twice = once * form.top / form.top
        # Rounded up, the scale gives a weight beyond float32
        beyond = twice.isinf() & once.isfinite()
        scales = torch.where(beyond, torch.nextafter(once, torch.zeros_like(once)), twice)
    largest = float(scales.abs().max())
    # Also when it is NaN
    if not largest <= encoding.largest:
        raise ValueError(_scale_range_error_message(rows, largest, encoding, form.top))
    if encoding.offsets:
        offsets = encoding.round_offsets_down(block_range_offsets(rows, form, size))  # (rows, blocks)
        rows = rows - expand_block_scales(offsets, size, rows.shape[1])
        scales = least_unclipped_scales(rows, form, size)
        if not float(scales.max()) <= encoding.largest:
            raise ValueError(_scale_range_error_message(rows, float(scales.max()), encoding))
    if target.method == "search":
        top = None if form.signed and not encoding.offsets else scales
        scales = least_error_scales(rows, form, size, encoding.largest, importance, top)
    stored = encoding.encode(scales)
    return rows, encoding.concatenate_scales_and_offsets(stored, offsets) if encoding.offsets else stored


def zero_unused_scales(stored_scales: Tensor, is_block_used: Tensor, form: Format) -> Tensor:
    """Zero the stored scales of blocks that use zero codes alone, in place; ``is_block_used`` is boolean (rows,
    blocks)."""
    if form.levels[form.zero_code] == 0:
        # Such a block dequantizes to zeros, for which requantizing stores a zero scale. Storing it here already makes
        # requantizing give the same bytes.
        stored_scales[:, : is_block_used.shape[1]].masked_fill_(~is_block_used, 0)
    return stored_scales


def _scale_range_error_message(
    weights: Tensor, largest_scale: float, encoding: ScaleEncoding, top: float = 1.0
) -> str:
    if broken := int((~weights.isfinite()).sum()):
        return f"weight holds {broken} values that are NaN, infinite or beyond float32; repair them first"
    return (
        f"weight holds the magnitude {largest_scale * top:.6g}, above {encoding.largest * top:.6g}, the most that "
        f"scales={encoding.name!r} can hold; use scales='float32'"
    )


def serves_rows(x: Tensor) -> bool:
    """Return False: torch's own functions are faster."""
    return False


def explain(weight: Weight, rows: int, dtype: torch.dtype) -> str:
    """Return how products are computed, whatever the weight, the rows of the input and the dtype."""
    return f"linear, input_grad: plain torch dequantizes rows in chunks and multiplies, {name}"
