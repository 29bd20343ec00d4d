"""Baselines of memory figures, one JSON file for each kernel backend and minor version of torch.

    {"version": 1, "backend": "portable", "torch": "2.13", "threads": 2,
     "figures": {"tests/test_model.py::test_small": {"stored_bytes": 4096, "forward_bytes": 512}}}

Figures are exact: one byte more or less is a change. Figures of different backends, versions of torch or thread
counts are never compared, since these allocate differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import refusal, show
from lowmem.io.atomic import write_atomically
from lowmem.io.safetensors import parse_json, read_at_most
from lowmem.testing.verdicts import Row, verdict_of
from lowmem.transforms.summary import aligned

VERSION = 1
"""Of the members of a baseline's file, raised with each change of them."""

MOST_BYTES = 2**24
"""Largest baseline that is read, in bytes; a gate takes about 200."""

Figures = dict[str, int]
"""The bytes of each figure of one measurement; the names end in ``_bytes``."""


@dataclass(frozen=True)
class Key:
    """What figures depend on: the backend, torch's version as major.minor, and the number of torch's threads.

    The backend is the active kernel, or the device type if it is not the CPU. Each file has the figures of one key.
    """

    backend: str
    torch: str
    threads: int

    @classmethod
    def of_this_process(cls, backend: str, threads: int) -> Key:
        """Return the key for figures of this process, with the imported version of torch."""
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


def stored_keys(directory: Path, prefix: str = "") -> str:
    """Return the versions of torch, and their backends, for which a directory has baselines; "" for none."""
    found: dict[tuple[int, int], list[str]] = {}
    for path in sorted(directory.glob(f"{prefix}*-torch*.json")):
        if parts := re.fullmatch(rf"{prefix}(\w+)-torch(\d+)\.(\d+)", path.stem):
            found.setdefault((int(parts[2]), int(parts[3])), []).append(parts[1])
    return ", ".join(f"torch {major}.{minor} ({', '.join(found[major, minor])})" for major, minor in sorted(found))


def count_text(size: float | None) -> str:
    """Return the text of a number of bytes; "-" where there is none."""
    return "-" if size is None else f"{size:,}"


def compare(name: str, stored: Mapping[str, int], now: Mapping[str, int]) -> list[Row]:
    """Return a row for each figure of a measurement, in the order of ``now``."""
    rows = []
    for figure in dict.fromkeys([*now, *stored]):
        before, after = stored.get(figure), now.get(figure)
        verdict = verdict_of(before, after)
        says = f"{name}: {figure} is {count_text(after)}, and the baseline has {count_text(before)}: {verdict}"
        rows.append(Row(name, figure, before, after, verdict=verdict, says=says))
    return rows


def difference_table(rows: Iterable[Row]) -> list[str]:
    """Return the lines of a table of figures in bytes: name, before, after, difference."""
    cells = [
        (row.figure, count_text(row.base), count_text(row.head), f"{(row.head or 0) - (row.base or 0):+,}")
        for row in rows
    ]
    return aligned([("bytes", "before", "after", "difference"), *cells], right=(1, 2, 3))


def read_figures(path: Path, key: Key) -> dict[str, Figures]:
    """Read the figures of each measurement from the file of a key; a FileError names what is damaged."""
    content = read_at_most(path, MOST_BYTES, "baseline")
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


def parse_document(content: str | bytes, key: Key, *more: str) -> dict[str, Any]:
    """Parse a baseline of this run's key, with further members besides the key's and ``figures``.

    The message of a ValueError is one line without the file's name.
    """
    document: Any = parse_json(content)
    names = ("version", "backend", "torch", "threads", *more, "figures")
    version = document.get("version") if isinstance(document, dict) else VERSION
    if type(version) is not int or version != VERSION:
        newer = ": upgrade lowmem" if type(version) is int and version > VERSION else ""
        raise ValueError(f"it has version={show(version)}, and this lowmem reads {VERSION}{newer}")
    if not isinstance(document, dict) or document.keys() != set(names):
        raise ValueError(f"it must hold {', '.join(names[:-1])} and figures, and nothing else")
    if asdict(key) != {name: document[name] for name in asdict(key)}:
        found = ", ".join(f"{name}={show(document[name])}" for name in asdict(key))
        raise ValueError(f"its figures are of {found}, and this run is {key}")
    if not isinstance(document["figures"], dict):
        raise ValueError(f"figures={show(document['figures'])} must be an object")
    return document


def check_figures(name: str, figures: Any) -> None:
    """Raise a ValueError unless ``figures`` maps names to numbers of bytes."""
    if not isinstance(figures, dict):
        raise ValueError(f"the figures of {show(name)} must be an object")
    for figure, size in figures.items():
        if type(size) is not int or size < 0:
            raise ValueError(f"{show(name)}: {show(figure)} is {show(size)} and must be a number of bytes")


def write_figures(path: Path, key: Key, figures: Mapping[str, Mapping[str, float]], **more: Any) -> None:
    """Write a baseline with further members atomically, and create its directory. Names are sorted."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {show(str(path))}: {error.strerror}; choose another directory") from error
    document = {"version": VERSION, **asdict(key), **more, "figures": dict(sorted(figures.items()))}
    write_atomically(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
