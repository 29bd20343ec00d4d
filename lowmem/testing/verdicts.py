"""Verdicts of the gates as JSON files, which reports and GitHub Actions show; they are checked when read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import printable, refusal, show
from lowmem.io.atomic import write_atomically
from lowmem.testing.json_files import read_json

__all__ = ["FAILING", "OUTCOMES", "VERDICTS", "Row", "Verdict", "read_verdict", "write_verdict"]

VERDICTS = ("same", "slower", "faster", "grew", "shrank", "new", "missing", "skipped", "undecided")

OUTCOMES = ("failed", "undecided", "passed")  # of gates, the worst first

FAILING: Mapping[str, frozenset[str]] = {
    # Exact figures: any difference from the baseline.
    "memory": frozenset(VERDICTS) - {"same", "undecided"},
    "resident": frozenset(VERDICTS) - {"same", "skipped", "undecided"},
    # Comparisons with a base: figures that got worse, or are missing.
    "latency": frozenset({"slower", "missing"}),
    "instructions": frozenset({"grew", "missing"}),
}
"""Which verdicts fail each gate. Undecided figures fail none, and let none pass."""

_UNMOVED = ("same", "skipped")

MOST_TEXT = 2000  # characters of a name or note; the middle of a longer one is left out


@dataclass(frozen=True)
class Row:
    """One figure of one workload, in the base and in the head.

    Attributes:
        name: of the workload: a benchmark's node id, say, or a variant.
        figure: its name, such as ``stored_bytes``; empty if the workload has only one.
        base: the figure in the base; None if the base does not have it.
        head: the figure in the head; None if the head does not have it.
        ratio: head / base; None if they are compared in another way.
        low: the lower end of the interval of ``ratio``.
        high: its upper end.
        verdict: one of ``VERDICTS``.
        says: the verdict as a sentence.
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
    """The result of a gate that compares a head with a base, on one machine.

    Attributes:
        gate: a key of ``FAILING``.
        passed: whether the gate passed; it may fail for other reasons than its rows, and does not pass undecided.
        base: name of the base: a commit, or the file of a baseline.
        head: name of the head.
        machine: properties of the machine that figures may depend on.
        rows: one for each figure.
        notes: further remarks.
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
        """Return a verdict that passes unless the verdict of a row fails the gate, or is undecided."""
        passed = not any(row.verdict in FAILING[gate] | {"undecided"} for row in rows)
        return cls(gate, passed, base, head, machine, rows, notes)

    @property
    def outcome(self) -> str:
        """ "passed", "failed", or "undecided": nothing failed, but other work kept a figure from being judged."""
        if self.passed:
            return "passed"
        words = {row.verdict for row in self.rows}
        return "undecided" if "undecided" in words and not words & FAILING[self.gate] else "failed"

    @property
    def moved(self) -> list[Row]:
        """The rows whose figures differ between base and head, or may."""
        return [row for row in self.rows if row.verdict not in _UNMOVED]


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write a verdict atomically.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    write_atomically(path, (json.dumps(asdict(verdict), indent=1) + "\n").encode())


def read_verdict(path: Path) -> Verdict:
    r"""Read the verdict of a gate. Unknown members are ignored, since a newer gate may write more.

    Control and other invisible characters of names and notes are escaped, as ``\x1b``.

    Raises:
        FileError: the file is damaged, too large, or not a verdict.
        OSError: the file cannot be read.
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
        _text(content["base"]),
        _text(content["head"]),
        {_text(key): _text(value) for key, value in content["machine"].items()},
        tuple(_row(number, row) for number, row in enumerate(content["rows"])),
        tuple(map(_text, content.get("notes", ()))),
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
    texts = {key: _text(row[key]) for key in ("name", "figure", "says")}
    return Row(**{key: row[key] for key in Row.__dataclass_fields__} | texts)


def _text(value: object) -> str:
    """Return a text without control characters, at which what draws names fails."""
    return printable(str(value), MOST_TEXT)


def _check(content: dict[str, Any], key: str, accepted: Any) -> None:
    if key not in content:
        raise ValueError(f"{key} is missing")
    if not accepted(content[key]):
        raise ValueError(f"{key} is {show(content[key])}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
