"""What became of each weight that was imported or exported, and the error that it added."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from lowmem.io.shards import LazyWeight
from lowmem.quant.backend import backend_of
from lowmem.quant.tensor import QuantizedTensor, Squares, row_slices_within_scratch


@dataclass(frozen=True)
class ForeignWeightResult:
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
class Exported(ForeignWeightResult):
    """The result for one weight that was exported."""

    target: str
    """Its name in the target."""
    square: float = 0.0
    """Sum of the squares of its values in the source: the weight of its error in ``combined_relative_rms_error``."""

    @classmethod
    def compare(
        cls,
        weight: LazyWeight,
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
        error_squares = squares_of_error_and_weight(before, after) if measured else Squares(0.0, 0.0)
        error = (
            math.sqrt(error_squares.error_squares / error_squares.weight_squares)
            if error_squares.error_squares
            else None
        )
        shape = tuple(before.shape)
        return cls(
            weight.name,
            shape,
            kind,
            weight.form_name,
            weight.nbytes,
            after_bytes,
            error,
            target,
            error_squares.weight_squares,
        )


def squares_of_error_and_weight(before: Tensor | QuantizedTensor, after: Tensor | QuantizedTensor | None) -> Squares:
    """Return the squares of a weight before an export and of its error after it; ``after`` is None if it is kept."""
    columns = before.shape[-1] if len(before.shape) else 1

    def iterate_chunk_squares() -> Iterator[Squares]:
        for rows in row_slices_within_scratch(math.prod(before.shape) // max(1, columns), columns):
            values = _dense_matrix_rows(before, rows, columns)
            yield backend_of(values).squares(
                values, values if after is None else _dense_matrix_rows(after, rows, columns)
            )

    total = Squares.total(iterate_chunk_squares())
    return Squares(0.0, total.weight_squares) if after is None else total


def combined_relative_rms_error(results: Iterable[Exported]) -> float:
    """Return ``rms(target - source) / rms(source)`` over all of the rows."""
    lost = square = 0.0
    for row in results:
        lost += (row.error or 0.0) ** 2 * row.square
        square += row.square
    return math.sqrt(lost / square) if square else 0.0


def _dense_matrix_rows(weight: Tensor | QuantizedTensor, row_slice: slice, columns: int) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        return weight.as_matrix().restore(row_slice)
    return weight.detach().reshape(-1, columns)[row_slice]
