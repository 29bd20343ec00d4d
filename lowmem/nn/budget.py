"""The technique that chooses for each weight how many bits it gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.nn.blockwise import check_compute_dtype
from lowmem.nn.eightbit import EightBit
from lowmem.nn.fourbit import FourBit

__all__ = ["CHOICES", "NORMAL_ERRORS", "Budget"]

CHOICES: tuple[FourBit | EightBit, ...] = (
    FourBit("bof4s", 64, "double", embeddings="4bit"),
    FourBit("bof4s", 32, "double", embeddings="4bit"),
    FourBit("bof4s", 16, "double", embeddings="4bit"),
    EightBit(64, "double"),
)
"""What ``Budget`` chooses among, from what takes least to what loses least."""

NORMAL_ERRORS = (0.0815, 0.0745, 0.0658, 0.00602)
"""The relative root mean square error of each of ``CHOICES`` for normal weights in long rows."""


@dataclass(frozen=True)
class Budget:
    """So many bits a weight in all: each layer gets 4 bits in blocks of 64, 32 or 16, or 8 bits.

    The loss of a model is taken to be the sum of what each weight adds when it alone is stored. The layers get bits
    where these lower the sum most for each byte, until no further step fits: a greedy choice on the convex hull of
    each layer's choices (Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988).

    With ``inputs`` the loss of a weight is the expected squared change of the model's output, relative to the output:
    ``sum of g^2 (w - stored)^2``, where g is the gradient of a random projection of the output (Hutchinson), whose
    squares are kept as a product of their sums over rows and over columns; errors of weights are taken to be
    independent. Without, it is the squared relative error ``|W - stored|^2 / |W|^2`` times the numbers of W: the
    relative error of the layer's output, for inputs whose columns are alike and independent, where a layer has as
    much influence as it has numbers. Then layers of bits alike differ by how far their weights are from normal ones.

    Args:
        bits: of codes and scales, over all weights that are stored, each counted once; ``convert(at_most=)`` counts
            bytes alike, and what stays dense as well. What is chosen is never above it.
        inputs: typical batches, as ``calibrate`` takes them: each a Tensor, a tuple or list of positional arguments,
            or a mapping of keyword arguments. The model runs forward and backward on each, once.
        compute_dtype: as in ``FourBit``.

    Raises:
        TypeError: inputs of another type.
        ValueError: bits that are no number above 0, or a dtype that is not floating point.
    """

    bits: float
    inputs: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        bits = self.bits
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < math.inf:
            raise ValueError(f"bits={show(bits)} must be a number of bits a weight, as 4.4")
        if isinstance(self.inputs, Tensor | Mapping | str) or not isinstance(self.inputs, Iterable | None):
            raise TypeError(
                f"inputs is a {type(self.inputs).__name__}; pass a list of batches, if only of one: [batch]"
            )
        check_compute_dtype(self.compute_dtype)

    @property
    def choices(self) -> tuple[FourBit | EightBit, ...]:
        """Return ``CHOICES``, with products in ``compute_dtype``."""
        return tuple(replace(one, compute_dtype=self.compute_dtype) for one in CHOICES)
