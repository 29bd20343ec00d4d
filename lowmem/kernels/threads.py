"""How many CPUs this process may use: those of its affinity, within the quota of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpu_count(filesystem_root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may use, at least 1.

    Affinity is what ``taskset`` and ``sched_setaffinity`` leave. A quota is ``cpu.max`` of a control group, which
    containers set by ``--cpus``; 1.5 CPUs count as 2. Neither is known outside Linux: all CPUs count there.
    ``filesystem_root`` is that of the file system.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(quota) for quota in _cgroup_cpu_quotas(filesystem_root))]))


def _cgroup_cpu_quotas(filesystem_root: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of this process's control groups and of all groups above them (Linux's
    cgroup-v2.rst, "cpu.max"; sched-bwc.rst for version 1)."""
    for folder, is_version_1 in iterate_cgroup_folders(filesystem_root, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_version_1 else ("cpu.max",)
        try:
            quota, period, *_ = " ".join((folder / name).read_text() for name in names).split()
        except OSError:
            # A container sees only its own groups, and the root has no quota
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)


def iterate_cgroup_folders(filesystem_root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of this process's control groups and of all above them, each with whether it is version 1.

    ``controller`` is "cpu" or "memory"; a folder may be missing.
    """
    try:
        groups = (filesystem_root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        # Not Linux
        return
    for controllers, path in (line.split(":", 2)[1:] for line in groups if line.count(":") >= 2):
        if controllers and controller not in controllers.split(","):
            continue
        mounted = filesystem_root / "sys/fs/cgroup" / (controller if controllers else "")
        group = Path(path)
        for above in (group, *group.parents):
            yield mounted / above.relative_to("/"), bool(controllers)
