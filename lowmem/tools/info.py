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
from lowmem.kernels.threads import usable_cpu_count
from lowmem.tools.output import escaped_and_truncated, print_json
from lowmem.version import __version__

CPUINFO = Path("/proc/cpuinfo")


def environment_info() -> dict[str, str | int | bool | list[str] | None]:
    """Return versions, platform, processor and the active backend; None for what cannot be determined."""
    cuda = torch.cuda.is_available()
    return {
        "lowmem": __version__,
        "location": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model_name_or_none(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: _package_version_or_none(name) for name in ("torch", "numpy", "safetensors", "rich")},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_available": cuda,
        "cuda_devices": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
        "backend": backend(),
        "cuda_backend": gpu.cuda_backend_description(),
    }


def info_value_text(value: object) -> str:
    """Return a fact as text."""
    return ", ".join(value) or "none" if isinstance(value, list) else "unknown" if value is None else str(value)


def _cpu_model_name_or_none() -> str | None:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        # Not Linux
        match = None
    return match[1] if match else platform.processor() or None


def _package_version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # Copied or bundled without metadata
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    environment = environment_info()
    if arguments.json:
        print_json(environment)
        return 0
    for name, value in environment.items():
        print(f"{name.replace('_', ' '):<16}{escaped_and_truncated(info_value_text(value))}")
    return 0
