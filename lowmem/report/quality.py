"""How far a model's output is off with each choice of bits: one for all layers, and budgets that choose for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from lowmem.nn.stored_module import StoredModule
from lowmem.nn.techniques import CHOICES, Budget, EightBit, FourBit
from lowmem.transforms.convert import convert

__all__ = ["SERIES", "Quality", "qualities", "stored_bits"]

SERIES = ("nf4", "bof4s", "8 bits", "a budget")
"""What a chart draws as one: ``nf4`` and ``bof4s`` by the size of their blocks."""

BLOCKS = (128, 64, 32, 16)
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
    expected = _vector(run(make()))
    found: list[Quality] = []

    def measured(series: str, name: str, technique: FourBit | EightBit | Budget) -> None:
        model = convert(make(), technique)
        output = _vector(run(model))
        lost, size = float((output - expected).norm()), float(expected.norm())
        both = size * float(output.norm())
        cosine = float(output @ expected) / both if both else math.nan
        found.append(Quality(series, name, stored_bits(model), lost / size if size else lost, cosine))
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


def _vector(outputs: Sequence[Tensor]) -> Tensor:
    """Return all numbers of an output as one vector, float64."""
    real = [torch.view_as_real(one) if one.is_complex() else one for one in outputs]
    return torch.cat([one.double().flatten().cpu() for one in real])
