"""The modules that faults and mutants are of: those that compute, convert, decide or write."""

from __future__ import annotations

from pathlib import Path

FOLDERS = (
    "lowmem",
    *(f"lowmem/{folder}" for folder in ("quant", "kernels", "nn", "transforms", "training", "finetuning")),
    *(
        f"lowmem/{folder}"
        for folder in ("io", "io/foreign", "io/export", "distributed", "testing", "report", "tools")
    ),
    *("benchmarks", "benchmarks/latency"),
)
ALONE = ("pytest_lowmem.py",)

# Beside every __init__.py, which imports others' names.
EXEMPT = {
    "lowmem/kernels/torch_versions.py",  # other branches run on other versions of torch
    "lowmem/__main__.py",  # names of commands
    "lowmem/bignet.py",  # a model that others measure
    "lowmem/tools/language.py",  # its tests need transformers
    "lowmem/tools/language_job.py",  # as well
    "lowmem/tools/startup.py",  # imports
    "lowmem/version.py",  # a constant
    "benchmarks/cases.py",  # models and inputs that others measure
    "benchmarks/conftest.py",  # fixtures of the benchmarks
}


def modules(root: Path) -> list[str]:
    """Return the modules of a tree that compute, convert, decide or write, by their paths from its root."""
    found = [path for folder in FOLDERS for path in (root / folder).glob("*.py")]
    found = [path for path in found if path.name != "__init__.py" and not path.name.startswith("test_")]
    names = [*(path.relative_to(root).as_posix() for path in found), *ALONE]
    return sorted(name for name in names if name not in EXEMPT)
