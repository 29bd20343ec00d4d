"""Which rows a step trains on: a function of the step's number alone, so that a run goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["Order", "part"]

_MIX = 0x9E3779B97F4A7C15  # odd: each epoch of each seed has a seed of its own


@dataclass(frozen=True)
class Order:
    """Rows in a random order that is another one in each epoch; batches run over the ends of epochs.

    Args:
        rows: how many there are.
        per_step: how many a step takes; the last step takes what is left.
        seed: of the orders.
        total: how many rows all steps take.
    """

    rows: int
    per_step: int
    seed: int
    total: int

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return -(-self.total // self.per_step)

    def indices(self, step: int) -> list[int]:
        """Return the rows of a step, which counts from 0."""
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
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def part(indices: list[int], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Return the batches of one of several processes, which together are all rows of a step.

    Every process gets as many batches as the others. The last ones may be shorter, or empty.

    Args:
        indices: the rows of the step.
        batch_size: rows that a process computes at a time.
        rank: of the process.
        world: how many processes there are.
    """
    together = batch_size * world
    return [indices[start : start + together][rank::world] for start in range(0, len(indices), together)]
