"""What the gates say: their verdicts as JSON, which the report and Actions read, checked before anything is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import refusal, show
from lowmem.io.atomic import write_atomically
from lowmem.testing.json_files import read_json

__all__ = ["FAILING", "VERDICTS", "Row", "Verdict", "read_verdict", "write_verdict"]

VERDICTS = ("same", "slower", "faster", "grew", "shrank", "new", "missing", "skipped")

FAILING: Mapping[str, frozenset[str]] = {
    # Exact figures: whatever is not as it was stored.
    "memory": frozenset(VERDICTS) - {"same"},
    "resident": frozenset(VERDICTS) - {"same", "skipped"},
    # Comparisons with a base: what got worse, or is gone.
    "latency": frozenset({"slower", "missing"}),
    "instructions": frozenset({"grew", "missing"}),
}
"""Which verdicts fail each gate."""

_UNMOVED = ("same", "skipped")


@dataclass(frozen=True)
class Row:
    """One figure of one workload, in the base and in the head.

    Attributes:
        name: of the workload: a benchmark's node id, say, or a variant.
        figure: which of its figures: ``stored_bytes``, say; empty where the row is of the workload as a whole.
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
    base: float | None = None
    head: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = "same"
    says: str = ""


@dataclass(frozen=True)
class Verdict:
    """What one gate says of a head against a base, on one machine.

    Attributes:
        gate: a key of ``FAILING``.
        passed: whether it passed as a whole: a gate may fail for more than its rows.
        base: what was compared with: a commit, or the file of a baseline.
        head: what was measured.
        machine: what the figures may depend on.
        rows: each figure.
        notes: what else a reader has to know.
    """

    gate: str
    passed: bool
    base: str
    head: str
    machine: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    @classmethod
    def of_rows(
        cls,
        gate: str,
        base: str,
        head: str,
        machine: Mapping[str, Any],
        rows: Sequence[Row],
        notes: Sequence[str] = (),
    ) -> Verdict:
        """Return the verdict that rows alone decide."""
        return cls(gate, not any(row.verdict in FAILING[gate] for row in rows), base, head, machine, rows, notes)

    @property
    def moved(self) -> list[Row]:
        """The rows that are not the same in the head as in the base."""
        return [row for row in self.rows if row.verdict not in _UNMOVED]


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write a verdict, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is whole.
    """
    write_atomically(path, (json.dumps(asdict(verdict), indent=1) + "\n").encode())


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
    _check(content, "gate", lambda value: value in list(FAILING))
    _check(content, "passed", lambda value: isinstance(value, bool))
    _check(content, "base", lambda value: isinstance(value, str))
    _check(content, "head", lambda value: isinstance(value, str))
    _check(content, "machine", lambda value: isinstance(value, dict))
    _check(content, "rows", lambda value: isinstance(value, list))
    if not isinstance(content.get("notes", []), list):
        raise ValueError(f"notes is {show(content['notes'])}")
    return Verdict(
        content["gate"],
        content["passed"],
        content["base"],
        content["head"],
        {key: str(value) for key, value in content["machine"].items()},
        tuple(_row(number, row) for number, row in enumerate(content["rows"])),
        tuple(str(note) for note in content.get("notes", ())),
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
