"""Loads the compiled CPU kernel (``csrc/``), or says why there is none."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem.kernels.threads import usable_cpu_count
from lowmem.version import reinstall_command

# Missing in wheels
SOURCES = Path(__file__).with_name("csrc")


@lru_cache(maxsize=1)
def load_native_module_and_reason() -> tuple[ModuleType | None, str]:
    """Return the compiled module and how it computes; or None and why it cannot be imported."""
    try:
        import lowmem.kernels._native as _native
    except ImportError as reason:
        said = missing_kernel_warning_or_none(reason, sys.platform)
        if said is not None and os.environ.get("LOWMEM_KERNEL") != "reference":
            warnings.warn(said, stacklevel=2)
        return None, missing_kernel_reason(reason, sys.platform)
    # From torch 2.10 on
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
    _native.use_torch(Tensor, Parameter, table, torch._C._to_dlpack, scratch)
    return _native, f"compiled C on {_limit_threads_and_describe(_native)}"


def _limit_threads_and_describe(native: Any) -> str:
    """Let C use torch's threads, as many as there are cores for this process; return which threads C uses."""
    package = Path(torch.__file__).parent
    bundled = [*(package / "lib").glob("lib*omp*"), *(package.parent / "torch.libs").glob("lib*omp*")]
    libraries = [*sorted(map(str, bundled)), "libgomp.so.1", "libomp.so", "libiomp5.so"]
    native.limit_threads(usable_cpu_count(), True)
    if any(native.share_threads(path) for path in libraries):
        return "torch's threads"
    return "one thread, since torch's OpenMP library was not found"


def missing_kernel_warning_or_none(import_error: object, platform: str) -> str | None:
    """Return the warning for a missing kernel, with its remedy; None where setup.py compiles no kernel."""
    if platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        # setup.py compiles none
        return None
    slow = "plain torch serves, up to 30 times slower"
    if not SOURCES.is_dir():
        remedy = f"install a C compiler, and then: {reinstall_command()}; or set LOWMEM_KERNEL=reference"
        return f"lowmem is installed without its compiled kernel ({import_error}): {slow}; {remedy}"
    if shutil.which(configured_c_compiler_command()[0]) is None:
        return None
    return (
        f"lowmem runs from its source tree, which has no compiled kernel: {slow}; compile it with: pip install -e ."
    )


def configured_c_compiler_command() -> list[str]:
    """Return the command of the C compiler that an installation from source runs."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def missing_kernel_reason(import_error: object, platform: str) -> str:
    """Return why there is no compiled kernel, with the remedy on ``platform`` (as ``sys.platform`` names it)."""
    remedy = "lowmem has none on Windows" if platform == "win32" else "installing from source needs a C compiler"
    return f"the compiled kernel cannot be imported ({import_error}); {remedy}"
