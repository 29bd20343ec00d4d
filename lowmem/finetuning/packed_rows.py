"""Rows of tokens, and which of them a step trains on."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import short_repr
from lowmem.finetuning.calling_convention import CallingConvention, detect_calling_convention
from lowmem.finetuning.text_examples import IGNORED, Example

# Odd, so that the epochs of one seed have different seeds
_MIX = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class RowBatch:
    """The model's input for some rows.

    Args:
        inputs: keyword arguments of the model.
        targets: int64 (rows, tokens): for each token the next one, or ``IGNORED``.
        tokens: number of tokens, without padding.
    """

    inputs: dict[str, Any]
    targets: Tensor
    tokens: int


class Rows:
    """Examples in rows of at most ``length`` tokens.

    If the model isolates them (``CallingConvention.isolates_texts``), several examples are packed into one row, each
    with positions from 0. Otherwise each example has its own row, padded at the end: a causal model does not see it.

    Args:
        examples: of at most ``length`` tokens each.
        length: the most tokens of a row.
        calling: how the model is called.

    Attributes:
        counted: int64 (rows,): number of tokens to be predicted in each row.

    Raises:
        ValueError: there are no examples, or one is longer than ``length``.
    """

    def __init__(self, examples: Sequence[Example], length: int, calling: CallingConvention) -> None:
        if not examples:
            raise ValueError("examples=[] must hold at least one")
        lengths = [len(example.ids) for example in examples]
        if max(lengths) > length:
            raise ValueError(f"length={length} must be at least that of the longest example, {max(lengths)} tokens")
        self.calling = calling
        self._examples = examples
        self._rows = (
            pack_into_rows(lengths, length)
            if calling.isolates_texts
            else [[number] for number in range(len(examples))]
        )
        example_counts = [example.counted for example in examples]
        counted = [sum(example_counts[number] for number in row) for row in self._rows]
        self.counted = torch.tensor(counted, dtype=torch.int64, device="cpu")

    @classmethod
    def of(cls, model: nn.Module, examples: Sequence[Example], length: int, vocabulary: int) -> Rows:
        """Make rows for a model with a vocabulary of that size.

        Raises:
            ValueError: as ``detect_calling_convention``, or as for the class.
        """
        return cls(examples, length, detect_calling_convention(model, vocabulary))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> RowBatch:
        """Return some rows, padded to the longest of them.

        Without indices, return a row of one token without a target: a process whose part of a step is empty must
        still take part in forward and backward, with gradients of zero.
        """
        rows = [self._rows[index] for index in indices]
        width = max([1, *(sum(len(self._examples[number].ids) for number in row) for row in rows)])
        shape = (max(1, len(rows)), width)
        ids, positions, mask = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(3))
        targets = torch.full(shape, IGNORED, dtype=torch.int64, device="cpu")
        for row, parts in enumerate(rows):
            start = 0
            for example in (self._examples[number] for number in parts):
                stop = start + len(example.ids)
                ids[row, start:stop], targets[row, start:stop] = example.ids, example.targets
                positions[row, start:stop] = torch.arange(stop - start, dtype=torch.int64, device="cpu")
                start = stop
            mask[row, :start] = 1
            # The padding is a separate text.
            positions[row, start:] = torch.arange(width - start, dtype=torch.int64, device="cpu")
        several = any(len(parts) > 1 for parts in rows)
        padded = not several and not bool(mask.all())
        inputs = self.calling.forward_kwargs(
            ids.to(device), positions.to(device) if several else None, mask.to(device) if padded and rows else None
        )
        return RowBatch(inputs, targets.to(device), int(mask.sum()))


def check_rows_type(argument: str, value: object) -> None:
    """Raise a TypeError for an argument that is no ``Rows``."""
    if not isinstance(value, Rows):
        raise TypeError(
            f"{argument}={short_repr(value)} must be lowmem.Rows, as Rows.of(model, examples, length, vocabulary) is"
        )


def pack_into_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Return for each row the indices of its examples: best-fit decreasing.

    The number of rows is at most 11/9 of the optimum plus a small constant (Johnson, Near-optimal bin packing
    algorithms, 1973).
    """
    rows: list[list[int]] = []
    # Rows by their free tokens
    left: dict[int, list[list[int]]] = {}
    # The keys, sorted
    sizes: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        size = lengths[number]
        place = bisect_left(sizes, size)
        if place == len(sizes):
            row: list[int] = []
            free_tokens = row_length
            rows.append(row)
        else:
            free_tokens = sizes[place]
            row = left[free_tokens].pop()
            if not left[free_tokens]:
                del left[free_tokens], sizes[place]
        row.append(number)
        if free_tokens - size not in left:
            left[free_tokens - size] = []
            insort(sizes, free_tokens - size)
        left[free_tokens - size].append(row)
    return rows


@dataclass(frozen=True)
class ShuffledRowOrder:
    """Which rows a step trains on: a function of seed and step number alone, so that a run can resume anywhere.

    Rows are shuffled anew in each epoch; a step may span the end of an epoch.

    """

    row_count: int
    rows_per_step: int
    seed: int
    total_rows: int  # rows of all steps together

    @property
    def step_count(self) -> int:
        """The number of steps. The last step may have fewer rows."""
        return -(-self.total_rows // self.rows_per_step)

    def row_indices(self, step: int) -> list[int]:
        """Return the rows of a step; the first step is 0."""
        start = step * self.rows_per_step
        stop = min(start + self.rows_per_step, self.total_rows)
        selected: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.row_count)
            selected += _shuffled_indices(self.row_count, (self.seed + epoch * _MIX) % 2**63)[
                first : first + stop - start
            ]
            start = step * self.rows_per_step + len(selected)
        return selected


@lru_cache(maxsize=2)
def _shuffled_indices(row_count: int, seed: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    order: list[int] = torch.randperm(row_count, generator=generator, dtype=torch.int64, device="cpu").tolist()
    return order


def rank_batches(indices: list[int], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Divide the rows of a step among ``world`` processes; return those of one, in batches of ``batch_size``.

    Every process gets the same number of batches. The last ones may be shorter, or empty.
    """
    together = batch_size * world
    return [indices[start : start + together][rank::world] for start in range(0, len(indices), together)]
