"""Base and head of a comparison: each commit in a folder of its own, with the kernel compiled there.

The paths of both folders have the same length: a stack that starts some bytes further on can move a time by percents.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import short_repr
from lowmem.kernels.native_loader import configured_c_compiler_command

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".tox" / "gate-cache"
KERNEL = Path("lowmem/kernels/_native.abi3.so")
OF_THE_KERNEL = ("lowmem/kernels/csrc", "setup.py")
PASSED_ON = ("PATH", "HOME", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LD_LIBRARY_PATH", "LOWMEM_KERNEL")


class GateError(Exception):
    """What keeps the gate from a verdict: its text is one line that names the value and the remedy."""


@dataclass(frozen=True)
class Side:
    """A commit, the folder that holds its built tree, and the kernel that its lowmem chooses on this machine."""

    commit: str  # by its first digits, and as it was asked for
    tree: Path
    kernel: str = ""

    def variables(self, harness: Path, seed: int = 0) -> dict[str, str]:
        """Return the environment variables of a process that runs the side's lowmem and the harness's benchmarks."""
        return {
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            # The processes that wait for their turn must not spin.
            **{"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"},
            "PYTHONPATH": f"{harness}{os.pathsep}{self.tree}",
            "PYTHONHASHSEED": str(seed),
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def git(root: Path, *arguments: str) -> str:
    """Return what git prints in a repository, also where the hook of another repository runs this."""
    kept = {n: value for n, value in os.environ.items() if not n.startswith("GIT_") or n.startswith("GIT_CONFIG")}
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise GateError(f"git {arguments[0]}: {said[-1]}")
    return done.stdout.strip()


def resolve(root: Path, reference: str) -> tuple[str, str]:
    """Return the full hashes of the merge base of a reference with HEAD, and of HEAD."""
    head = git(root, "rev-parse", "--verify", "HEAD^{commit}")
    try:
        asked = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    except GateError as error:
        raise GateError(
            f"--base {short_repr(reference)} is no commit of this repository: fetch it, or name another"
        ) from error
    try:
        return git(root, "merge-base", asked, head), head
    except GateError as error:
        raise GateError(
            f"--base {reference!r} and HEAD have no common ancestor: fetch the history (a shallow clone cuts it off)"
        ) from error


def check_out(root: Path, sha: str, tree: Path) -> None:
    """Check a commit out in a new clone: the repository and its working tree are left alone."""
    git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(tree))
    git(tree, "checkout", "--quiet", "--detach", sha)


def build(root: Path, sha: str, asked: str, tree: Path, cache: Path) -> Side:
    """Check a commit out, and compile its kernel, or take the one that was compiled of the same sources before."""
    check_out(root, sha, tree)
    side = Side(f"{sha[:12]} ({asked})", tree)
    cached = cache / f"{kernel_key(tree)}.so"
    if not cached.exists():
        cache.mkdir(parents=True, exist_ok=True)
        log = cache / f"build-{sha[:12]}.log"
        required = os.environ | {"LOWMEM_REQUIRE_KERNEL": "1"}
        with log.open("wb") as out:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            done = subprocess.run(command, cwd=tree, env=required, stdout=out, stderr=subprocess.STDOUT, check=False)
        if done.returncode or not (tree / KERNEL).exists():
            raise GateError(f"{side.commit} does not build: see {log}")
        shutil.copy(tree / KERNEL, cached.with_suffix(".partial"))
        cached.with_suffix(".partial").replace(cached)
    shutil.copy(cached, tree / KERNEL)
    compileall.compile_dir(tree / "lowmem", quiet=1)
    command = [sys.executable, "-c", "import lowmem; print(lowmem.__file__, lowmem.backend(), sep='\\n')"]
    done = subprocess.run(
        command, cwd=tree.parent, env=side.variables(tree.parent), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise GateError(f"lowmem of {side.commit} cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    place, kernel = done.stdout.split("\n")[:2]
    if not Path(place).is_relative_to(tree):
        raise GateError(f"{side.commit} imports lowmem from {place}, not from {tree}: uninstall that")
    return Side(side.commit, tree, kernel)


def kernel_key(tree: Path) -> str:
    """Return what a kernel depends on, as text: its sources, the interpreter and the compiler."""
    command = configured_c_compiler_command()
    if shutil.which(command[0]) is None:
        raise GateError(f"the C compiler {command[0]!r} is not installed: both sides need it")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    variables = [os.environ.get(name, "") for name in ("CC", "CFLAGS", "LDFLAGS")]
    parts = [git(tree, "ls-tree", "-r", "HEAD", "--", *OF_THE_KERNEL), sys.version, sys.platform, version, *variables]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def machine() -> dict[str, Any]:
    """Return what figures can depend on."""
    return {
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
