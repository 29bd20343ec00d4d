"""Compares the memory that ``lowmem fit`` of folders takes with what is left: rows of a step are split, or the run is
refused before it starts, with the options that would make it fit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.errors import FileError
from lowmem.kernels.threads import iterate_cgroup_folders
from lowmem.nn.techniques import FourBit, blockwise_technique
from lowmem.quant.formats import DEFAULT
from lowmem.tools.fit_dry_run import plan_and_peak_bytes
from lowmem.tools.fit_job import FineTuningJob
from lowmem.tools.output import mib_text

LEAST_LENGTH = 64
"""Tokens: shorter rows are not suggested."""


def available_memory_or_none(filesystem_root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take without swapping; None where the system does not tell.

    That is what the machine has left, and what is left in the control group of the process and in those above it,
    which containers set by ``--memory``. Pages of files that can be dropped count as left (Linux's cgroup-v2.rst,
    "memory.max"; memory.rst for version 1). ``filesystem_root`` is that of the file system.
    """
    try:
        machine = (filesystem_root / "proc/meminfo").read_text()
    except OSError:
        # Not Linux
        return None
    amounts = [int(kib) * 1024 for kib in re.findall(r"^MemAvailable: *(\d+) kB$", machine, re.MULTILINE)]
    for folder, is_version_1 in iterate_cgroup_folders(filesystem_root, "memory"):
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_version_1 else ("memory.max", "memory.current")
        )
        try:
            limit, used, statistics = ((folder / name).read_text().strip() for name in (*names, "memory.stat"))
        except OSError:
            # A container sees only its own groups, and the root has no limit
            continue
        if limit != "max":
            total = "total_" if is_version_1 else ""
            droppable = re.findall(rf"^{total}inactive_file (\d+)$", statistics, re.MULTILINE)
            amounts.append(max(0, int(limit) - int(used) + sum(map(int, droppable))))
    return min(amounts, default=None)


def split_rows_or_refuse(job: FineTuningJob) -> FineTuningJob:
    """Return the job with as many rows at a time as memory has room for.

    An upper bound is planned without computing; only where that does not fit, steps are measured as by ``--dry-run``.

    Args:
        job: on the CPU, of this process alone.

    Raises:
        ValueError: it does not fit; options that would make it fit are named with what they take.
    """
    available = available_memory_or_none()
    if available is None:
        return job
    try:
        if plan_and_peak_bytes(job, is_measured=False)[1] <= available:
            return job
    except FileError:
        raise
    except ValueError as reason:
        # Of a model that trains, and whose operators do not run without numbers
        print(f"lowmem fit: the memory that training takes is not known: {reason}", file=sys.stderr)
        return job
    left = f"{mib_text(available)} MiB of memory are left"
    print(f"lowmem fit: {left}: a dry run measures what a step takes", file=sys.stderr)
    smaller, needed = job, plan_and_peak_bytes(job)[1]
    rows = job.settings.batch_size * job.settings.accumulate
    while needed > available and smaller.settings.batch_size > 1:
        batch_size = next(size for size in range(smaller.settings.batch_size // 2, 0, -1) if rows % size == 0)
        settings = replace(job.settings, batch_size=batch_size, accumulate=rows // batch_size)
        smaller = replace(job, settings=settings)
        needed = plan_and_peak_bytes(smaller)[1]
    if needed > available:
        raise ValueError(_refusal(smaller, needed, available))
    if smaller is not job:
        print(
            f"lowmem fit: {smaller.settings.batch_size} of {job.settings.batch_size} rows are computed at a time, "
            f"which takes {mib_text(needed)} MiB",
            file=sys.stderr,
        )
    return smaller


def _refusal(job: FineTuningJob, needed_bytes: int, available_bytes: int) -> str:
    """Return the error of a job that does not fit, with what each option takes that would make it fit."""
    takes = {options: plan_and_peak_bytes(smaller)[1] for options, smaller in _smaller_jobs(job)}
    fitting = [f"{options} takes {mib_text(size)} MiB" for options, size in takes.items() if size <= available_bytes]
    least = min(takes.items(), key=lambda item: item[1], default=("", 0))
    remedy = "; ".join(fitting) or f"the least is {mib_text(least[1])} MiB, with {least[0]}: take a smaller model"
    return (
        f"training takes {mib_text(needed_bytes)} MiB of memory, and {mib_text(available_bytes)} MiB are left: "
        f"{remedy if takes else 'take a smaller model'}; or add --anyway to try"
    )


def _smaller_jobs(job: FineTuningJob) -> Iterator[tuple[str, FineTuningJob]]:
    """Yield options with the job that they make: each alone, and all together."""
    options: dict[str, dict[str, Any]] = {}
    if job.compares_dense:
        options["leaving out --compare-dense"] = {"compare_dense": False}
    if job.memory_mode != "lean":
        options["--memory lean"] = {"memory_mode": "lean"}
    if job.length // 2 >= LEAST_LENGTH:
        options[f"--length {job.length // 2}"] = {"length": job.length // 2}
    if job.is_dense and not isinstance(job.technique, FourBit):
        options[f"--format {DEFAULT}"] = {"technique": blockwise_technique(None)}
    for name, changes in options.items():
        yield name, replace(job, **changes)
    if len(options) > 1:
        together = {key: value for changes in options.values() for key, value in changes.items()}
        yield " ".join(options), replace(job, **together)
