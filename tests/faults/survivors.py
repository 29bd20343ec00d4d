"""Mutants that no test kills, each with the reason why none could: ``tests/survivors.toml``.

[[survivor]]
file = "lowmem/io/atomic.py"
line = "head = (limit - 3) // 2"      # the lines that the mutant changes, without their indent,
mutant = "head = (limit - 4) // 2"    # and what it makes of them
reason = "the middle may be cut one character earlier"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.faults.planted import tomllib

LIST = Path(__file__).parents[1] / "survivors.toml"


@dataclass(frozen=True)
class Survivor:
    """A change of one place, by its text: lines move, and numbers of lines with them."""

    file: str
    line: str
    mutant: str


def read_survivors(path: Path = LIST) -> dict[Survivor, str]:
    """Return the reason of each survivor.

    Raises:
        ValueError: it is no such list, or a survivor has no reason or is there twice.
    """
    found: dict[Survivor, str] = {}
    try:
        for entry in tomllib.loads(path.read_text(encoding="utf8"))["survivor"]:
            reason = entry.pop("reason", "")
            survivor = Survivor(**entry)
            if not reason.strip():
                raise ValueError(f"{survivor.mutant!r} has no reason")
            if survivor in found:
                raise ValueError(f"{survivor.mutant!r} is there twice")
            found[survivor] = reason
    except (KeyError, TypeError, AttributeError, ValueError) as reason:
        raise ValueError(f"{path.name} is no list of survivors: {reason}") from reason
    return found
