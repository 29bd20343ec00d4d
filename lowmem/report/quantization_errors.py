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
from lowmem.quant.quantize_tensor import quantize, recorded_or_measured_squares
from lowmem.quant.scale_encodings import ENCODINGS
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
class BitsAndOutputError:
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


def measure_bits_and_output_errors(
    make_model: Callable[[], nn.Module],
    run_model: Callable[[nn.Module], Sequence[Tensor]],
    on_choice_done: Callable[[], object] = lambda: None,
) -> list[BitsAndOutputError]:
    """Convert a model by each choice, and compare its output with the dense model's.

    Args:
        make_model: returns the dense model, with the same weights at each call.
        run_model: returns the tensors of a model's output for one input.
        on_choice_done: called after each choice.
    """
    expected = flat_float64_vector(run_model(make_model()))
    qualities: list[BitsAndOutputError] = []

    def append_measured_quality(series: str, name: str, technique: FourBit | EightBit | Budget) -> None:
        model = convert(make_model(), technique)
        output = flat_float64_vector(run_model(model))
        both = float(expected.norm()) * float(output.norm())
        cosine = float(output @ expected) / both if both else math.nan
        qualities.append(
            BitsAndOutputError(
                series, name, stored_bits_per_weight(model), difference(expected, output).relative, cosine
            )
        )
        on_choice_done()

    for series, techniques in UNIFORM.items():
        for choice in techniques:
            append_measured_quality(series, f"{choice.format}, blocks of {choice.block_size}", choice)
    bits = {choice.name: choice.bits for choice in qualities}
    first, last = (bits[f"{choice.format}, blocks of {choice.block_size}"] for choice in (CHOICES[0], CHOICES[-1]))
    for share in SHARES:
        wanted = first + share * (last - first)
        append_measured_quality("a budget", f"Budget({wanted:.3f})", Budget(wanted))
    return qualities


def stored_bits_per_weight(model: nn.Module) -> float:
    """Return the bits of codes and scales for each weight that a model stores, each counted once."""
    parts, weights = dict[int, int](), dict[int, int]()
    for module in model.modules():
        for name, form in module.forms.items() if isinstance(module, StoredModule) else ():
            tensors = [module._parameters[f"{name}_{part}"] for part in form.parts]
            parts |= {id(tensor): tensor.nbytes for tensor in tensors if tensor is not None}
            weights[id(tensors[0])] = cast(StoredModule, module).stored_numel(name)
    return 8 * sum(parts.values()) / max(1, sum(weights.values()))


def flat_float64_vector(outputs: Sequence[Tensor]) -> Tensor:
    """Return all numbers of an output as one vector, float64."""
    real = [torch.view_as_real(output) if output.is_complex() else output for output in outputs]
    return torch.cat([output.double().flatten().cpu() for output in real])


@dataclass(frozen=True)
class FormatGaussianError:
    """Bits per weight and relative root mean square error of a normal matrix in one format."""

    format: str
    scales: str
    block_size: int
    bits_per_weight: float
    error: float


def measure_format_gaussian_errors(shape: tuple[int, int] = (32, 4096)) -> list[FormatGaussianError]:
    """Quantize one normal matrix in every format, scale encoding and block size of ``BLOCKS``.

    In long rows, the scale per row of ``double`` hardly counts.
    """
    weight = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    points = []
    for name in FORMATS:
        for scales in ENCODINGS:
            for block_size in reversed(BLOCKS):
                stored = quantize(weight, name, block_size=block_size, scales=scales)
                error = recorded_or_measured_squares(weight, stored).relative_error
                points.append(FormatGaussianError(name, scales, block_size, stored.bits_per_weight, error))
    return points


def gaussian_error_lower_bound(bits_per_weight: float) -> float:
    """Return ``2 ** -bits``, the least relative error of normal weights at this many bits per weight."""
    return float(2.0**-bits_per_weight)
