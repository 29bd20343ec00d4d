"""Stored memory figures: one JSON file for each kernel backend and minor version of torch, and what moved since.

    {"backend": "portable", "torch": "2.13", "threads": 2,
     "figures": {"tests/test_model.py::test_small": {"stored_bytes": 4096, "forward_bytes": 512}}}

Figures are exact: a byte more and a byte less are both a change. Backends, versions of torch and thread counts
allocate otherwise, so their figures are never compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowmem.files import FileError, open_regular, refusal, show, write_atomically

__all__ = ["Baseline", "Change", "Figures", "compare", "difference_table", "read_baseline", "write_baseline"]

Figures = dict[str, int]
"""The bytes of each figure of one measurement; the names end in ``_bytes``."""


@dataclass(frozen=True)
class Baseline:
    """Figures by name, and where they hold.

    Attributes:
        backend: the kernel that served, or the device that is not the CPU.
        torch: its version, as major.minor.
        threads: of torch; each has scratch of its own.
        figures: of each measurement.
    """

    backend: str
    torch: str
    threads: int
    figures: dict[str, Figures] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of the file, without its suffix: backend and torch."""
        return f"{self.backend}-torch{self.torch}"

    def path(self, directory: Path) -> Path:
        """Return the file of this key."""
        return directory / f"{self.key}.json"

    def updated(self, figures: Mapping[str, Figures], removed: Iterable[str] = ()) -> Baseline:
        """Return one with the given figures added or replaced, and others removed."""
        kept = self.figures.keys() - set(removed) - figures.keys()
        return replace(self, figures={name: self.figures[name] for name in kept} | dict(figures))


@dataclass(frozen=True)
class Change:
    """One figure that is not as it was; None where it is absent.

    Attributes:
        name: of the measurement.
        figure: of it.
        before: bytes in the baseline.
        after: bytes now.
    """

    name: str
    figure: str
    before: int | None
    after: int | None

    @property
    def verdict(self) -> str:
        """One of "new", "missing", "grew" and "shrank"."""
        if self.before is None:
            return "new"
        if self.after is None:
            return "missing"
        return "grew" if self.after > self.before else "shrank"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The text of figure, before, after and difference."""
        sizes = ("-" if size is None else f"{size:,}" for size in (self.before, self.after))
        before, after = sizes
        return self.figure, before, after, f"{(self.after or 0) - (self.before or 0):+,}"


def compare(name: str, stored: Figures, now: Figures) -> list[Change]:
    """Return every figure of a measurement that differs by a byte or more, in the order of the figures now."""
    figures = dict.fromkeys([*now, *stored])
    changes = (Change(name, figure, stored.get(figure), now.get(figure)) for figure in figures)
    return [change for change in changes if change.before != change.after]


def difference_table(changes: Iterable[Change]) -> list[str]:
    """Lay out changes under a heading: figure, before, after, difference, in bytes."""
    rows = [("bytes", "before", "after", "difference"), *(change.cells for change in changes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def read_baseline(path: Path, key: Baseline) -> Baseline:
    """Read the file of a key.

    Args:
        path: of the file.
        key: backend, torch and threads that it has to hold; its figures are not looked at.

    Raises:
        FileError: it is damaged, or holds figures of another backend, torch or thread count.
        OSError: there is none, or it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read()
    remedy = "restore it from version control, or remove it and store the figures again"
    try:
        document = json.loads(content, object_pairs_hook=_without_duplicates)
        stored = _parse(document)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise refusal(path, f"{reason}; {remedy}") from error
    found, wanted = (
        f"backend={b.backend}, torch={b.torch}, threads={b.threads}" for b in (stored, replace(key, figures={}))
    )
    if found != wanted:
        raise refusal(path, f"its figures are of {found}, and this run is {wanted}; {remedy}")
    return stored


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file of a key, and its directory: sorted by name, for a diff; whole, or not at all.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {show(str(path))}: {error.strerror}; choose another directory") from error
    document = {
        "backend": baseline.backend,
        "torch": baseline.torch,
        "threads": baseline.threads,
        "figures": dict(sorted(baseline.figures.items())),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's escape of it


def _parse(document: Any) -> Baseline:
    if not isinstance(document, dict) or document.keys() != {"backend", "torch", "threads", "figures"}:
        raise FileError("it must hold backend, torch, threads and figures, and nothing else")
    for name in ("backend", "torch"):
        if not isinstance(document[name], str):
            raise FileError(f"{name}={show(document[name])} must be a string")
    if type(document["threads"]) is not int:
        raise FileError(f"threads={show(document['threads'])} must be an integer")
    if not isinstance(document["figures"], dict):
        raise FileError(f"figures={show(document['figures'])} must be an object")
    for name, figures in document["figures"].items():
        if not isinstance(figures, dict) or not figures:
            raise FileError(f"the figures of {show(name)} must be an object of one or more")
        for figure, size in figures.items():
            if type(size) is not int or size < 0:
                raise FileError(f"{show(name)}: {show(figure)} is {show(size)} and must be a number of bytes")
    return Baseline(**document)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FileError(f"it holds {show(name)} twice")
        found[name] = value
    return found
