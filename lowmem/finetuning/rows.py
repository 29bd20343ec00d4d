"""Rows of tokens that a model computes together: short examples share a row where the model keeps them apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.finetuning.calling import Calling, calling_of
from lowmem.finetuning.text import IGNORED, Example

__all__ = ["Batch", "Rows", "pack"]


@dataclass(frozen=True)
class Batch:
    """Some rows.

    Args:
        inputs: the arguments of the model.
        targets: int64 (rows, tokens): at each token the one after it, or ``IGNORED``.
        tokens: how many there are, without padding.
    """

    inputs: dict[str, Any]
    targets: Tensor
    tokens: int


class Rows:
    """Examples in rows of at most ``length`` tokens.

    Where the model isolates them, several share a row: each begins at position 0, and none sees another. Otherwise
    each has a row of its own, which is padded at its end, where nothing before sees it.

    Args:
        examples: of at most ``length`` tokens each.
        length: of the longest row.
        calling: how the model is called.

    Attributes:
        counted: int64 (rows,): how many tokens of each row are to be predicted.
        tokens: how many all rows have.

    Raises:
        ValueError: there are no examples, or a longer one.
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
        self.counted = torch.tensor([sum(own[number] for number in row) for row in self._rows])
        self.tokens = sum(lengths)

    @classmethod
    def of(cls, model: nn.Module, examples: Sequence[Example], length: int, vocabulary: int) -> Rows:
        """Make rows for a model of so many tokens.

        Raises:
            ValueError: as ``calling_of``, or as above.
        """
        return cls(examples, length, calling_of(model, vocabulary))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Return some rows, as long as the longest of them.

        Without indices it is a row of one token, of which nothing counts: a process whose part of a step is empty
        takes part in forward and backward nevertheless, with gradients of zero.
        """
        rows = [self._rows[index] for index in indices]
        width = max([1, *(sum(len(self._examples[one].ids) for one in row) for row in rows)])
        shape = (max(1, len(rows)), width)
        ids, positions, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        targets = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, parts in enumerate(rows):
            start = 0
            for example in (self._examples[one] for one in parts):
                stop = start + len(example.ids)
                ids[row, start:stop], targets[row, start:stop] = example.ids, example.targets
                positions[row, start:stop] = torch.arange(stop - start)
                start = stop
            mask[row, :start] = 1
            positions[row, start:] = torch.arange(width - start)  # padding is a text of its own
        several = any(len(parts) > 1 for parts in rows)
        padded = not several and not bool(mask.all())
        inputs = self.calling.inputs(
            ids.to(device), positions.to(device) if several else None, mask.to(device) if padded and rows else None
        )
        return Batch(inputs, targets.to(device), int(mask.sum()))

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yield all rows in their order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))), device)


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return rows of numbers of examples, each in the row that it fills best, the longest first.

    Best-fit decreasing takes at most 11/9 of the least number of rows, and one (Johnson, Near-optimal bin packing
    algorithms, 1973).
    """
    rows: list[list[int]] = []
    left: dict[int, list[list[int]]] = {}  # rows by the tokens that they have room for
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
