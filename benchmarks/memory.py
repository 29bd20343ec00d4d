"""The memory baseline: the exact bytes of each benchmark's figures, in a file that a reviewer reads in a diff.

A kernel's scratch depends on its instruction set, and what torch's operations allocate on torch's version: there is
one file for each backend and minor version of torch, ``benchmarks/memory/<backend>-torch<X.Y>.json``.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lowmem
from lowmem import kernels
from lowmem.files import write_atomically
from lowmem.testing.verdicts import Row

THREADS = (
    2  # torch uses so many in the benchmarks: each has scratch of its own, so that memory depends on their number
)

Figures = Mapping[str, Mapping[str, int]]  # by node id of the benchmark, then by name of the figure


@dataclass(frozen=True)
class Key:
    """What exact bytes depend on."""

    backend: str
    torch: str

    def __str__(self) -> str:
        return f"{self.backend}-torch{self.torch}"

    def path(self, root: Path) -> Path:
        """Return where the baseline lies, of a repository's root."""
        return root / "benchmarks" / "memory" / f"{self}.json"


def current_key() -> Key:
    """Return the key of this process: the kernel that serves it, and torch's minor version."""
    return Key(lowmem.backend().partition(":")[0], ".".join(torch.__version__.split(".")[:2]))


def store_command() -> str:
    """Return the command that stores this run's figures, for the kernel that was chosen if one was."""
    chosen = os.environ.get(kernels.VARIABLE)
    prefix = f"{kernels.VARIABLE}={chosen} " if chosen else ""
    return f"{prefix}pytest benchmarks --benchmark-disable --store-memory"


def read_document(path: Path, key: Key) -> dict[str, Any]:
    """Read the JSON object of a baseline, whose ``figures`` are an object.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is damaged, or of another key or thread count; the message is one line.
    """
    try:
        document = json.loads(path.read_text(encoding="utf8"), object_pairs_hook=_without_duplicates)
    except (RecursionError, ValueError) as reason:
        raise ValueError(f"it is damaged ({reason})") from reason
    if not isinstance(document, dict) or not isinstance(document.get("figures"), dict):
        raise ValueError("it is damaged (an object with 'figures' was expected)")
    if (document.get("backend"), document.get("torch")) != (key.backend, key.torch):
        raise ValueError(
            f"it holds figures of {document.get('backend')!r} with torch {document.get('torch')!r}, "
            f"and this run is of {key.backend!r} with torch {key.torch!r}"
        )
    if document.get("threads") != THREADS:
        raise ValueError(f"it was stored with threads={document.get('threads')!r}, and the benchmarks use {THREADS}")
    return document


def read_baseline(path: Path, key: Key) -> Figures:
    """Read the figures of a baseline.

    Raises:
        FileNotFoundError, OSError, ValueError: as ``read_document``, or a figure is no number of bytes.
    """
    stored = read_document(path, key)["figures"]
    for name, figures in stored.items():
        if not isinstance(figures, dict):
            raise ValueError(f"it is damaged ({name}: an object of figures was expected)")
        check_figures(name, figures)
    return stored


def write_baseline(path: Path, key: Key, figures: Figures) -> None:
    """Write a baseline, whole or not at all, the same bytes for the same figures.

    Raises:
        OSError: it cannot be written; what was there before is whole.
    """
    document = {
        "backend": key.backend,
        "torch": key.torch,
        "threads": THREADS,
        "figures": {name: dict(sorted(figures[name].items())) for name in sorted(figures)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())


def check_figures(name: str, figures: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the figure unless each is a number of bytes."""
    for figure, value in figures.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}: {figure}={value!r} must be an integer of bytes")


def compare(stored: Figures, now: Figures, missing: Mapping[str, str]) -> list[Row]:
    """Compare two runs to the byte, in both directions.

    Args:
        stored: the baseline.
        now: the benchmarks that passed.
        missing: stored benchmarks that were asked for and gave no figures, each with the reason; empty: it is gone.
    """
    rows = []
    new = {name: now[name] for name in now if name not in stored}
    gone = [name for name, why in missing.items() if not why]
    renamed = _renamed({name: stored[name] for name in gone}, new)
    for name in sorted(stored.keys() & now.keys()):
        rows += _compare_figures(name, stored[name], now[name])
    for name in sorted(new):
        rows.append(Row(name, "", verdict="new", says=f"{name} is new: the baseline has no figures of it"))
    for name, why in sorted(missing.items()):
        if why:
            rows.append(
                Row(name, "", verdict="skipped", says=f"{name} was skipped ({why}): run it, or mark it ungated")
            )
        else:
            hint = f"; renamed? {renamed[name]} is new and has the same figures" if name in renamed else ""
            rows.append(Row(name, "", verdict="missing", says=f"{name} is missing: it is in the baseline{hint}"))
    return rows


def _compare_figures(name: str, stored: Mapping[str, int], now: Mapping[str, int]) -> list[Row]:
    rows = []
    for figure in sorted(stored.keys() | now.keys()):
        before, after = stored.get(figure), now.get(figure)
        if before is None:
            says = f"{name}: {figure} is new, {_bytes(after)}"
            rows.append(Row(name, figure, None, after, verdict="new", says=says))
        elif after is None:
            says = f"{name}: {figure} is missing, {_bytes(before)}"
            rows.append(Row(name, figure, before, None, verdict="missing", says=says))
        elif after == before:
            rows.append(Row(name, figure, before, after, verdict="same", says=f"{name}: {figure} is {_bytes(after)}"))
        else:
            verdict = "grew" if after > before else "shrank"
            moved = f"{verdict} by {_bytes(abs(after - before))}, from {before:,} to {after:,}"
            rows.append(Row(name, figure, before, after, verdict=verdict, says=f"{name}: {figure} {moved}"))
    return rows


def _renamed(gone: Figures, new: Figures) -> dict[str, str]:
    """Pair each benchmark that is gone with the new one of the same figures whose name is closest."""
    pairs = {}
    free = set(new)
    for name in sorted(gone):
        alike = sorted(other for other in free if new[other] == gone[name])
        closest = difflib.get_close_matches(name, alike, n=1, cutoff=0.0)
        if closest:
            pairs[name] = closest[0]
            free.discard(closest[0])
    return pairs


def _bytes(count: int | None) -> str:
    return f"{count:,} byte{'s' * (count != 1)}"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = next(name for name in document if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return document
