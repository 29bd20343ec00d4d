"""Verdicts of the gates as JSON files, which reports and GitHub Actions show; they are checked when read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import file_error, printable_line, short_repr
from lowmem.io.filesystem import write_atomically
from lowmem.io.safetensors_header import check_size_and_read_file, parse_strict_json

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

MOST_BYTES = 2**28  # of a file that is read; a benchmark run with every single time has about 10 MiB
# Characters of a name or note; the middle of a longer one is left out
MOST_TEXT = 2000


@dataclass(frozen=True)
class FigureComparison:
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

    @property
    def ratio_and_interval_texts(self) -> tuple[str, str]:
        """The text of the ratio and of its interval; "" where there is none."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return ratio, "" if self.low is None or self.high is None else f"{self.low:.3f} to {self.high:.3f}"


@dataclass(frozen=True)
class GateVerdict:
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
    rows: Sequence[FigureComparison]
    notes: Sequence[str] = ()

    @classmethod
    def from_rows(
        cls,
        gate: str,
        base: str,
        head: str,
        machine: Mapping[str, Any],
        rows: Sequence[FigureComparison],
        notes: Sequence[str] = (),
    ) -> GateVerdict:
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
    def changed_rows(self) -> list[FigureComparison]:
        """The rows whose figures differ between base and head, or may."""
        return [row for row in self.rows if row.verdict not in _UNMOVED]


def figure_verdict(base: float | None, head: float | None, tolerance: float = 0) -> str:
    """Return "new", "missing", "grew", "shrank", or "same" for figures that differ by ``tolerance`` or less."""
    if base is None or head is None:
        return "new" if base is None else "missing"
    return "same" if abs(head - base) <= tolerance else "grew" if head > base else "shrank"


def write_verdict(path: Path, verdict: GateVerdict) -> None:
    """Write a verdict atomically."""
    write_atomically(path, (json.dumps(asdict(verdict), indent=1) + "\n").encode())


def read_report_json(path: Path) -> Any:
    """Read a JSON file that a report is made from; a FileError names one that is damaged or too large."""
    text = check_size_and_read_file(path, MOST_BYTES, "run and no verdict")
    try:
        return parse_strict_json(text)
    except ValueError as reason:
        raise file_error(path, f"{reason}; write it again with the gate or the benchmarks") from None


def read_verdict(path: Path) -> GateVerdict:
    """Read the verdict of a gate. Unknown members are ignored, since a newer gate may write more.

    Invisible characters of names and notes are escaped. A FileError names a file that is no verdict.
    """
    content = read_report_json(path)
    try:
        return _parse_verdict(content)
    except ValueError as reason:
        raise file_error(path, f"it is no verdict of a gate: {reason}; write it again with the gate") from None


_GATE: Mapping[str, Callable[[Any], bool]] = {
    "gate": lambda value: value in list(FAILING),
    "passed": lambda value: isinstance(value, bool),
    "base": lambda value: isinstance(value, str),
    "head": lambda value: isinstance(value, str),
    "machine": lambda value: isinstance(value, dict),
    "rows": lambda value: isinstance(value, list),
}
_ROW: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "figure", "says"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("base", "head"), lambda value: value is None or _is_number(value)),
    **dict.fromkeys(("ratio", "low", "high"), lambda value: value is None or (_is_number(value) and value > 0)),
    "verdict": lambda value: value in VERDICTS,
}


def _parse_verdict(content: Any) -> GateVerdict:
    _check_json_members("it", content, _GATE)
    notes = content.get("notes", [])
    if not isinstance(notes, list):
        raise ValueError(f"notes is {short_repr(notes)}")
    return GateVerdict(
        content["gate"],
        content["passed"],
        _printable_text(content["base"]),
        _printable_text(content["head"]),
        {_printable_text(key): _printable_text(value) for key, value in content["machine"].items()},
        tuple(_parse_row(number, row) for number, row in enumerate(content["rows"])),
        tuple(map(_printable_text, notes)),
    )


def _parse_row(row_index: int, content: Any) -> FigureComparison:
    _check_json_members(f"row {row_index}", content, _ROW)
    known: dict[str, Any] = {key: content[key] for key in _ROW}
    return FigureComparison(
        **known | {key: _printable_text(value) for key, value in known.items() if isinstance(value, str)}
    )


def _printable_text(value: object) -> str:
    """Return a text without control characters, at which what draws names fails."""
    return printable_line(str(value), MOST_TEXT)


def _check_json_members(name: str, content: Any, predicates: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raise a ValueError unless ``content`` has these members with values that are accepted."""
    if not isinstance(content, dict):
        raise ValueError(f"{name} is {short_repr(content)}")
    where = "" if name == "it" else f"{name}: "
    for key, accepts in predicates.items():
        if key not in content:
            raise ValueError(f"{where}{key} is missing")
        if not accepts(content[key]):
            raise ValueError(f"{where}{key} is {short_repr(content[key])}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
