"""Rows of tokens, and which of them a step trains on."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import show
from lowmem.finetuning.calling import Calling, calling_of
from lowmem.finetuning.text import IGNORED, Example

_MIX = 0x9E3779B97F4A7C15  # odd, so that the epochs of one seed have different seeds


@dataclass(frozen=True)
class Batch:
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

    If the model isolates them (``Calling.isolates``), several examples are packed into one row, each with positions
    from 0. Otherwise each example has its own row, padded at the end, which a causal model does not see.

    Args:
        examples: of at most ``length`` tokens each.
        length: the most tokens of a row.
        calling: how the model is called.

    Attributes:
        counted: int64 (rows,): number of tokens to be predicted in each row.

    Raises:
        ValueError: there are no examples, or one is longer than ``length``.
    """

    def __init__(self, examples: Sequence[Example], length: int, calling: Calling) -> None:
        if not examples:
            raise ValueError("examples=[] must hold at least one")
        lengths = [len(example.ids) for example in examples]
        if max(lengths) > length:
            raise ValueError(f"length={length} must be at least that of the longest example, {max(lengths)} tokens")
        self.calling = calling
        self._examples = examples
        self._rows = pack(lengths, length) if calling.isolates else [[number] for number in range(len(examples))]
        own = [example.counted for example in examples]
        counted = [sum(own[number] for number in row) for row in self._rows]
        self.counted = torch.tensor(counted, dtype=torch.int64, device="cpu")

    @classmethod
    def of(cls, model: nn.Module, examples: Sequence[Example], length: int, vocabulary: int) -> Rows:
        """Make rows for a model with a vocabulary of that size.

        Raises:
            ValueError: as ``calling_of``, or as for the class.
        """
        return cls(examples, length, calling_of(model, vocabulary))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Return some rows, padded to the longest of them.

        Without indices, return a row of one token without a target: a process whose part of a step is empty must
        still take part in forward and backward, with gradients of zero.
        """
        rows = [self._rows[index] for index in indices]
        width = max([1, *(sum(len(self._examples[one].ids) for one in row) for row in rows)])
        shape = (max(1, len(rows)), width)
        ids, positions, mask = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(3))
        targets = torch.full(shape, IGNORED, dtype=torch.int64, device="cpu")
        for row, parts in enumerate(rows):
            start = 0
            for example in (self._examples[one] for one in parts):
                stop = start + len(example.ids)
                ids[row, start:stop], targets[row, start:stop] = example.ids, example.targets
                positions[row, start:stop] = torch.arange(stop - start, dtype=torch.int64, device="cpu")
                start = stop
            mask[row, :start] = 1
            # The padding is a separate text.
            positions[row, start:] = torch.arange(width - start, dtype=torch.int64, device="cpu")
        several = any(len(parts) > 1 for parts in rows)
        padded = not several and not bool(mask.all())
        inputs = self.calling.inputs(
            ids.to(device), positions.to(device) if several else None, mask.to(device) if padded and rows else None
        )
        return Batch(inputs, targets.to(device), int(mask.sum()))


def check_rows(name: str, rows: object) -> None:
    """Raise a TypeError for an argument that is no ``Rows``."""
    if not isinstance(rows, Rows):
        raise TypeError(
            f"{name}={show(rows)} must be lowmem.Rows, as Rows.of(model, examples, length, vocabulary) is"
        )


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return for each row the indices of its examples: best-fit decreasing.

    The number of rows is at most 11/9 of the optimum plus a small constant (Johnson, Near-optimal bin packing
    algorithms, 1973).
    """
    rows: list[list[int]] = []
    left: dict[int, list[list[int]]] = {}  # rows by their free tokens
    sizes: list[int] = []  # the keys, sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        size = lengths[number]
        place = bisect_left(sizes, size)
        if place == len(sizes):
            row: list[int] = []
            room = length
            rows.append(row)
        else:
            room = sizes[place]
            row = left[room].pop()
            if not left[room]:
                del left[room], sizes[place]
        row.append(number)
        if room - size not in left:
            left[room - size] = []
            insort(sizes, room - size)
        left[room - size].append(row)
    return rows


@dataclass(frozen=True)
class Order:
    """Which rows a step trains on: a function of seed and step number alone, so that a run can resume anywhere.

    Rows are shuffled anew in each epoch; a step may span the end of an epoch.

    """

    rows: int
    per_step: int
    seed: int
    total: int  # rows of all steps together

    @property
    def steps(self) -> int:
        """The number of steps. The last step may have fewer rows."""
        return -(-self.total // self.per_step)

    def indices(self, step: int) -> list[int]:
        """Return the rows of a step; the first step is 0."""
        start = step * self.per_step
        stop = min(start + self.per_step, self.total)
        found: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.rows)
            found += _shuffled(self.rows, (self.seed + epoch * _MIX) % 2**63)[first : first + stop - start]
            start = step * self.per_step + len(found)
        return found


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    order: list[int] = torch.randperm(rows, generator=generator, dtype=torch.int64, device="cpu").tolist()
    return order


def part(indices: list[int], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Divide the rows of a step among ``world`` processes; return those of one, in batches of ``batch_size``.

    Every process gets the same number of batches. The last ones may be shorter, or empty.
    """
    together = batch_size * world
    return [indices[start : start + together][rank::world] for start in range(0, len(indices), together)]
