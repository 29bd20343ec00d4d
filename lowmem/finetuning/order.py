"""Which rows a step trains on: a function of seed and step number alone, so that a run can be resumed anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["Order", "part"]

_MIX = 0x9E3779B97F4A7C15  # odd, so that the epochs of one seed have different seeds


@dataclass(frozen=True)
class Order:
    """Rows, shuffled anew in each epoch; a step may span the end of an epoch.

    Args:
        rows: number of rows in the data.
        per_step: rows of a step; the last step may have fewer.
        seed: of the shuffles.
        total: rows of all steps together.
    """

    rows: int
    per_step: int
    seed: int
    total: int

    @property
    def steps(self) -> int:
        """The number of steps."""
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
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def part(indices: list[int], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Return one process's batches of a step; those of all processes together are the step's rows.

    Every process gets the same number of batches. The last ones may be shorter, or empty.

    Args:
        indices: the rows of the step.
        batch_size: rows that a process computes at a time.
        rank: of the process.
        world: number of processes.
    """
    together = batch_size * world
    return [indices[start : start + together][rank::world] for start in range(0, len(indices), together)]
