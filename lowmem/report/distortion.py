"""What 4-bit storage loses of normal weights, beside the least that theory allows.

A memoryless Gaussian source of variance 1 cannot be stored in R bits a sample with a mean squared error below

    D(R) = 2 ** (-2 R)

(Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 10.3.2). The relative root mean square error is at
least 2 ** -R then: each further bit halves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowmem.quant.formats import FORMATS
from lowmem.quant.quantize import quantize, relative_error
from lowmem.quant.scales import ENCODINGS

__all__ = ["BLOCKS", "Distortion", "distortions", "least_error"]

BLOCKS = (16, 32, 64, 128)
"""Block sizes that are compared: smaller blocks take more bits for scales and lose less."""

_SHAPE = (32, 4096)  # rows so long that the row's own scale in ``double`` takes next to nothing


@dataclass(frozen=True)
class Distortion:
    """One way to store a normal matrix: its bits a weight, and the relative root mean square error."""

    format: str
    scales: str
    block_size: int
    bits_per_weight: float
    error: float


def distortions(shape: tuple[int, int] = _SHAPE) -> list[Distortion]:
    """Quantize one matrix of normal weights in every format, with all scales and block sizes of ``BLOCKS``."""
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
    """Return ``2 ** -bits``: the least relative error of normal weights stored in so many bits each."""
    return float(2.0**-bits)
