"""What became of each weight that was imported or exported, and the error that it added."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from lowmem.io.shards import StoredWeight
from lowmem.quant.backend import backend_of
from lowmem.quant.tensor import QuantizedTensor, Squares, row_chunks


@dataclass(frozen=True)
class ForeignRow:
    """The result for one weight that was read from another program's file, or written to one."""

    name: str
    """As the model's state in lowmem names it."""
    shape: tuple[int, ...]
    kind: str
    """How the other program's file stores it."""
    kept: str
    """How lowmem does."""
    before_bytes: int
    after_bytes: int
    error: float | None
    """``rms(target - source) / rms(source)`` of the values in float32, or None if no value changed; of several
    weights that became one, the largest error."""


@dataclass(frozen=True)
class Exported(ForeignRow):
    """The result for one weight that was exported."""

    target: str
    """Its name in the target."""
    square: float = 0.0
    """The sum of the squares of its values in the source, by which ``total_error`` weighs the errors."""

    @classmethod
    def compare(
        cls,
        weight: StoredWeight,
        target: str,
        kind: str,
        before: Tensor | QuantizedTensor,
        after: Tensor | QuantizedTensor | None,
        after_bytes: int,
        measured: bool = True,
    ) -> Exported:
        """Return the row of a weight, with the error of what it became.

        Args:
            weight: in the source.
            target, kind, after_bytes: as the fields.
            before: the values of the source.
            after: the values of the target, in the shape of ``before``; None if they are the same.
            measured: whether to compare the values at all; else they are the same.
        """
        found = squares(before, after) if measured else Squares(0.0, 0.0)
        error = math.sqrt(found.lost / found.size) if found.lost else None
        shape = tuple(before.shape)
        return cls(weight.name, shape, kind, weight.kept, weight.nbytes, after_bytes, error, target, found.size)


def squares(before: Tensor | QuantizedTensor, after: Tensor | QuantizedTensor | None) -> Squares:
    """Return the squares of a weight before an export and of its error after it; ``after`` is None if it is kept."""
    columns = before.shape[-1] if len(before.shape) else 1

    def parts() -> Iterator[Squares]:
        for rows in row_chunks(math.prod(before.shape) // max(1, columns), columns):
            values = _values(before, rows, columns)
            yield backend_of(values).squares(values, values if after is None else _values(after, rows, columns))

    total = Squares.total(parts())
    return Squares(0.0, total.size) if after is None else total


def total_error(rows: Iterable[Exported]) -> float:
    """Return ``rms(target - source) / rms(source)`` over all of the rows."""
    lost = square = 0.0
    for row in rows:
        lost += (row.error or 0.0) ** 2 * row.square
        square += row.square
    return math.sqrt(lost / square) if square else 0.0


def _values(weight: Tensor | QuantizedTensor, rows: slice, columns: int) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        return weight.as_matrix().restore(rows)
    return weight.detach().reshape(-1, columns)[rows]
