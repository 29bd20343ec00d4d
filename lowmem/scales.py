"""How the scale of each block is stored: float32, float16, or double (8 bits a block, float16 a row).

An encoding turns the largest magnitude of each block into stored scales and back. A code is chosen
against the *stored* scale, so that what a scale loses by rounding costs accuracy once, not twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["ENCODINGS", "ScaleEncoding", "get_encoding"]


@dataclass(frozen=True)
class ScaleEncoding:
    """One way to store scales.

    Args:
        name: the key in ``ENCODINGS``.
        dtype: of the stored tensor.
        encode: float32 absmax (rows, blocks) -> stored (rows, blocks + extra).
        decode: stored -> float32 scales (rows, blocks).
        shortfall: stored -> how far a block's absmax may lie above its scale, float32 (rows, blocks).
        largest: the largest absmax that can be held.
        extra: stored elements a row beyond one a block.
    """

    name: str
    dtype: torch.dtype
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    shortfall: Callable[[Tensor], Tensor]
    largest: float
    extra: int = 0


_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _encode_float32(absmax: Tensor) -> Tensor:
    # A subnormal scale would leave its products too few bits to find the same codes again, and
    # processors that flush subnormals would disagree: such blocks become zeros.
    return absmax.masked_fill(absmax < _SMALLEST_NORMAL, 0)


def _float16_spacing(stored: Tensor) -> Tensor:
    """Return at least the distance to the next float16: exact where it matters, at subnormals."""
    return (stored.float() * 2**-10).clamp_min(2**-24)


def _encode_float16(absmax: Tensor) -> Tensor:
    # Rounded towards zero: the largest weight of a block then always takes an end level, so that
    # quantizing the dequantized block finds the same scale and the same codes, subnormals included.
    nearest = absmax.to(torch.float16)
    below = (nearest.view(torch.int16) - 1).view(torch.float16)  # the bits of a positive float count upwards
    return torch.where(nearest.float() > absmax, below, nearest)


def _encode_double(absmax: Tensor) -> Tensor:
    # A scale is steps / 255 of the row's, at least one step (a row with one large outlier keeps its small
    # blocks), else rounded down: the largest weight of a block takes an end level, as above.
    row_scale = _encode_float16(absmax.amax(-1, keepdim=True))  # (rows, 1)
    # The quotient is raised a little, lest it be rounded to just below the step that a dequantized block is on.
    steps = (absmax * (255 * (1 + 2**-20)) / row_scale.float().clamp_min(2**-24)).floor()
    steps = steps.clamp(1, 255).masked_fill((absmax == 0) | (row_scale == 0), 0)  # (rows, blocks)
    return torch.cat([steps.to(torch.uint8), row_scale.view(torch.uint8)], dim=-1)  # (rows, blocks + 2)


def _row_scale(stored: Tensor) -> Tensor:
    return stored[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()  # (rows, 1)


def _decode_double(stored: Tensor) -> Tensor:
    return stored[..., :-2].float() * _row_scale(stored) / 255


def _double_shortfall(stored: Tensor) -> Tensor:
    row_scale = _row_scale(stored)
    within = (stored[..., :-2] < 255) & (row_scale > 0)  # below the next step; else below the next row scale
    return torch.where(within, row_scale / 255, _float16_spacing(row_scale))


_ENCODINGS = (
    ScaleEncoding(
        name="float32",
        dtype=torch.float32,
        encode=_encode_float32,
        decode=lambda stored: stored,
        shortfall=lambda stored: torch.where(stored == 0, _SMALLEST_NORMAL, 0.0),
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
    ScaleEncoding(
        name="double",  # double quantization: QLoRA, arXiv 2305.14314, section 3, here kept local to the row
        dtype=torch.uint8,
        encode=_encode_double,
        decode=_decode_double,
        shortfall=_double_shortfall,
        largest=torch.finfo(torch.float16).max,
        extra=2,
    ),
)

ENCODINGS = MappingProxyType({e.name: e for e in _ENCODINGS})


def get_encoding(name: str) -> ScaleEncoding:
    """Return ``ENCODINGS[name]``.

    Raises:
        ValueError: there is no such encoding; the choices are listed.
    """
    try:
        return ENCODINGS[name]
    except (KeyError, TypeError):
        raise ValueError(f"scales={name!r} is unknown: choose from {', '.join(ENCODINGS)}") from None
