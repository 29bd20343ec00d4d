"""What storing weights in few bits loses: of a model's output with each choice of bits, and of normal weights.

A memoryless Gaussian source of variance 1 cannot be stored in R bits per sample with a mean squared error below

    D(R) = 2 ** (-2 R)

(Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 10.3.2). The relative root mean square error is
therefore at least 2 ** -R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from lowmem.measure import difference
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import CHOICES, Budget, EightBit, FourBit
from lowmem.quant.formats import FORMATS
from lowmem.quant.quantize import quantize, squares_lost
from lowmem.quant.scales import ENCODINGS
from lowmem.transforms.convert import convert

SERIES = ("nf4", "bof4s", "8 bits", "a budget")
"""What a chart draws as one: ``nf4`` and ``bof4s`` by the size of their blocks."""

BLOCKS = (128, 64, 32, 16)
"""Block sizes to compare; smaller blocks take more bits for scales and have a smaller error."""

SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Budgets that are measured, as shares of the way from the fewest bits of a budget to 8."""

UNIFORM: Mapping[str, tuple[FourBit | EightBit, ...]] = MappingProxyType(
    {
        "nf4": tuple(FourBit("nf4", size, "double", embeddings="4bit") for size in BLOCKS),
        "bof4s": tuple(FourBit("bof4s", size, "double", embeddings="4bit") for size in BLOCKS),
        "8 bits": (CHOICES[-1],),
    }
)


@dataclass(frozen=True)
class Quality:
    """What a choice of bits makes of a model's output.

    Attributes:
        series: of ``SERIES``.
        name: of the choice.
        bits: of codes and scales, for each weight that is stored.
        error: ``|output - dense output| / |dense output|``.
        cosine: of both outputs, each taken as one vector.
    """

    series: str
    name: str
    bits: float
    error: float
    cosine: float


def qualities(
    make: Callable[[], nn.Module],
    run: Callable[[nn.Module], Sequence[Tensor]],
    done: Callable[[], object] = lambda: None,
) -> list[Quality]:
    """Convert a model by each choice, and compare its output with the dense model's.

    Args:
        make: returns the dense model, with the same weights at each call.
        run: returns the tensors of a model's output for one input.
        done: called after each choice.
    """
    expected = as_vector(run(make()))
    found: list[Quality] = []

    def measured(series: str, name: str, technique: FourBit | EightBit | Budget) -> None:
        model = convert(make(), technique)
        output = as_vector(run(model))
        both = float(expected.norm()) * float(output.norm())
        cosine = float(output @ expected) / both if both else math.nan
        found.append(Quality(series, name, stored_bits(model), difference(expected, output).relative, cosine))
        done()

    for series, techniques in UNIFORM.items():
        for one in techniques:
            measured(series, f"{one.format}, blocks of {one.block_size}", one)
    bits = {one.name: one.bits for one in found}
    first, last = (bits[f"{one.format}, blocks of {one.block_size}"] for one in (CHOICES[0], CHOICES[-1]))
    for share in SHARES:
        wanted = first + share * (last - first)
        measured("a budget", f"Budget({wanted:.3f})", Budget(wanted))
    return found


def stored_bits(model: nn.Module) -> float:
    """Return the bits of codes and scales for each weight that a model stores, each counted once."""
    parts, weights = dict[int, int](), dict[int, int]()
    for module in model.modules():
        for name, form in module.forms.items() if isinstance(module, StoredModule) else ():
            own = [module._parameters[f"{name}_{part}"] for part in form.parts]
            parts |= {id(one): one.nbytes for one in own if one is not None}
            weights[id(own[0])] = cast(StoredModule, module).stored_size(name)
    return 8 * sum(parts.values()) / max(1, sum(weights.values()))


def as_vector(outputs: Sequence[Tensor]) -> Tensor:
    """Return all numbers of an output as one vector, float64."""
    real = [torch.view_as_real(one) if one.is_complex() else one for one in outputs]
    return torch.cat([one.double().flatten().cpu() for one in real])


@dataclass(frozen=True)
class Distortion:
    """Bits per weight and relative root mean square error of a normal matrix in one format."""

    format: str
    scales: str
    block_size: int
    bits_per_weight: float
    error: float


def distortions(shape: tuple[int, int] = (32, 4096)) -> list[Distortion]:
    """Quantize one normal matrix in every format, scale encoding and block size of ``BLOCKS``.

    In long rows, the scale per row of ``double`` hardly counts.
    """
    weight = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    points = []
    for name in FORMATS:
        for scales in ENCODINGS:
            for block_size in reversed(BLOCKS):
                stored = quantize(weight, name, block_size=block_size, scales=scales)
                error = squares_lost(weight, stored).error
                points.append(Distortion(name, scales, block_size, stored.bits_per_weight, error))
    return points


def least_error(bits: float) -> float:
    """Return ``2 ** -bits``, the least relative error of normal weights at this many bits per weight."""
    return float(2.0**-bits)
