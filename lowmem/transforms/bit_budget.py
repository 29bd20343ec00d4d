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
from lowmem.quant.quantize_tensor import recorded_or_measured_squares
from lowmem.quant.tensor import QuantizedTensor, row_slices_within_scratch


@dataclass(frozen=True)
class RowAndColumnImportance:
    """How much squared errors of a weight's values change the output: the product of a factor a row and one a column.

    Attributes:
        rows: float64 (rows,).
        columns: float64 (columns,).
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class BudgetUnit:
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
class BudgetChoice:
    """What a unit got, and why."""

    technique: FourBit | EightBit
    why: str


def loss_per_choice(weight: Tensor, importance: RowAndColumnImportance | None = None) -> tuple[float, ...]:
    """Return what each of ``CHOICES`` loses of a weight (..., columns); without values, of normal weights.

    Without the ``importance`` of squared errors, it is 1 over the mean of the squared weights.
    """
    if weight.is_meta:
        return tuple(weight.numel() * error**2 for error in NORMAL_ERRORS)
    if importance is None:
        squares = [recorded_or_measured_squares(weight, choice.store(weight)) for choice in CHOICES]
        scale = weight.numel() / squares[0].weight_squares if squares[0].weight_squares else 0.0
        return tuple(choice.error_squares * scale for choice in squares)
    rows = weight.detach().reshape(-1, weight.shape[-1])
    return tuple(_weighted_squared_error(rows, choice.store(weight), importance) for choice in CHOICES)


def _weighted_squared_error(rows: Tensor, stored: QuantizedTensor, importance: RowAndColumnImportance) -> float:
    matrix, total = stored.as_matrix(), 0.0
    for chunk in row_slices_within_scratch(*rows.shape):
        error = backend_of(matrix.packed).dequantize(matrix, chunk, torch.float32).double()  # (chunk, columns)
        error.sub_(rows[chunk]).square_()
        total += float(importance.rows[chunk] @ (error @ importance.columns))
    return total


def bytes_per_choice(weight: Tensor) -> tuple[int, ...]:
    """Return the bytes that each of ``CHOICES`` takes for a weight."""
    return tuple(choice.skeleton(weight).nbytes for choice in CHOICES)


def budget_unit_or_none(
    weights: Mapping[str, Tensor], choice_losses: Callable[[str, Tensor], Sequence[float] | None]
) -> BudgetUnit | None:
    """Return the unit of weights, as they are stored, by their names; None if the losses of none are known."""
    sizes = [bytes_per_choice(weight) for weight in weights.values()]
    lost = [
        weight_losses
        for name, weight in weights.items()
        if (weight_losses := choice_losses(name, weight)) is not None
    ]
    if not lost:
        return None
    return BudgetUnit(
        name=next(iter(weights)),
        weights=sum(weight.numel() for weight in weights.values()),
        bytes=tuple(map(sum, zip(*sizes, strict=True))),
        losses=tuple(map(sum, zip(*lost, strict=True))),
        dense=sum(weight.numel() * weight.element_size() for weight in weights.values()),
    )


@dataclass(frozen=True)
class _ChoiceUpgrade:
    """A step of a unit on the hull of its choices: from one choice to a later one."""

    unit: int
    choice: int
    bytes: int
    gain: float


def greedy_choice_index_per_unit(units: Sequence[BudgetUnit], bits_per_weight: float) -> list[int]:
    """Return for each unit the index of its choice, such that all take at most ``bits_per_weight`` a weight.

    Steps are taken by what they gain for each byte; one that does not fit ends those of its unit. More bits never
    give a larger sum of losses. Bits that are out of reach are a ValueError, which names what is possible.
    """
    weights = max(1, sum(unit.weights for unit in units))
    least, dense = sum(min(unit.bytes) for unit in units), sum(unit.dense for unit in units)
    if units and not least <= bits_per_weight * weights / 8 <= dense:
        most = sum(max(unit.bytes) for unit in units)
        # So that what is named is possible
        lowest = math.ceil(8e3 * least / weights) / 1e3
        raise ValueError(
            f"Budget(bits={bits_per_weight:g}) is out of reach: these weights take {lowest:.3f} bits at least, in "
            f"blocks of {CHOICES[0].block_size}, {8 * most / weights:.3f} in 8 bits, and {8 * dense / weights:g} "
            "dense. Name a number between the first and the last"
        )
    chosen, steps = list[int](), list[_ChoiceUpgrade]()
    for number, unit in enumerate(units):
        hull = _convex_hull_choice_indices(unit)
        chosen.append(hull[0])
        steps += [
            _ChoiceUpgrade(
                number, after, unit.bytes[after] - unit.bytes[before], unit.losses[before] - unit.losses[after]
            )
            for before, after in pairwise(hull)
        ]
    steps.sort(
        key=lambda upgrade: (-upgrade.gain / upgrade.bytes, units[upgrade.unit].name)
    )  # of a unit they stay in their order
    left = bits_per_weight * weights / 8 - sum(unit.bytes[choice] for unit, choice in zip(units, chosen, strict=True))
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


def _convex_hull_choice_indices(unit: BudgetUnit) -> list[int]:
    """Return the choices on the lower convex hull of losses over bytes, by bytes; each loses less than the last."""
    order = sorted(range(len(unit.bytes)), key=lambda choice: (unit.bytes[choice], unit.losses[choice]))
    hull: list[int] = []
    for choice in order:
        if hull and unit.losses[choice] >= unit.losses[hull[-1]]:
            continue
        while len(hull) > 1 and _loss_decrease_per_byte(unit, hull[-1], choice) >= _loss_decrease_per_byte(
            unit, hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(choice)
    return hull


def _loss_decrease_per_byte(unit: BudgetUnit, old_choice: int, new_choice: int) -> float:
    """Return what is gained for each byte."""
    return (unit.losses[old_choice] - unit.losses[new_choice]) / (unit.bytes[new_choice] - unit.bytes[old_choice])


def budget_choices_with_reasons(units: Sequence[BudgetUnit], budget: Budget) -> list[BudgetChoice]:
    """Return what each unit gets of a budget; raises as ``greedy_choice_index_per_unit``."""
    chosen = greedy_choice_index_per_unit(units, budget.bits)
    total = sum(unit.losses[_convex_hull_choice_indices(unit)[0]] for unit in units)
    return [
        BudgetChoice(budget.choices[choice], _choice_reason(unit, choice, total))
        for unit, choice in zip(units, chosen, strict=True)
    ]


def _choice_reason(unit: BudgetUnit, choice: int, total_loss: float) -> str:
    """Return why a unit has a choice: what it saves of the loss of all in their smallest choice, and for how much."""
    hull = _convex_hull_choice_indices(unit)
    at = hull.index(choice)

    def upgrade_text(old_choice: int, new_choice: int) -> str:
        share = (unit.losses[old_choice] - unit.losses[new_choice]) / total_loss if total_loss else 0.0
        return f"{share:.2%} of the loss for {(unit.bytes[new_choice] - unit.bytes[old_choice]) / 2**10:.1f} KiB"

    reasons = [f"saves {upgrade_text(hull[0], choice)}"] if at else []
    reasons += (
        [f"{_choice_text(hull[at + 1])} would save {upgrade_text(choice, hull[at + 1])}"]
        if at + 1 < len(hull)
        else []
    )
    return "; ".join(reasons) or "nothing to gain"


def _choice_text(choice: int) -> str:
    technique = CHOICES[choice]
    return "8 bits" if isinstance(technique, EightBit) else f"blocks of {technique.block_size}"


def module_groups_sharing_weights(weight_keys: Mapping[nn.Module, Iterable[Hashable]]) -> list[list[nn.Module]]:
    """Return groups of modules that share a weight, directly or through others; weights are given by keys."""
    groups: dict[Hashable, list[nn.Module]] = {}
    for module, keys in weight_keys.items():
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
