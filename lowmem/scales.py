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
        shortfall: float32 scales -> how far a block's absmax may lie above its stored scale.
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


def _step(positive: Tensor, by: int) -> Tensor:
    """Return the float16 that is ``by`` steps above a non-negative float16: its bits count upwards."""
    return (positive.view(torch.int16) + by).view(torch.float16)


def _encode_float16(absmax: Tensor) -> Tensor:
    # Rounded towards zero: the largest weight of a block then always takes an end level, so that
    # quantizing the dequantized block finds the same scale and the same codes, subnormals included.
    nearest = absmax.to(torch.float16)
    return torch.where(nearest.float() > absmax, _step(nearest, -1), nearest)


def _encode_double(absmax: Tensor) -> Tensor:
    # Both levels are rounded up, so that no scale falls short of its block: a row with one large
    # outlier keeps its small blocks instead of losing them to a scale of zero.
    row_absmax = absmax.amax(-1, keepdim=True)  # (rows, 1)
    row_scale = (row_absmax / 255).to(torch.float16)
    row_scale = torch.where(row_scale.float() * 255 < row_absmax, _step(row_scale, 1), row_scale)
    steps = torch.ceil(absmax / row_scale.float().clamp_min(2**-24))  # (rows, blocks), 0 to 255
    return torch.cat([steps.to(torch.uint8), row_scale.view(torch.uint8)], dim=-1)  # (rows, blocks + 2)


def _decode_double(stored: Tensor) -> Tensor:
    row_scale = stored[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.float16)  # (rows, 1)
    return stored[..., :-2].float() * row_scale.float()


_ENCODINGS = (
    ScaleEncoding(
        name="float32",
        dtype=torch.float32,
        encode=_encode_float32,
        decode=lambda stored: stored,
        shortfall=lambda scales: torch.where(scales == 0, _SMALLEST_NORMAL, 0.0),
        largest=torch.finfo(torch.float32).max,
    ),
    ScaleEncoding(
        name="float16",
        dtype=torch.float16,
        encode=_encode_float16,
        decode=lambda stored: stored.float(),
        shortfall=lambda scales: (scales * 2**-10).clamp_min(2**-24),  # the distance to the next float16
        largest=torch.finfo(torch.float16).max,
    ),
    ScaleEncoding(
        name="double",  # double quantization: QLoRA, arXiv 2305.14314, section 3, here kept local to the row
        dtype=torch.uint8,
        encode=_encode_double,
        decode=_decode_double,
        shortfall=torch.zeros_like,
        largest=255 * torch.finfo(torch.float16).max,
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
