"""What the gates said: their verdicts as JSON, checked before anything of them is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.files import refusal, show
from lowmem.report.files import read_json

__all__ = ["GATES", "VERDICTS", "Row", "Verdict", "read_verdict"]

GATES = ("memory", "resident", "latency", "instructions")
VERDICTS = ("same", "slower", "faster", "grew", "shrank", "new", "missing", "skipped")
_UNMOVED = ("same", "skipped")


@dataclass(frozen=True)
class Row:
    """One figure of one workload, in the base and in the head.

    Attributes:
        name: of the workload.
        figure: which of its figures: ``stored_bytes``, say, or ``ratio``.
        base: the figure in the base; None where it has none.
        head: the figure in the head; None where it has none.
        ratio: head over base; None where that is not how they are compared.
        low: the lower end of the interval of ``ratio``.
        high: its upper end.
        verdict: one of ``VERDICTS``.
        says: the same as a sentence.
    """

    name: str
    figure: str
    base: float | None
    head: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str
    says: str


@dataclass(frozen=True)
class Verdict:
    """What one gate said of a head against a base, on one machine."""

    gate: str
    passed: bool
    base: str
    head: str
    machine: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def moved(self) -> list[Row]:
        """The rows that are not the same in the head as in the base."""
        return [row for row in self.rows if row.verdict not in _UNMOVED]


def read_verdict(path: Path) -> Verdict:
    """Read what a gate wrote. Names that are not known are passed over: a newer gate may say more.

    Raises:
        FileError: it is damaged, or no verdict.
        OSError: it cannot be read.
    """
    content = read_json(path)
    try:
        return _verdict(content)
    except ValueError as reason:
        raise refusal(path, f"it is no verdict of a gate: {reason}; write it again with the gate") from None


def _verdict(content: Any) -> Verdict:
    if not isinstance(content, dict):
        raise ValueError(f"it is {show(content)}")
    _check(content, "gate", lambda value: value in GATES)
    _check(content, "passed", lambda value: isinstance(value, bool))
    _check(content, "base", lambda value: isinstance(value, str))
    _check(content, "head", lambda value: isinstance(value, str))
    _check(content, "machine", lambda value: isinstance(value, dict))
    _check(content, "rows", lambda value: isinstance(value, list))
    return Verdict(
        content["gate"],
        content["passed"],
        content["base"],
        content["head"],
        {key: str(value) for key, value in content["machine"].items()},
        tuple(_row(number, row) for number, row in enumerate(content["rows"])),
    )


def _row(number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is {show(row)}")
    try:
        for key in ("name", "figure", "says"):
            _check(row, key, lambda value: isinstance(value, str))
        for key in ("base", "head"):
            _check(row, key, lambda value: value is None or _is_number(value))
        for key in ("ratio", "low", "high"):
            _check(row, key, lambda value: value is None or (_is_number(value) and value > 0))
        _check(row, "verdict", lambda value: value in VERDICTS)
    except ValueError as reason:
        raise ValueError(f"row {number}: {reason}") from None
    return Row(**{key: row[key] for key in Row.__dataclass_fields__})


def _check(content: dict[str, Any], key: str, accepted: Any) -> None:
    if key not in content:
        raise ValueError(f"{key} is missing")
    if not accepted(content[key]):
        raise ValueError(f"{key} is {show(content[key])}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
