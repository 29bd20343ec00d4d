"""The quantized tensor: ``w ~ levels[code] * scale``, one scale for each block of a row (Dettmers et al., arXiv
2110.02861, section 2.1, and QLoRA, arXiv 2305.14314, section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowmem.quant.formats import get_format
from lowmem.quant.packing import check_block_size
from lowmem.quant.scale_encodings import ScaleEncoding, get_scale_encoding
from lowmem.quant.scale_search import CANDIDATES, expand_block_scales

SCRATCH_BYTES = 2**20
"""Limit of the scratch memory for dequantizing a chunk of rows on the CPU, whose cache holds it."""

DEVICE_SCRATCH_BYTES = 144 * 2**20
"""The same on any other device, at least: each chunk starts some ten kernels, and so has 32 MiB of float32 values."""

DEVICE_SHARE = 64
"""Of the memory of a GPU, the part that is the limit where it is more."""

ROW_MULTIPLE = 64
"""On any other device, a chunk of more rows has a multiple of these: its products begin at whole tiles, and at
addresses that 16 bytes divide."""

BYTES_PER_WEIGHT = 18
"""Peak scratch of ``QuantizedTensor.restore``: an unpacked code (1 byte, 2 in a row of one weight), its index (4),
the value (4), and the scale (at most 8, where the last block is short)."""


def device_scratch_bytes(device: torch.device) -> int:
    """Return the limit of scratch memory on a device other than the CPU; the least one inside a compiled graph."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return DEVICE_SCRATCH_BYTES
    return max(DEVICE_SCRATCH_BYTES, cuda_memory_bytes_or_zero(device) // DEVICE_SHARE)


@cache
def cuda_memory_bytes_or_zero(device: torch.device) -> int:
    """Return the memory of a GPU; 0 where torch finds none."""
    return int(torch.cuda.get_device_properties(device).total_memory) if torch.cuda.is_available() else 0


def row_slices_within_scratch(
    row_count: int, columns: int, bytes_per_weight: float = BYTES_PER_WEIGHT, *, device: torch.device | None = None
) -> Iterator[slice]:
    """Yield slices of at least one row each, whose scratch fits into the limit of a device (None: the CPU)."""
    on_device = device is not None and DEQUANTIZERS[device.type].is_asynchronous
    limit = device_scratch_bytes(device) if device is not None and on_device else SCRATCH_BYTES
    step = max(1, int(limit // max(1, bytes_per_weight * columns)))
    if on_device and step > ROW_MULTIPLE:
        step -= step % ROW_MULTIPLE
    return (slice(start, min(start + step, row_count)) for start in range(0, row_count, step))


class Squares(NamedTuple):
    """Sums of squared float32 numbers, in float64.

    Attributes:
        lost: of the differences between a weight and what is stored.
        size: of the weight.
    """

    error_squares: float
    weight_squares: float

    @property
    def relative_error(self) -> float:
        """``rms(weight - stored) / rms(weight)``, rounded to 4 digits; 0 if the weight is empty or all zero."""
        return float(f"{math.sqrt(self.error_squares / self.weight_squares) if self.weight_squares else 0.0:.4g}")

    @staticmethod
    def total(sums: Iterable[Squares]) -> Squares:
        """Return the squares of several parts together."""
        error_squares = weight_squares = 0.0
        for part in sums:
            error_squares, weight_squares = error_squares + part.error_squares, weight_squares + part.weight_squares
        return Squares(error_squares, weight_squares)


METHODS = {"absmax": 1.0, "search": min(CANDIDATES), "calibrated": 0.0, "imported": 0.0}
"""How scales are chosen, with the least possible ratio of a scale to its block's largest magnitude (0: none)."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in 4 or 8 bits: its codes, the scales of its blocks, and how to decode them.

    Args:
        packed: the codes: uint8 (..., ceil(n / 2)) in 4 bits, see ``lowmem.quant.packing``; (..., n) in 8 bits.
        scales: (..., blocks), in the dtype of the scale encoding; ``double`` adds two bytes per row, and encodings
            with offsets one for each block.
        shape: (..., n), the shape of the tensor that was quantized.
        format: a key of ``FORMATS``, ``IMPORTED`` or ``EIGHT_BIT``.
        block_size: B, weights per scale.
        scale_encoding: a key of ``ENCODINGS`` or ``OFFSETS``.
        method: how scales and codes were chosen, a key of ``METHODS``.
        squares: the squared error of quantizing, and the squared weight; None: not measured.

    Attributes:
        cache: what a backend derives from the stored tensors (handles), under its own keys; left out of copies and
            pickles.
    """

    packed: Tensor
    scales: Tensor
    shape: torch.Size
    format: str
    block_size: int
    scale_encoding: str
    method: str = "absmax"
    squares: Squares | None = field(default=None, repr=False)
    cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown: choose from {', '.join(METHODS)}")

    @classmethod
    def empty(
        cls, shape: torch.Size, format: str, block_size: int, scales: str, method: str, *, device: torch.device | str
    ) -> QuantizedTensor:
        """Return a tensor of ``shape`` with uninitialized codes and scales, as ``torch.empty`` does."""
        nothing = torch.empty(0, dtype=torch.float32, device=device)
        shaped = cls(nothing, nothing, shape, format, block_size, scales, method)
        packed, byte, of_scales, dtype = shaped.stored_layout
        return replace(
            shaped,
            packed=torch.empty(packed, dtype=byte, device=device),
            scales=torch.empty(of_scales, dtype=dtype, device=device),
        )

    @property
    def stored_layout(self) -> tuple[torch.Size, torch.dtype, torch.Size, torch.dtype]:
        """The required shape and dtype of ``packed``, and those of ``scales``."""
        *leading, columns = self.shape
        encoding = self.encoding
        width = encoding.stored_row_length(-(-columns // self.block_size))
        packed = get_format(self.format).width.row_bytes(columns)
        return torch.Size((*leading, packed)), torch.uint8, torch.Size((*leading, width)), encoding.dtype

    def check_layout(self) -> None:
        """Raise unless ``packed`` and ``scales`` have the shapes and dtypes of ``stored_layout``.

        Nothing is checked under ``torch.jit.trace``, which would record each size that is read into the graph.

        Raises:
            RuntimeError: a shape or dtype differs; the error names what was found and what is needed.
        """
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            return
        packed, scales = self.packed, self.scales
        needed = self.stored_layout
        if (packed.shape, packed.dtype, scales.shape, scales.dtype) != needed:
            raise RuntimeError(
                f"packed.shape={tuple(packed.shape)}, dtype={packed.dtype} and scales.shape={tuple(scales.shape)}, "
                f"dtype={scales.dtype} do not hold a weight of shape {tuple(self.shape)} in {self.format}: they need "
                f"{tuple(needed[0])}, {needed[1]} and {tuple(needed[2])}, {needed[3]}"
            )

    @property
    def encoding(self) -> ScaleEncoding:
        """The encoding of the scales."""
        form = get_format(self.format)
        return get_scale_encoding(self.scale_encoding, form.signed, form.ggml_divisor)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the scales together."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes / self.shape.numel() if self.shape.numel() else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``levels[codes] * scales (+ offsets)``, rounded once to ``dtype``, in ``shape``.

        Raises:
            RuntimeError: stored tensors of another layout, see ``check_layout``.
            ValueError: a dtype that is not floating point.
        """
        return self.dequantize_rows(slice(None), dtype).view(self.shape)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Dequantize ``rows`` of the tensor seen as (rows, n), as ``dequantize`` does and with its errors.

        Raises:
            ValueError: rows that do not follow each other.
        """
        if rows.step not in (None, 1):
            raise ValueError(f"rows={rows} must follow each other: leave the step out, and index the result")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating-point dtype")
        matrix = self if len(self.shape) == 2 else self.as_matrix()
        return DEQUANTIZERS[matrix.packed.device.type].dequantize(matrix, rows, dtype)

    def restore(self, rows: slice, levels: tuple[float, ...] | None = None) -> Tensor:
        """Dequantize ``rows`` of the tensor seen as (rows, n), to float32, in plain torch: the definition.

        ``levels`` are as many numbers as the format has, to use in place of these.
        """
        self.check_layout()
        columns = self.shape[-1]
        table = float32_table(levels or get_format(self.format).levels, self.packed.device)
        packed = self.packed.reshape(-1, self.packed.shape[-1])[rows]
        codes = self.unpacked(packed)  # (rows, n)
        # Functorch transforms of older torch versions need 64-bit indices; elsewhere these would double the scratch.
        index = codes.long() if torch._C._are_functorch_transforms_active() else codes.int()
        values = table.index_select(0, index.flatten()).view(codes.shape)
        stored = self.scales.reshape(-1, self.scales.shape[-1])[rows]
        scales = self.encoding.decode(stored)  # (rows, blocks)
        values.mul_(expand_block_scales(scales, self.block_size, columns))
        if self.encoding.offsets:
            values.add_(expand_block_scales(self.encoding.decode_offsets(stored), self.block_size, columns))
        return values

    def unpacked(self, packed: Tensor) -> Tensor:
        """Return the codes (..., n) in rows of ``packed``, of which 8-bit ones are a view."""
        return get_format(self.format).width.unpack_rows(packed, self.block_size, self.shape[-1])

    @property
    def has_offsets(self) -> bool:
        """Whether a weight is ``levels[code] * scale + offset``."""
        return self.encoding.offsets

    def offsets(self) -> Tensor:
        """Return the offsets of a tensor that has them, in float32: (..., blocks)."""
        return self.encoding.decode_offsets(self.scales)

    def without_offsets(self) -> QuantizedTensor:
        """Return a view of a tensor that has offsets, without them."""
        blocks = self.scales.shape[-1] // 2
        encoding = self.scale_encoding.removesuffix("_offsets")
        return replace(self, scales=self.scales[..., :blocks], scale_encoding=encoding, squares=None)

    def as_matrix(self) -> QuantizedTensor:
        """Return a view of the tensor as (rows, n)."""
        self.check_layout()
        packed, scales = (t.reshape(-1, t.shape[-1]) for t in (self.packed, self.scales))
        return replace(self, packed=packed, scales=scales, shape=torch.Size((packed.shape[0], self.shape[-1])))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, cache={})

    def error_bound(self) -> Tensor:
        """Return an elementwise upper bound of ``|w - dequantize()|``: float32, in ``shape``.

        A weight between the end levels (times the scale) is off by at most half the widest gap between levels, times
        the scale. A weight beyond them is clipped, and is off by at most what the block's largest weight is off by:
        ``METHODS`` bounds that weight relative to the scale, and the encoding's shortfall is added. Float rounding
        adds four units in the last place of the largest value, and of the offset.

        Raises:
            RuntimeError: stored tensors of another layout, see ``check_layout``.
            ValueError: the tensor was calibrated, or another program quantized it: no single weight has a bound.
        """
        self.check_layout()
        form, part = get_format(self.format), METHODS[self.method]
        if not part:
            moves = "it moves them to keep the layer's output"
            why = moves if self.method == "calibrated" else "another program chose scales and codes"
            raise ValueError(
                f"method={self.method!r} has no bound for single weights: {why}; compare outputs instead"
            )
        # A block's largest weight is at most this times the scale, before that is encoded
        reach = form.top / part
        stored = self.scales.reshape(-1, self.scales.shape[-1])
        scale, shortfall = (
            self.encoding.decode(stored).abs(),
            self.encoding.encoding_loss_bound(stored),
        )  # (rows, blocks)
        # Not (scale + shortfall) * reach - scale * end: the sum would round the shortfall of tiny scales away.
        # With offsets both ends of a block fall on end levels.
        beyond = shortfall * reach + scale * (reach - (1.0 if self.has_offsets else form.end))
        bound = torch.maximum(scale * form.half_gap, beyond)
        # The second term: products that are subnormal in float32
        rounding = scale * (form.top * 2**-22) + 2**-148
        if self.has_offsets:
            rounding = rounding + (scale + shortfall + self.encoding.decode_offsets(stored).abs()) * 2**-22
        return expand_block_scales(bound + rounding, self.block_size, self.shape[-1]).view(self.shape)


class Dequantizer(Protocol):
    """What a quantized tensor asks of its device; a ``Backend`` (``lowmem.quant.backend``) computes much else."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether operations run behind the host."""

    def dequantize(self, weight: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of a quantized matrix (out, in)."""


ANY = "any"
"""In place of a device type: every one that has no entry of its own."""


class _DequantizersByDeviceType(dict[str, Dequantizer]):
    def __missing__(self, device_type: str) -> Dequantizer:
        return self[ANY]


DEQUANTIZERS = _DequantizersByDeviceType()
"""By device type, as ``torch.device.type`` names it: what ``dequantize`` calls, which ``set_backend`` registers."""


def float32_table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers in float32; other devices than the CPU keep the tensor, since a copy would wait for them."""
    # A mode may make other tensors of it
    if device.type == "cpu" or torch._C._len_torch_dispatch_stack():
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    return _cached_float32_table(numbers, device)


@cache  # never freed: captured CUDA graphs read them
def _cached_float32_table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float32, device=device)
