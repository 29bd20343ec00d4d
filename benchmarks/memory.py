"""The memory baseline: the exact bytes of each benchmark's figures, in a file that a reviewer reads in a diff.

A kernel's scratch depends on its instruction set, and what torch's operations allocate on torch's version: there is
one file for each backend and minor version of torch, ``benchmarks/memory/<backend>-torch<X.Y>.json``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

import lowmem
from lowmem import kernels
from lowmem.testing.baseline import Key, check_figures, parse_document, write_figures
from lowmem.testing.memory import THREADS
from lowmem.testing.verdicts import Row

Figures = Mapping[str, Mapping[str, int]]  # by node id of the benchmark, then by name of the figure


def current_key() -> Key:
    """Return the key of this process: the kernel that serves it, and torch's minor version."""
    return Key.of_this_process(lowmem.backend().partition(":")[0], THREADS)


def baseline_path(root: Path, key: Key) -> Path:
    """Return where the baseline of a key lies, of a repository's root."""
    return key.path(root / "benchmarks" / "memory")


def store_command() -> str:
    """Return the command that stores this run's figures, for the kernel that was chosen if one was."""
    chosen = os.environ.get(kernels.VARIABLE)
    prefix = f"{kernels.VARIABLE}={chosen} " if chosen else ""
    return f"{prefix}pytest benchmarks --benchmark-disable --store-memory"


def read_baseline(path: Path, key: Key) -> Figures:
    """Read the figures of a baseline.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is damaged, or of another key; the message is one line without the file's name.
    """
    figures: Figures = parse_document(path.read_bytes(), key)["figures"]
    for name, own in figures.items():
        check_figures(name, own)
    return figures


def write_baseline(path: Path, key: Key, figures: Figures) -> None:
    """Write a baseline, whole or not at all, the same bytes for the same figures.

    Raises:
        OSError: it cannot be written; what was there before is whole.
    """
    write_figures(path, key, {name: dict(sorted(own.items())) for name, own in figures.items()})


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
