"""Compile the C library of a tree without optimization: what a fault does not change is compiled once."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

CSRC = Path("lowmem/kernels/csrc")
LIBRARY = Path("lowmem/kernels/_native.abi3.so")

FLAGS = ("-std=gnu11", "-ffp-contract=off", "-O0", "-g0", "-w", "-fPIC")


class BuildError(Exception):
    """C files cannot be compiled, or the library cannot be loaded."""


def compile_all(tree: Path, objects: Path) -> None:
    """Compile every C file of a tree into ``objects``, but what is there already and newer than all sources."""
    objects.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in (tree / CSRC).iterdir())
    for unit in sorted((tree / CSRC).glob("*.c")):
        made = objects / f"{unit.stem}.o"
        if not made.exists() or made.stat().st_mtime <= newest:
            compile_unit(unit, made)


def compile_unit(unit: Path, made: Path) -> None:
    """Compile one C file; the object gets its name when it is whole."""
    partial = made.with_suffix(".partial")
    _gcc("-c", str(unit), "-o", str(partial))
    partial.replace(made)


def rebuild(tree: Path, objects: Path, file: str, kernel: str, scratch: Path) -> None:
    """Link a tree's library anew, with what the binding and the kernel that serves make of a changed file.

    ``objects`` holds those of the unchanged files, and ``scratch`` gets the new ones.
    """
    scratch.mkdir(exist_ok=True)
    made = {path.name: path for path in sorted(objects.glob("*.o"))}
    units = [tree / CSRC / f"{name}.c" for name in ("module", kernel)]
    changed = [unit for unit in units if file == unit.name or file in _included(unit)]
    if not changed:
        raise BuildError(f"neither module.c nor {kernel}.c includes {file}")
    for unit in changed:
        made[f"{unit.stem}.o"] = scratch / f"{unit.stem}.o"
        compile_unit(unit, made[f"{unit.stem}.o"])
    link(tree, list(made.values()))


def link(tree: Path, objects: Sequence[Path]) -> None:
    """Make a tree's library of objects."""
    options = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    library = tree / LIBRARY
    library.unlink(missing_ok=True)  # a process that has mapped it keeps what it has
    _gcc("-shared", *options, *map(str, objects), "-o", str(library))


def kernels(tree: Path) -> list[str]:
    """Return the compiled kernels of a tree that this processor can run."""
    script = "from lowmem.kernels.native import load; print(*(name for name, runs in load()[0].isas() if runs))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the compiled kernel cannot be loaded: {done.stderr.strip()[-300:]}")
    return done.stdout.split()


def _included(unit: Path) -> set[str]:
    return {Path(word).name for word in _gcc("-MM", str(unit)).split()}


def _gcc(*arguments: str) -> str:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    command = [*compiler, *FLAGS, "-I", sysconfig.get_paths()["include"], *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as reason:
        raise BuildError(f"the C compiler {compiler[0]!r} cannot be run ({reason.strerror}): install one") from reason
    if done.returncode:
        raise BuildError(done.stderr.strip() or f"{compiler[0]} ended with {done.returncode}")
    return done.stdout
