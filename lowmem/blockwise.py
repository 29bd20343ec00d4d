"""Block-wise 4-bit quantization: ``w ~ levels[code] * scale``, one scale for each block of a row.

Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.1, and
QLoRA, arXiv 2305.14314, section 2. Blocks run along the last dimension and never cross a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem.formats import Format, get_format
from lowmem.packing import by_block, check_block_size, pack, unpack
from lowmem.scales import ScaleEncoding, get_encoding

__all__ = ["PLAIN", "SCRATCH_BYTES", "QuantizedTensor", "check_weight", "quantize", "row_chunks", "serve"]

SCRATCH_BYTES = 2**20
"""The most temporary memory that restoring a chunk of rows takes (one row at least is restored at a time)."""

BYTES_PER_WEIGHT = 16  # at the peak of restore: a code, a value, its scale (twice at most, for a short last block)


def row_chunks(rows: int, columns: int, bytes_per_weight: int = BYTES_PER_WEIGHT) -> Iterator[slice]:
    """Yield slices over ``rows`` such that restoring each one fits ``SCRATCH_BYTES``."""
    step = max(1, SCRATCH_BYTES // (bytes_per_weight * max(1, columns)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A 4-bit tensor: packed codes, the scales of its blocks, and how to read them.

    Args:
        packed: uint8 (..., ceil(n / 2)), see ``lowmem.packing``.
        scales: (..., blocks), in the dtype of the scale encoding; ``double`` adds two bytes a row.
        shape: of the tensor that was quantized, (..., n).
        format: a key of ``FORMATS``.
        block_size: B, weights a scale.
        scale_encoding: a key of ``ENCODINGS``.
    """

    packed: Tensor
    scales: Tensor
    shape: torch.Size
    format: str
    block_size: int
    scale_encoding: str

    def __post_init__(self) -> None:
        check_block_size(self.block_size)

    @classmethod
    def empty(
        cls, shape: torch.Size, format: str, block_size: int, scale_encoding: str, *, device: torch.device | str
    ) -> QuantizedTensor:
        """Return one of a shape without values, as ``torch.empty`` does."""
        nothing = torch.empty(0, device=device)
        shaped = cls(nothing, nothing, shape, format, block_size, scale_encoding)
        packed, byte, scales, dtype = shaped.stored_layout
        return replace(
            shaped,
            packed=torch.empty(packed, dtype=byte, device=device),
            scales=torch.empty(scales, dtype=dtype, device=device),
        )

    @cached_property
    def stored_layout(self) -> tuple[torch.Size, torch.dtype, torch.Size, torch.dtype]:
        """The shape and dtype that ``packed`` has to have, and those of ``scales``."""
        *leading, columns = self.shape
        encoding = get_encoding(self.scale_encoding)
        blocks = -(-columns // self.block_size) + encoding.extra
        packed, scales = torch.Size((*leading, -(-columns // 2))), torch.Size((*leading, blocks))
        return packed, torch.uint8, scales, encoding.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the scales."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales included."""
        return 8 * self.nbytes / self.shape.numel() if self.shape.numel() else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``levels[codes] * scales``, rounded once to ``dtype``, in ``shape``.

        Raises:
            ValueError: a dtype that is not floating point.
        """
        return self.dequantize_rows(slice(None), dtype).view(self.shape)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return what ``dequantize`` gives for some rows of the tensor seen as (rows, n).

        Raises:
            ValueError: a dtype that is not floating point.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating-point dtype")
        matrix = self if len(self.shape) == 2 else self._as_matrix()
        return _serves.dequantize(matrix, rows, dtype)

    def restore(self, rows: slice) -> Tensor:
        """Return some rows of the tensor seen as (rows, n), in float32."""
        columns = self.shape[-1]
        levels = torch.tensor(get_format(self.format).levels, dtype=torch.float32, device=self.packed.device)
        packed = self.packed.reshape(-1, self.packed.shape[-1])[rows]
        codes = unpack(packed, self.block_size)[:, :columns]  # (rows, n), without the padding
        values = levels.index_select(0, codes.int().flatten()).view(codes.shape)
        stored = self.scales.reshape(-1, self.scales.shape[-1])[rows]
        scales = get_encoding(self.scale_encoding).decode(stored)  # (rows, blocks)
        return values.mul_(_spread(scales, self.block_size, columns))

    def _as_matrix(self) -> QuantizedTensor:
        packed, scales = (t.reshape(-1, t.shape[-1]) for t in (self.packed, self.scales))
        return replace(self, packed=packed, scales=scales, shape=torch.Size((packed.shape[0], self.shape[-1])))

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}  # and not what a kernel keeps

    def error_bound(self) -> Tensor:
        """Return what ``|w - dequantize()|`` never exceeds, element by element, float32, in ``shape``.

        Within [-scale, scale] a weight lies at most half the widest gap between levels, times the
        scale, from its level; beyond, at most as far as the stored scale can fall short of the
        block's largest weight. Float rounding adds four units in the last place of the scale.
        """
        encoding = get_encoding(self.scale_encoding)
        stored = self.scales.reshape(-1, self.scales.shape[-1])
        scale, shortfall = encoding.decode(stored), encoding.shortfall(stored)  # (rows, blocks)
        bound = torch.maximum(scale * get_format(self.format).max_distance, shortfall)
        rounding = scale * 2**-22 + 2**-148  # the second for products that are subnormal in float32
        return _spread(bound + rounding, self.block_size, self.shape[-1]).view(self.shape)


def quantize(
    weight: Tensor,
    format: str = "nf4",
    *,
    block_size: int | None = None,
    scales: str | None = None,
) -> QuantizedTensor:
    """Quantize a tensor to 4 bits a weight, block by block along its last dimension.

    Args:
        weight: floating point (..., n), n > 0, finite; any strides. It is read in float32.
        format: a key of ``FORMATS``.
        block_size: weights a scale, even, 8 to 4096; None takes the format's own.
        scales: "float32", "float16" or "double"; None takes the format's own.

    Returns:
        The codes nearest to ``weight / scale``, where the scale is the block's largest magnitude as
        it is stored. The bytes depend on the values alone: not on strides, threads or the run.

    Raises:
        TypeError: not a dense floating-point tensor.
        ValueError: an unknown format or scales, a bad block size, a meta tensor, an empty row, NaN or
            infinite weights, or a magnitude that the scales cannot hold.
    """
    form = get_format(format)
    encoding = get_encoding(form.scales if scales is None else scales)
    size = form.block_size if block_size is None else block_size
    check_block_size(size)
    check_weight(weight)
    columns = weight.shape[-1]
    if columns == 0:
        raise ValueError(
            f"weight.shape={tuple(weight.shape)} has empty rows: there is nothing to quantize; leave it out"
        )

    quantized = QuantizedTensor.empty(weight.shape, form.name, size, encoding.name, device=weight.device)
    matrix = quantized._as_matrix()
    rows = weight.detach().reshape(-1, columns)
    for chunk in row_chunks(rows.shape[0], columns):
        part = rows[chunk].float().contiguous()
        _serves.quantize_rows(part, form, size, encoding, matrix.packed[chunk], matrix.scales[chunk])
    return quantized


class _RowKernel(Protocol):
    """What a kernel does with rows. Bit for bit what ``PLAIN`` does."""

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor: ...
    def quantize_rows(
        self, rows: Tensor, form: Format, size: int, encoding: ScaleEncoding, packed: Tensor, stored: Tensor
    ) -> None: ...


class _Plain:
    """Plain torch, any device: the definition of what is true."""

    @staticmethod
    def dequantize(weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows of a matrix, restored in float32 and rounded once to ``dtype``."""
        start, stop, _ = rows.indices(weight.packed.shape[0])
        columns = weight.shape[-1]
        out = torch.empty(max(0, stop - start), columns, dtype=dtype, device=weight.packed.device)
        for chunk in row_chunks(out.shape[0], columns):
            out[chunk] = weight.restore(slice(start + chunk.start, start + chunk.stop))
        return out

    @staticmethod
    def quantize_rows(
        rows: Tensor, form: Format, size: int, encoding: ScaleEncoding, packed: Tensor, stored: Tensor
    ) -> None:
        """Quantize float32 (rows, n) into ``packed`` (rows, ceil(n / 2)) and ``stored`` (rows, blocks + extra).

        Raises:
            ValueError: NaN or infinite weights, or a magnitude that the scales cannot hold.
        """
        codes, scales = _quantize_rows(rows, form, size, encoding)
        packed.copy_(codes)
        stored.copy_(scales)


PLAIN: _RowKernel = _Plain()
_serves = PLAIN


def serve(kernel: _RowKernel) -> None:
    """Let a kernel quantize and dequantize rows; ``lowmem.kernels`` chooses which."""
    global _serves
    _serves = kernel


def check_weight(weight: Tensor) -> None:
    """Raise unless ``weight`` is a dense floating-point tensor with values and a last dimension.

    Raises:
        TypeError: not a tensor, or an integer, complex, sparse or otherwise quantized one.
        ValueError: on the meta device, or zero-dimensional.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, found {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight.dtype={weight.dtype} must be a floating-point dtype; convert it first")
    if weight.layout != torch.strided:
        raise TypeError(f"weight.layout={weight.layout} must be dense; call weight.to_dense() first")
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values; load its values first")
    if weight.dim() == 0:
        raise ValueError("weight.shape=() has no last dimension to divide into blocks; reshape it to (1,)")


def _quantize_rows(rows: Tensor, form: Format, size: int, encoding: ScaleEncoding) -> tuple[Tensor, Tensor]:
    """Quantize float32 (rows, n) to packed (rows, ceil(n / 2)) and stored scales (rows, blocks + extra)."""
    absmax = by_block(rows.abs(), size, lambda block: block.amax(-1, keepdim=True))  # (rows, blocks)
    largest = float(absmax.max())
    if not largest <= encoding.largest:  # also when it is NaN
        raise ValueError(_why_not_held(rows, largest, encoding))
    stored = encoding.encode(absmax)
    scales = encoding.decode(stored)
    divisors = scales.masked_fill(scales == 0, torch.inf)  # a block without a scale gets the zero code
    relative = rows / _spread(divisors, size, rows.shape[-1])  # (rows, n), in [-1, 1]
    boundaries = torch.tensor(form.boundaries, dtype=torch.float32, device=rows.device)
    codes = torch.bucketize(relative, boundaries, out_int32=True).to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=form.zero_code)
    return pack(codes, size), stored


def _spread(scales: Tensor, block_size: int, columns: int) -> Tensor:
    """Repeat the scales of blocks, (rows, blocks), for each of their weights: (rows, columns)."""
    return scales.repeat_interleave(min(block_size, columns), dim=-1)[:, :columns]


def _why_not_held(rows: Tensor, largest: float, encoding: ScaleEncoding) -> str:
    broken = int((~rows.isfinite()).sum())
    if broken:
        return f"weight holds {broken} values that are NaN, infinite or beyond float32; repair them first"
    return (
        f"weight holds the magnitude {largest:.6g}, above {encoding.largest:.6g}, the most that "
        f"scales={encoding.name!r} can hold; use scales='float32'"
    )
