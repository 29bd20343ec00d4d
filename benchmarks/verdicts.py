"""What a gate found, row by row, and the JSON that the report and Actions read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One figure of one workload, base against head.

    Attributes:
        name: of the workload: a benchmark's node id, or a variant.
        figure: what was measured; empty where the row is about the workload as a whole.
        base: the stored value, None where there is none.
        head: the value of this run, None where there is none.
        verdict: same, grew, shrank, new, missing or skipped; every one but ``same`` fails a memory gate.
        says: the sentence that a person reads.
    """

    name: str
    figure: str
    base: float | None
    head: float | None
    verdict: str
    says: str


def failures(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that fail the gate."""
    return [row for row in rows if row.verdict != "same"]


def write_verdict(
    path: Path, gate: str, rows: Sequence[Row], *, passed: bool, base: str, head: str, machine: Mapping[str, object]
) -> None:
    """Write a gate's verdict, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is whole.
    """
    document = {
        "gate": gate,
        "passed": passed,
        "base": base,
        "head": head,
        "machine": dict(machine),
        "rows": [
            {**asdict(row), "ratio": row.head / row.base if row.base and row.head is not None else None}
            | {"low": None, "high": None}
            for row in rows
        ],
    }
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())
