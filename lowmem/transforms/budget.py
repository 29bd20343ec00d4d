"""Divides a budget of bits among the weights of a model: what each would lose with each choice, and which it gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lowmem.nn.techniques import CHOICES, NORMAL_ERRORS, Budget, EightBit, FourBit
from lowmem.quant.backend import backend_of
from lowmem.quant.quantize import squares_lost
from lowmem.quant.tensor import QuantizedTensor, row_chunks


@dataclass(frozen=True)
class Importance:
    """How much squared errors of a weight's values change the output: the product of a factor a row and one a column.

    Attributes:
        rows: float64 (rows,).
        columns: float64 (columns,).
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Unit:
    """Weights that get the same choice: those of one module, and of all modules that share one of them.

    Attributes:
        name: of the first weight; it decides between units that gain the same.
        weights: how many there are.
        bytes: that each of ``CHOICES`` takes.
        losses: what it adds to the loss of the model.
        dense: the bytes before.
    """

    name: str
    weights: int
    bytes: tuple[int, ...]
    losses: tuple[float, ...]
    dense: int


@dataclass(frozen=True)
class Chosen:
    """What a unit got, and why."""

    technique: FourBit | EightBit
    why: str


def losses_of(weight: Tensor, importance: Importance | None = None) -> tuple[float, ...]:
    """Return what each of ``CHOICES`` loses of a weight (..., columns); without values, of normal weights.

    Without the ``importance`` of squared errors, it is 1 over the mean of the squared weights.
    """
    if weight.is_meta:
        return tuple(weight.numel() * error**2 for error in NORMAL_ERRORS)
    if importance is None:
        found = [squares_lost(weight, one.store(weight)) for one in CHOICES]
        scale = weight.numel() / found[0].size if found[0].size else 0.0
        return tuple(one.lost * scale for one in found)
    rows = weight.detach().reshape(-1, weight.shape[-1])
    return tuple(_squared_error(rows, one.store(weight), importance) for one in CHOICES)


def _squared_error(rows: Tensor, stored: QuantizedTensor, importance: Importance) -> float:
    matrix, total = stored.as_matrix(), 0.0
    for chunk in row_chunks(*rows.shape):
        error = backend_of(matrix.packed).dequantize(matrix, chunk, torch.float32).double()  # (chunk, columns)
        error.sub_(rows[chunk]).square_()
        total += float(importance.rows[chunk] @ (error @ importance.columns))
    return total


def size_of(weight: Tensor) -> tuple[int, ...]:
    """Return the bytes that each of ``CHOICES`` takes for a weight."""
    return tuple(one.skeleton(weight).nbytes for one in CHOICES)


def unit_of(weights: Mapping[str, Tensor], losses: Callable[[str, Tensor], Sequence[float] | None]) -> Unit | None:
    """Return the unit of weights, as they are stored, by their names; None if the losses of none are known."""
    sizes = [size_of(weight) for weight in weights.values()]
    lost = [one for name, weight in weights.items() if (one := losses(name, weight)) is not None]
    if not lost:
        return None
    return Unit(
        name=next(iter(weights)),
        weights=sum(weight.numel() for weight in weights.values()),
        bytes=tuple(map(sum, zip(*sizes, strict=True))),
        losses=tuple(map(sum, zip(*lost, strict=True))),
        dense=sum(weight.numel() * weight.element_size() for weight in weights.values()),
    )


@dataclass(frozen=True)
class _Step:
    """A step of a unit on the hull of its choices: from one choice to a later one."""

    unit: int
    choice: int
    bytes: int
    gain: float


def allocate(units: Sequence[Unit], bits: float) -> list[int]:
    """Return for each unit the index of its choice, such that all take at most ``bits`` a weight.

    Steps are taken by what they gain for each byte; one that does not fit ends those of its unit. More bits never
    give a larger sum of losses. Bits that are out of reach are a ValueError, which names what is possible.
    """
    weights = max(1, sum(unit.weights for unit in units))
    least, dense = sum(min(unit.bytes) for unit in units), sum(unit.dense for unit in units)
    if units and not least <= bits * weights / 8 <= dense:
        most = sum(max(unit.bytes) for unit in units)
        lowest = math.ceil(8e3 * least / weights) / 1e3  # so that what is named is possible
        raise ValueError(
            f"Budget(bits={bits:g}) is out of reach: these weights take {lowest:.3f} bits at least, in "
            f"blocks of {CHOICES[0].block_size}, {8 * most / weights:.3f} in 8 bits, and {8 * dense / weights:g} "
            "dense. Name a number between the first and the last"
        )
    chosen, steps = list[int](), list[_Step]()
    for number, unit in enumerate(units):
        hull = _hull(unit)
        chosen.append(hull[0])
        steps += [
            _Step(number, after, unit.bytes[after] - unit.bytes[before], unit.losses[before] - unit.losses[after])
            for before, after in pairwise(hull)
        ]
    steps.sort(key=lambda one: (-one.gain / one.bytes, units[one.unit].name))  # of a unit they stay in their order
    left = bits * weights / 8 - sum(unit.bytes[choice] for unit, choice in zip(units, chosen, strict=True))
    ended: set[int] = set()
    for step in steps:
        if step.unit in ended:
            continue
        if step.bytes > left:
            ended.add(step.unit)
            continue
        left -= step.bytes
        chosen[step.unit] = step.choice
    return chosen


def _hull(unit: Unit) -> list[int]:
    """Return the choices on the lower convex hull of losses over bytes, by bytes; each loses less than the last."""
    order = sorted(range(len(unit.bytes)), key=lambda one: (unit.bytes[one], unit.losses[one]))
    hull: list[int] = []
    for one in order:
        if hull and unit.losses[one] >= unit.losses[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(unit, hull[-1], one) >= _gain(unit, hull[-2], hull[-1]):
            hull.pop()
        hull.append(one)
    return hull


def _gain(unit: Unit, before: int, after: int) -> float:
    """Return what is gained for each byte."""
    return (unit.losses[before] - unit.losses[after]) / (unit.bytes[after] - unit.bytes[before])


def choose(units: Sequence[Unit], budget: Budget) -> list[Chosen]:
    """Return what each unit gets of a budget; raises as ``allocate``."""
    chosen = allocate(units, budget.bits)
    total = sum(unit.losses[_hull(unit)[0]] for unit in units)
    return [
        Chosen(budget.choices[choice], _why(unit, choice, total)) for unit, choice in zip(units, chosen, strict=True)
    ]


def _why(unit: Unit, choice: int, total: float) -> str:
    """Return why a unit has a choice: what it saves of the loss of all in their smallest choice, and for how much."""
    hull = _hull(unit)
    at = hull.index(choice)

    def step(before: int, after: int) -> str:
        share = (unit.losses[before] - unit.losses[after]) / total if total else 0.0
        return f"{share:.2%} of the loss for {(unit.bytes[after] - unit.bytes[before]) / 2**10:.1f} KiB"

    found = [f"saves {step(hull[0], choice)}"] if at else []
    found += [f"{_text(hull[at + 1])} would save {step(choice, hull[at + 1])}"] if at + 1 < len(hull) else []
    return "; ".join(found) or "nothing to gain"


def _text(choice: int) -> str:
    one = CHOICES[choice]
    return "8 bits" if isinstance(one, EightBit) else f"blocks of {one.block_size}"


def together(stored: Mapping[nn.Module, Iterable[Hashable]]) -> list[list[nn.Module]]:
    """Return groups of modules that share a weight, directly or through others; weights are given by keys."""
    groups: dict[Hashable, list[nn.Module]] = {}
    for module, keys in stored.items():
        merged = [module]
        for key in keys:
            other = groups.get(key, merged)
            if other is not merged:
                other += merged
                for known, group in groups.items():
                    if group is merged:
                        groups[known] = other
                merged = other
            groups[key] = merged
    return list({id(group): group for group in groups.values()}.values())
