"""How the scale of each block is stored: float32, float16, or double (8 bits per block and a float16 per row).

With offsets (``OFFSETS``), a weight is ``levels[code] * scale + offset``: a row's offsets, one for each block, lie
behind its scales, in the same dtype. One tensor holds both, so that whatever shards, gathers, saves or records scales
does so with offsets.

Codes are chosen against the *stored* scale, so the codes already account for the rounding of the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from lowmem.errors import short_repr


@dataclass(frozen=True)
class ScaleEncoding:
    """One way to store scales.

    Args:
        name: the key in ``ENCODINGS`` or ``OFFSETS``.
        dtype: of the stored tensor.
        encode: float32 scales (rows, blocks) -> stored (rows, blocks + extra), rounded towards zero; ``double``
            raises those below its first step.
        decode: stored -> float32 scales (rows, blocks).
        encoding_loss_bound: stored -> an upper bound on the magnitude that encoding took from each scale, float32
            (rows, blocks).
        largest: the largest magnitude that can be stored.
        extra_per_row: stored elements per row beyond one per block.
        signed: whether a scale can be negative.
        offsets: whether offsets lie behind the scales. ``encode`` then takes and returns scales alone.
        divisor: a power of two: stored scales divided by it are float16, too.
    """

    name: str
    dtype: torch.dtype
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    encoding_loss_bound: Callable[[Tensor], Tensor]
    largest: float
    extra_per_row: int = 0
    signed: bool = True
    offsets: bool = False
    divisor: float = 1.0

    def stored_row_length(self, block_count: int) -> int:
        """Return the stored elements of a row of ``block_count`` blocks."""
        return (2 * block_count if self.offsets else block_count) + self.extra_per_row

    def decode_offsets(self, stored_scales_and_offsets: Tensor) -> Tensor:
        """Return float32 offsets (rows, blocks), of an encoding that has them."""
        return stored_scales_and_offsets[..., stored_scales_and_offsets.shape[-1] // 2 :].float()

    def round_offsets_down(self, offsets: Tensor) -> Tensor:
        """Round float32 offsets down to what can be stored, so that no weight is below its block's offset."""
        return offsets if self.dtype == torch.float32 else _round_down_to_float16(offsets).float()

    def concatenate_scales_and_offsets(self, encoded_scales: Tensor, offsets: Tensor) -> Tensor:
        """Return encoded scales and float32 offsets (rows, blocks) as they are stored: (rows, 2 * blocks)."""
        return torch.cat([encoded_scales, offsets.to(self.dtype)], dim=-1)


_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _zero_subnormal_scales(scales: Tensor) -> Tensor:
    # Products with a subnormal scale have too few bits for requantizing to find the same codes, and processors that
    # flush subnormals would give other bytes: such blocks become zeros.
    return scales.masked_fill(scales.abs() < _SMALLEST_NORMAL, 0)


def _float16_spacing_bound(stored: Tensor) -> Tensor:
    """Return an upper bound on the distance to the next float16, exact for subnormals."""
    return (stored.float().abs() * 2**-10).clamp_min(2**-24)


def _round_down_to_float16(values: Tensor) -> Tensor:
    """Return the largest float16 that is not above each value."""
    nearest = values.to(torch.float16)
    bits = nearest.view(torch.int16)
    # One bit pattern less, or more: the next below
    step = torch.where(nearest > 0, bits - 1, bits + 1)
    lower = torch.where(nearest == 0, torch.full_like(bits, -(2**15) + 1), step).view(torch.float16)
    return torch.where(nearest.float() > values, lower, nearest)


def _round_to_float16_towards_zero(scales: Tensor) -> Tensor:
    # Rounded towards zero: the largest weight of a block then always takes an end level, so that quantizing the
    # dequantized block again finds the same scale and codes, subnormals included.
    nearest = scales.to(torch.float16)
    # One bit pattern less: the next smaller magnitude
    below = (nearest.view(torch.int16) - 1).view(torch.float16)
    # -0 becomes +0
    return torch.where(nearest.float().abs() > scales.abs(), below, nearest) + 0.0


def _row_scale_from_last_bytes(stored_scales: Tensor) -> Tensor:
    return (
        stored_scales[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    )  # (rows, 1)


def _double_scale_encoding(steps: int) -> ScaleEncoding:
    """Double quantization: QLoRA, arXiv 2305.14314, section 3, with a second scale per row.

    A block's scale is ``row_scale * n / steps``, where n is a byte: 8 bits, or a sign and 7 bits if signed. n is
    rounded down, so that the largest weight of a block takes an end level, as in float16. But n is at least 1, so
    that blocks of small weights survive an outlier elsewhere in the row. A scale that was raised to one step is
    stored positive: no weight of its block reaches an end level, so the sign of the largest weight could change
    when the block is quantized again.
    """
    signed = steps < 255

    def encode_scales(scales: Tensor) -> Tensor:
        magnitude = scales.abs()
        row_scale = _round_to_float16_towards_zero(magnitude.amax(-1, keepdim=True))  # (rows, 1)
        # Scaled up slightly, since rounding may leave the scale of a dequantized block just below its own step.
        raised = (magnitude * (steps * (1 + 2**-20)) / row_scale.float().clamp_min(2**-24)).floor()
        count = raised.clamp(1, steps).masked_fill((magnitude == 0) | (row_scale == 0), 0)  # (rows, blocks)
        if signed:
            count += ((scales < 0) & (raised >= 1) & (count > 0)) * 128.0
        return torch.cat([count.to(torch.uint8), row_scale.view(torch.uint8)], dim=-1)  # (rows, blocks + 2)

    def decode_scales(stored: Tensor) -> Tensor:
        count = stored[..., :-2].float()
        if signed:
            count = torch.where(count >= 128, 128 - count, count)
        return count * _row_scale_from_last_bytes(stored) / steps

    def encoding_loss_bound(stored: Tensor) -> Tensor:
        row_scale = _row_scale_from_last_bytes(stored)
        # Below the next step
        within = ((stored[..., :-2] & (127 if signed else 255)) < steps) & (row_scale > 0)
        # Else below the next row scale
        return torch.where(within, row_scale / steps, _float16_spacing_bound(row_scale))

    return ScaleEncoding(
        name="double",
        dtype=torch.uint8,
        encode=encode_scales,
        decode=decode_scales,
        encoding_loss_bound=encoding_loss_bound,
        largest=torch.finfo(torch.float16).max,
        extra_per_row=2,
        signed=signed,
    )


_ENCODINGS = (
    ScaleEncoding(
        name="float32",
        dtype=torch.float32,
        encode=_zero_subnormal_scales,
        decode=lambda stored: stored,
        encoding_loss_bound=lambda stored: (stored == 0).float() * _SMALLEST_NORMAL,
        largest=torch.finfo(torch.float32).max,
    ),
    ScaleEncoding(
        name="float16",
        dtype=torch.float16,
        encode=_round_to_float16_towards_zero,
        decode=lambda stored: stored.float(),
        encoding_loss_bound=_float16_spacing_bound,
        largest=torch.finfo(torch.float16).max,
    ),
    _double_scale_encoding(255),
)

ENCODINGS = MappingProxyType({e.name: e for e in _ENCODINGS})


def _scales_without_offsets(stored: Tensor) -> Tensor:
    return stored[..., : stored.shape[-1] // 2]


def _encoding_with_offsets(encoding: ScaleEncoding) -> ScaleEncoding:
    return replace(
        encoding,
        name=f"{encoding.name}_offsets",
        decode=lambda stored: encoding.decode(_scales_without_offsets(stored)),
        encoding_loss_bound=lambda stored: encoding.encoding_loss_bound(_scales_without_offsets(stored)),
        offsets=True,
    )


OFFSETS = MappingProxyType(
    {f"{e.name}_offsets": _encoding_with_offsets(e) for e in _ENCODINGS if not e.extra_per_row}
)
"""Encodings of scales and offsets: "float32_offsets" and "float16_offsets"."""
_SIGNED_DOUBLE = _double_scale_encoding(127)


@cache
def _float16_encoding_with_divisor(name: str, divisor: float) -> ScaleEncoding:
    """Return the encoding of float16 scales that are float16 when they are divided, too."""
    encoding = ENCODINGS[name] if name in ENCODINGS else OFFSETS[name]
    return replace(
        encoding,
        encode=lambda scales: (encoding.encode(scales / divisor).float() * divisor).to(torch.float16),
        encoding_loss_bound=lambda stored: encoding.encoding_loss_bound(stored).clamp_min(divisor * 2**-24),
        divisor=divisor,
    )


def get_scale_encoding(encoding_name: str, signed: bool = False, ggml_divisor: float = 1.0) -> ScaleEncoding:
    """Return ``ENCODINGS[name]`` or ``OFFSETS[name]``, or its variant with negative scales if ``signed``; of float16
    scales the variant of a format with this divisor.

    Raises:
        ValueError: there is no such encoding; the choices are listed.
    """
    try:
        encoding = ENCODINGS[encoding_name] if encoding_name in ENCODINGS else OFFSETS[encoding_name]
    except (KeyError, TypeError):
        raise ValueError(
            f"scales={short_repr(encoding_name)} is unknown: choose from {', '.join([*ENCODINGS, *OFFSETS])}"
        ) from None
    if ggml_divisor != 1 and encoding.dtype == torch.float16:
        return _float16_encoding_with_divisor(encoding_name, ggml_divisor)
    return encoding if encoding.signed or not signed else _SIGNED_DOUBLE
