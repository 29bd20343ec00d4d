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

from lowmem.errors import file_error, short_repr
from lowmem.io.filesystem import write_atomically
from lowmem.io.safetensors_header import check_size_and_read_file, parse_strict_json
from lowmem.testing.gate_verdicts import FigureComparison, figure_verdict
from lowmem.transforms.model_summary import aligned_table_lines

VERSION = 1
"""Of the members of a baseline's file, raised with each change of them."""

MOST_BYTES = 2**24
"""Largest baseline that is read, in bytes; a gate takes about 200."""

Figures = dict[str, int]
"""The bytes of each figure of one measurement; the names end in ``_bytes``."""


@dataclass(frozen=True)
class BaselineKey:
    """What figures depend on: the backend, torch's version as major.minor, and the number of torch's threads.

    The backend is the active kernel, or the device type if it is not the CPU. Each file has the figures of one key.
    """

    backend: str
    torch: str
    threads: int

    @classmethod
    def with_current_torch(cls, backend: str, threads: int) -> BaselineKey:
        """Return the key for figures of this process, with the imported version of torch."""
        return cls(backend, ".".join(torch.__version__.split(".")[:2]), threads)

    @property
    def file_stem(self) -> str:
        """The name of the file, without its suffix."""
        return f"{self.backend}-torch{self.torch}"

    def file_path(self, directory: Path) -> Path:
        """Return the file of this key."""
        return directory / f"{self.file_stem}.json"

    def __str__(self) -> str:
        return f"backend={self.backend}, torch={self.torch}, threads={self.threads}"


def stored_torch_versions_text(directory: Path, file_prefix: str = "") -> str:
    """Return the versions of torch, and their backends, for which a directory has baselines; "" for none."""
    backends_by_version: dict[tuple[int, int], list[str]] = {}
    for path in sorted(directory.glob(f"{file_prefix}*-torch*.json")):
        if parts := re.fullmatch(rf"{file_prefix}(\w+)-torch(\d+)\.(\d+)", path.stem):
            backends_by_version.setdefault((int(parts[2]), int(parts[3])), []).append(parts[1])
    return ", ".join(
        f"torch {major}.{minor} ({', '.join(backends_by_version[major, minor])})"
        for major, minor in sorted(backends_by_version)
    )


def byte_count_text(byte_count: float | None) -> str:
    """Return the text of a number of bytes; "-" where there is none."""
    return "-" if byte_count is None else f"{byte_count:,}"


def comparison_rows(gate_name: str, stored: Mapping[str, int], current: Mapping[str, int]) -> list[FigureComparison]:
    """Return a row for each figure of a measurement, in the order of ``current``."""
    rows = []
    for figure in dict.fromkeys([*current, *stored]):
        before, after = stored.get(figure), current.get(figure)
        verdict = figure_verdict(before, after)
        new_text, old_text = byte_count_text(after), byte_count_text(before)
        says = f"{gate_name}: {figure} is {new_text}, and the baseline has {old_text}: {verdict}"
        rows.append(FigureComparison(gate_name, figure, before, after, verdict=verdict, says=says))
    return rows


def difference_table_lines(rows: Iterable[FigureComparison]) -> list[str]:
    """Return the lines of a table of figures in bytes: name, before, after, difference."""
    cells = [
        (row.figure, byte_count_text(row.base), byte_count_text(row.head), f"{(row.head or 0) - (row.base or 0):+,}")
        for row in rows
    ]
    return aligned_table_lines([("bytes", "before", "after", "difference"), *cells], right_aligned=(1, 2, 3))


def read_baseline_figures(path: Path, key: BaselineKey) -> dict[str, Figures]:
    """Read the figures of each measurement from the file of a key; a FileError names what is damaged."""
    content = check_size_and_read_file(path, MOST_BYTES, "baseline")
    try:
        figures: dict[str, Figures] = parse_baseline(content, key)["figures"]
        for name, sizes in figures.items():
            check_byte_figures(name, sizes)
            if not sizes:
                raise ValueError(f"the figures of {short_repr(name)} must be one or more")
    except ValueError as error:
        remedy = "restore it from version control, or remove it and store the figures again"
        raise file_error(path, f"{error}; {remedy}") from error
    return figures


def parse_baseline(content: str | bytes, key: BaselineKey, *extra_members: str) -> dict[str, Any]:
    """Parse a baseline of this run's key, with further members besides the key's and ``figures``.

    The message of a ValueError is one line without the file's name.
    """
    document: Any = parse_strict_json(content)
    names = ("version", "backend", "torch", "threads", *extra_members, "figures")
    version = document.get("version") if isinstance(document, dict) else VERSION
    if type(version) is not int or version != VERSION:
        newer = ": upgrade lowmem" if type(version) is int and version > VERSION else ""
        raise ValueError(f"it has version={short_repr(version)}, and this lowmem reads {VERSION}{newer}")
    if not isinstance(document, dict) or document.keys() != set(names):
        raise ValueError(f"it must hold {', '.join(names[:-1])} and figures, and nothing else")
    if asdict(key) != {name: document[name] for name in asdict(key)}:
        stored_key_text = ", ".join(f"{name}={short_repr(document[name])}" for name in asdict(key))
        raise ValueError(f"its figures are of {stored_key_text}, and this run is {key}")
    if not isinstance(document["figures"], dict):
        raise ValueError(f"figures={short_repr(document['figures'])} must be an object")
    return document


def check_byte_figures(gate_name: str, figures: Any) -> None:
    """Raise a ValueError unless ``figures`` maps names to numbers of bytes."""
    if not isinstance(figures, dict):
        raise ValueError(f"the figures of {short_repr(gate_name)} must be an object")
    for figure, size in figures.items():
        if type(size) is not int or size < 0:
            raise ValueError(
                f"{short_repr(gate_name)}: {short_repr(figure)} is {short_repr(size)} and must be a number of bytes"
            )


def write_baseline_figures(
    path: Path, key: BaselineKey, figures: Mapping[str, Mapping[str, float]], **extra_members: Any
) -> None:
    """Write a baseline with further members atomically, and create its directory. Names are sorted."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {short_repr(str(path))}: {error.strerror}; choose another directory") from error
    document = {"version": VERSION, **asdict(key), **extra_members, "figures": dict(sorted(figures.items()))}
    write_atomically(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
