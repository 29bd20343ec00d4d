"""``lowmem info``: versions, processor and kernel, for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lowmem.kernels import backend, gpu
from lowmem.kernels.threads import usable_cpus
from lowmem.tools.output import print_json, shown
from lowmem.version import __version__

CPUINFO = Path("/proc/cpuinfo")


def facts() -> dict[str, str | int | bool | list[str] | None]:
    """Return versions, platform, processor and the active backend; None for what cannot be determined."""
    cuda = torch.cuda.is_available()
    return {
        "lowmem": __version__,
        "location": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        **{name: _version(name) for name in ("torch", "numpy", "safetensors", "rich")},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_available": cuda,
        "cuda_devices": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
        "backend": backend(),
        "cuda_backend": gpu.describe(),
    }


def text_of(value: object) -> str:
    """Return a fact as text."""
    return ", ".join(value) or "none" if isinstance(value, list) else "unknown" if value is None else str(value)


def _cpu() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # copied or bundled without metadata
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    found = facts()
    if arguments.json:
        print_json(found)
        return 0
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<16}{shown(text_of(value))}")
    return 0
