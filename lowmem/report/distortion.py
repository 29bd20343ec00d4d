"""Errors of the 4-bit formats for normal weights, and the theoretical lower bound.

A memoryless Gaussian source of variance 1 cannot be stored in R bits per sample with a mean squared error below

    D(R) = 2 ** (-2 R)

(Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 10.3.2). The relative root mean square error is
therefore at least 2 ** -R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowmem.quant.formats import FORMATS
from lowmem.quant.quantize import quantize, relative_error
from lowmem.quant.scales import ENCODINGS

__all__ = ["BLOCKS", "Distortion", "distortions", "least_error"]

BLOCKS = (16, 32, 64, 128)
"""Block sizes to compare; smaller blocks take more bits for scales and have a smaller error."""

_SHAPE = (32, 4096)  # long rows, in which the scale per row of ``double`` hardly counts


@dataclass(frozen=True)
class Distortion:
    """Bits per weight and relative root mean square error of a normal matrix in one format."""

    format: str
    scales: str
    block_size: int
    bits_per_weight: float
    error: float


def distortions(shape: tuple[int, int] = _SHAPE) -> list[Distortion]:
    """Quantize one normal matrix in every format, scale encoding and block size of ``BLOCKS``."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    points = []
    for name in FORMATS:
        for scales in ENCODINGS:
            for block_size in BLOCKS:
                stored = quantize(weight, name, block_size=block_size, scales=scales)
                points.append(
                    Distortion(name, scales, block_size, stored.bits_per_weight, relative_error(weight, stored))
                )
    return points


def least_error(bits: float) -> float:
    """Return ``2 ** -bits``, the least relative error of normal weights at this many bits per weight."""
    return float(2.0**-bits)
