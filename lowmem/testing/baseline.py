"""Stored memory figures: one JSON file for each kernel backend and minor version of torch, and what moved since.

    {"backend": "portable", "torch": "2.13", "threads": 2,
     "figures": {"tests/test_model.py::test_small": {"stored_bytes": 4096, "forward_bytes": 512}}}

Figures are exact: a byte more and a byte less are both a change. Backends, versions of torch and thread counts
allocate otherwise, so their figures are never compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import refusal, show
from lowmem.io.atomic import open_regular, write_atomically

__all__ = [
    "Change",
    "Figures",
    "Key",
    "check_figures",
    "compare",
    "difference_table",
    "layout",
    "parse_document",
    "read_figures",
    "write_figures",
]

Figures = dict[str, int]
"""The bytes of each figure of one measurement; the names end in ``_bytes``."""


@dataclass(frozen=True)
class Key:
    """Where figures hold; one file has the figures of one key.

    Attributes:
        backend: the kernel that served, or the device that is not the CPU.
        torch: its version, as major.minor.
        threads: of torch; each has scratch of its own.
    """

    backend: str
    torch: str
    threads: int

    @classmethod
    def of_this_process(cls, backend: str, threads: int) -> Key:
        """Return the key of figures that are measured here, with the torch that is imported."""
        return cls(backend, ".".join(torch.__version__.split(".")[:2]), threads)

    @property
    def name(self) -> str:
        """The name of the file, without its suffix."""
        return f"{self.backend}-torch{self.torch}"

    def path(self, directory: Path) -> Path:
        """Return the file of this key."""
        return directory / f"{self.name}.json"

    def __str__(self) -> str:
        return f"backend={self.backend}, torch={self.torch}, threads={self.threads}"


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
        before, after = ("-" if size is None else f"{size:,}" for size in (self.before, self.after))
        return self.figure, before, after, f"{(self.after or 0) - (self.before or 0):+,}"


def compare(name: str, stored: Figures, now: Figures) -> list[Change]:
    """Return every figure of a measurement that differs by a byte or more, in the order of the figures now."""
    figures = dict.fromkeys([*now, *stored])
    changes = (Change(name, figure, stored.get(figure), now.get(figure)) for figure in figures)
    return [change for change in changes if change.before != change.after]


def difference_table(changes: Iterable[Change]) -> list[str]:
    """Lay out changes under a heading: figure, before, after, difference, in bytes."""
    return layout([("bytes", "before", "after", "difference"), *(change.cells for change in changes)], left=(0,))


def layout(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Align the columns of a table, those in ``left`` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def read_figures(path: Path, key: Key) -> dict[str, Figures]:
    """Read the figures of each measurement from the file of a key.

    Raises:
        FileError: it is damaged, or holds figures of another backend, torch or thread count.
        OSError: there is none, or it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        figures: dict[str, Figures] = parse_document(content, key)["figures"]
        for name, own in figures.items():
            check_figures(name, own)
            if not own:
                raise ValueError(f"the figures of {show(name)} must be one or more")
    except ValueError as error:
        remedy = "restore it from version control, or remove it and store the figures again"
        raise refusal(path, f"{error}; {remedy}") from error
    return figures


def parse_document(content: str | bytes, key: Key, more: Collection[str] = ()) -> dict[str, Any]:
    """Return what a baseline of a key holds.

    Args:
        content: of the file.
        key: of this run.
        more: the names that it holds beside the key's and ``figures``.

    Raises:
        ValueError: it is damaged, or of another key; the message is one line without the file's name.
    """
    try:
        document = json.loads(content, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is damaged (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"it is damaged ({error})") from error
    names = ("backend", "torch", "threads", *more, "figures")
    if not isinstance(document, dict) or document.keys() != set(names):
        raise ValueError(f"it must hold {', '.join(names[:-1])} and figures, and nothing else")
    for name in ("backend", "torch"):
        if not isinstance(document[name], str):
            raise ValueError(f"{name}={show(document[name])} must be a string")
    if type(document["threads"]) is not int:
        raise ValueError(f"threads={show(document['threads'])} must be an integer")
    if not isinstance(document["figures"], dict):
        raise ValueError(f"figures={show(document['figures'])} must be an object")
    found = Key(*(document[name] for name in names[:3]))
    if found != key:
        raise ValueError(f"its figures are of {found}, and this run is {key}")
    return document


def check_figures(name: str, figures: Any) -> None:
    """Raise a ValueError that names what is no number of bytes."""
    if not isinstance(figures, dict):
        raise ValueError(f"the figures of {show(name)} must be an object")
    for figure, size in figures.items():
        if type(size) is not int or size < 0:
            raise ValueError(f"{show(name)}: {show(figure)} is {show(size)} and must be a number of bytes")


def write_figures(path: Path, key: Key, figures: Mapping[str, Mapping[str, float]], **more: Any) -> None:
    """Write the file of a key, and its directory: sorted by name, for a diff; whole, or not at all.

    Args:
        path: of the file.
        key: where the figures hold.
        figures: by the name of the measurement.
        **more: what the file holds beside them.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {show(str(path))}: {error.strerror}; choose another directory") from error
    document = {**asdict(key), **more, "figures": dict(sorted(figures.items()))}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # a lone surrogate becomes JSON's escape of it


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it holds {show(name)} twice")
        found[name] = value
    return found
