"""The technique that chooses the number of bits of each weight."""

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
"""The techniques that ``Budget`` chooses from, in order of increasing bytes and decreasing error."""

NORMAL_ERRORS = (0.0815, 0.0745, 0.0658, 0.00602)
"""The relative root mean square error of each of ``CHOICES`` for normal weights in long rows."""


@dataclass(frozen=True)
class Budget:
    """A budget of bits per weight: each layer gets 4 bits in blocks of 64, 32 or 16, or 8 bits in blocks of 64.

    The loss of the model is modelled as the sum of the losses from storing each weight alone. Bits are given, step by
    step, to the layer where they lower this sum most per byte, until no further step fits the budget: a greedy choice
    on the convex hull of each layer's choices (Shoham and Gersho, Efficient bit allocation for an arbitrary set of
    quantizers, 1988).

    With ``inputs``, the loss of a weight is the expected squared change of the model's output, relative to the
    output: ``sum of g^2 (w - stored)^2``, where g is the gradient of a random projection of the output (Hutchinson's
    estimator). The squares of g are kept in factored form, as their sums over rows and over columns, and the errors
    of weights are assumed to be independent. Without ``inputs``, the loss is the squared relative error
    ``|W - stored|^2 / |W|^2`` times the number of elements of W. That is the relative error of the layer's output if
    the columns of its input are independent and equally large, and if a layer's influence is its number of elements.

    Args:
        bits: of codes and scales per weight, on average over all stored weights, each of which counts once;
            ``convert(at_most=)`` limits bytes in the same way, including those of dense parameters. The choice never
            exceeds the budget.
        inputs: typical batches, as for ``calibrate``: each a Tensor, a tuple or list of positional arguments, or a
            mapping of keyword arguments. The model runs forward and backward once on each.
        compute_dtype: as in ``FourBit``.

    Raises:
        TypeError: inputs of another type.
        ValueError: bits that are not a finite number above 0, or a ``compute_dtype`` that ``FourBit`` rejects.
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
        """``CHOICES``, with products in ``compute_dtype``."""
        return tuple(replace(one, compute_dtype=self.compute_dtype) for one in CHOICES)
