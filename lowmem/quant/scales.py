"""How the scale of each block is stored: float32, float16, or double (8 bits per block and a float16 per row).

With offsets (``OFFSETS``), a weight is ``levels[code] * scale + offset``: a row's offsets, one for each block, lie
behind its scales, in the same dtype. One tensor holds both, so that whatever shards, gathers, saves or records scales
does so with offsets.

Codes are chosen against the *stored* scale, so the codes already account for the rounding of the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lowmem.errors import show


@dataclass(frozen=True)
class ScaleEncoding:
    """One way to store scales.

    Args:
        name: the key in ``ENCODINGS`` or ``OFFSETS``.
        dtype: of the stored tensor.
        encode: float32 scales (rows, blocks) -> stored (rows, blocks + extra), rounded towards zero; ``double``
            raises those below its first step.
        decode: stored -> float32 scales (rows, blocks).
        shortfall: stored -> an upper bound on the magnitude that encoding took from each scale, float32
            (rows, blocks).
        largest: the largest magnitude that can be stored.
        extra: stored elements per row beyond one per block.
        signed: whether a scale can be negative.
        offsets: whether offsets lie behind the scales. ``encode`` then takes and returns scales alone.
    """

    name: str
    dtype: torch.dtype
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    shortfall: Callable[[Tensor], Tensor]
    largest: float
    extra: int = 0
    signed: bool = True
    offsets: bool = False

    def width(self, blocks: int) -> int:
        """Return the stored elements of a row of ``blocks`` blocks."""
        return (2 * blocks if self.offsets else blocks) + self.extra

    def decode_offsets(self, stored: Tensor) -> Tensor:
        """Return float32 offsets (rows, blocks), of an encoding that has them."""
        return stored[..., stored.shape[-1] // 2 :].float()

    def round_offsets(self, offsets: Tensor) -> Tensor:
        """Round float32 offsets down to what can be stored, so that no weight is below its block's offset."""
        return offsets if self.dtype == torch.float32 else _float16_below(offsets).float()

    def with_offsets(self, scales: Tensor, offsets: Tensor) -> Tensor:
        """Return encoded scales and float32 offsets (rows, blocks) as they are stored: (rows, 2 * blocks)."""
        return torch.cat([scales, offsets.to(self.dtype)], dim=-1)


_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _encode_float32(scales: Tensor) -> Tensor:
    # Products with a subnormal scale have too few bits for requantizing to find the same codes, and processors that
    # flush subnormals would give other bytes: such blocks become zeros.
    return scales.masked_fill(scales.abs() < _SMALLEST_NORMAL, 0)


def _float16_spacing(stored: Tensor) -> Tensor:
    """Return an upper bound on the distance to the next float16, exact for subnormals."""
    return (stored.float().abs() * 2**-10).clamp_min(2**-24)


def _float16_below(values: Tensor) -> Tensor:
    """Return the largest float16 that is not above each value."""
    nearest = values.to(torch.float16)
    bits = nearest.view(torch.int16)
    step = torch.where(nearest > 0, bits - 1, bits + 1)  # one bit pattern less, or more: the next below
    lower = torch.where(nearest == 0, torch.full_like(bits, -(2**15) + 1), step).view(torch.float16)
    return torch.where(nearest.float() > values, lower, nearest)


def _encode_float16(scales: Tensor) -> Tensor:
    # Rounded towards zero: the largest weight of a block then always takes an end level, so that quantizing the
    # dequantized block again finds the same scale and codes, subnormals included.
    nearest = scales.to(torch.float16)
    below = (nearest.view(torch.int16) - 1).view(torch.float16)  # one bit pattern less: the next smaller magnitude
    return torch.where(nearest.float().abs() > scales.abs(), below, nearest) + 0.0  # -0 becomes +0


def _row_scale(stored: Tensor) -> Tensor:
    return stored[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()  # (rows, 1)


def _double(steps: int) -> ScaleEncoding:
    """Double quantization: QLoRA, arXiv 2305.14314, section 3, with a second scale per row.

    A block's scale is ``row_scale * n / steps``, where n is a byte: 8 bits, or a sign and 7 bits if signed. n is
    rounded down, so that the largest weight of a block takes an end level, as in float16. But n is at least 1, so
    that blocks of small weights survive an outlier elsewhere in the row. A scale that was raised to one step is
    stored positive: no weight of its block reaches an end level, so the sign of the largest weight could change
    when the block is quantized again.
    """
    signed = steps < 255

    def encode(scales: Tensor) -> Tensor:
        magnitude = scales.abs()
        row_scale = _encode_float16(magnitude.amax(-1, keepdim=True))  # (rows, 1)
        # Scaled up slightly, since rounding may leave the scale of a dequantized block just below its own step.
        raised = (magnitude * (steps * (1 + 2**-20)) / row_scale.float().clamp_min(2**-24)).floor()
        count = raised.clamp(1, steps).masked_fill((magnitude == 0) | (row_scale == 0), 0)  # (rows, blocks)
        if signed:
            count += ((scales < 0) & (raised >= 1) & (count > 0)) * 128.0
        return torch.cat([count.to(torch.uint8), row_scale.view(torch.uint8)], dim=-1)  # (rows, blocks + 2)

    def decode(stored: Tensor) -> Tensor:
        count = stored[..., :-2].float()
        if signed:
            count = torch.where(count >= 128, 128 - count, count)
        return count * _row_scale(stored) / steps

    def shortfall(stored: Tensor) -> Tensor:
        row_scale = _row_scale(stored)
        within = ((stored[..., :-2] & (127 if signed else 255)) < steps) & (row_scale > 0)  # below the next step
        return torch.where(within, row_scale / steps, _float16_spacing(row_scale))  # else below the next row scale

    return ScaleEncoding(
        name="double",
        dtype=torch.uint8,
        encode=encode,
        decode=decode,
        shortfall=shortfall,
        largest=torch.finfo(torch.float16).max,
        extra=2,
        signed=signed,
    )


_ENCODINGS = (
    ScaleEncoding(
        name="float32",
        dtype=torch.float32,
        encode=_encode_float32,
        decode=lambda stored: stored,
        shortfall=lambda stored: (stored == 0).float() * _SMALLEST_NORMAL,
        largest=torch.finfo(torch.float32).max,
    ),
    ScaleEncoding(
        name="float16",
        dtype=torch.float16,
        encode=_encode_float16,
        decode=lambda stored: stored.float(),
        shortfall=_float16_spacing,
        largest=torch.finfo(torch.float16).max,
    ),
    _double(255),
)

ENCODINGS = MappingProxyType({e.name: e for e in _ENCODINGS})


def _scales_of(stored: Tensor) -> Tensor:
    return stored[..., : stored.shape[-1] // 2]


def _offset(encoding: ScaleEncoding) -> ScaleEncoding:
    return replace(
        encoding,
        name=f"{encoding.name}_offsets",
        decode=lambda stored: encoding.decode(_scales_of(stored)),
        shortfall=lambda stored: encoding.shortfall(_scales_of(stored)),
        offsets=True,
    )


OFFSETS = MappingProxyType({f"{e.name}_offsets": _offset(e) for e in _ENCODINGS if not e.extra})
"""Encodings of scales and offsets: "float32_offsets" and "float16_offsets"."""
_SIGNED_DOUBLE = _double(127)


def get_encoding(name: str, signed: bool = False) -> ScaleEncoding:
    """Return ``ENCODINGS[name]`` or ``OFFSETS[name]``, or its variant with negative scales if ``signed``.

    Raises:
        ValueError: there is no such encoding; the choices are listed.
    """
    try:
        found = ENCODINGS[name] if name in ENCODINGS else OFFSETS[name]
    except (KeyError, TypeError):
        raise ValueError(f"scales={show(name)} is unknown: choose from {', '.join([*ENCODINGS, *OFFSETS])}") from None
    return found if found.signed or not signed else _SIGNED_DOUBLE
