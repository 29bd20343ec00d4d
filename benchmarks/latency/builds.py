"""Two commits as two wheels, each installed in an environment of its own.

The environments see the torch of the interpreter that runs the gate. Their paths have the same length: a stack that
starts some bytes further on can move a time by percents.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from lowmem.errors import show
from lowmem.kernels.cpu import compiler

# What a wheel is made of, and its kernel.
PACKAGED = ("lowmem", "pytest_lowmem.py", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
COMPILED = ("lowmem/kernels/csrc", "setup.py")
VISIBLE = ("torch", "numpy", "safetensors", "rich")  # the core dependencies, installed once for both sides
KERNEL = "lowmem/kernels/_native"
# In a hook these name the repository of the hook, and win over -C.
OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")


class GateError(Exception):
    """What keeps the gate from a verdict: its text is one line that names the value and the remedy."""


@dataclass(frozen=True)
class Commit:
    """A commit by its full hash, and as it was asked for."""

    sha: str
    asked: str

    def __str__(self) -> str:
        return f"{self.sha[:12]} ({self.asked})"


@dataclass(frozen=True)
class Environment:
    """An interpreter whose ``lowmem`` is one commit's wheel."""

    commit: Commit
    python: Path
    has_kernel: bool


def git(root: Path, *arguments: str) -> str:
    """Return what git prints in a repository."""
    return _git(root, *arguments).decode(errors="replace").strip()


def _git(root: Path, *arguments: str) -> bytes:
    variables = {name: value for name, value in os.environ.items() if name not in OF_A_HOOK}
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise GateError("git is not installed: the gate takes base and head from it") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise GateError(f"git {arguments[0]}: {said[-1]}")
    return done.stdout


def resolve(root: Path, reference: str) -> tuple[Commit, Commit, bool]:
    """Return the merge base of a reference with HEAD, HEAD, and whether the working tree differs from it."""
    try:
        head = git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except GateError as error:
        raise GateError(f"{root} is no git repository with a commit: {error}") from error
    try:
        asked = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    except GateError as error:
        raise GateError(
            f"--base {show(reference)} is no commit of this repository: fetch it, or name another"
        ) from error
    try:
        base = git(root, "merge-base", asked, head)
    except GateError as error:
        raise GateError(
            f"--base {reference!r} and HEAD have no common ancestor: fetch the history (a shallow clone cuts it off)"
        ) from error
    dirty = bool(git(root, "status", "--porcelain"))
    return Commit(base, f"merge base of HEAD and {reference}"), Commit(head, "HEAD"), dirty


def build_wheel(root: Path, commit: Commit, cache: Path, scratch: Path) -> Path:
    """Return a commit's wheel, from the cache where its sources were built before.

    A kernel whose sources were compiled before is not compiled again: setuptools finds it up to date.
    """
    target = cache / "wheels" / _key(root, commit, PACKAGED)
    if built := sorted(target.glob("*.whl")):
        return built[0]
    cache.mkdir(parents=True, exist_ok=True)
    tree = scratch / "tree"
    export(root, commit, tree)
    objects = cache / "kernels" / _key(root, commit, COMPILED)
    _keep_kernel_alone(objects)
    with (tree / "setup.cfg").open("a") as config:
        config.write(f"\n[build]\nbuild_base = {objects.as_posix()}\n")
    log = cache / f"build-{commit.sha[:12]}.log"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", str(tree)]
    # In the cache: the wheel is renamed into its place, which does not work from another file system.
    with tempfile.TemporaryDirectory(prefix="made-", dir=cache) as made, log.open("wb") as out:
        done = subprocess.run([*command, "-w", made], stdout=out, stderr=subprocess.STDOUT, check=False)
        wheels = sorted(Path(made).glob("*.whl"))
        if done.returncode or not wheels:
            raise GateError(f"{commit} does not build: see {log}")
        target.mkdir(parents=True, exist_ok=True)
        wheel = target / wheels[0].name
        wheels[0].replace(wheel)
    shutil.rmtree(tree)
    return wheel


def export(root: Path, commit: Commit, directory: Path) -> None:
    """Write the files of a commit into a directory."""
    with tarfile.open(fileobj=BytesIO(_git(root, "archive", "--format=tar", commit.sha))) as archive:
        # Its own repository's files: what git archived. The filter is there from 3.12 on, and in late 3.11.
        try:
            archive.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        except tarfile.TarError as error:
            raise GateError(f"{commit} cannot be exported: {error}") from error


def install(wheel: Path, commit: Commit, directory: Path) -> Environment:
    """Make an environment that has a wheel, and sees the dependencies of the interpreter that runs this."""
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    _run([sys.executable, "-m", "venv", "--without-pip", str(directory)], f"no environment for {commit}")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    _run([*pip, str(wheel)], f"the wheel of {commit} cannot be installed")
    where = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], "no environment")
    Path(where.strip(), "dependencies.pth").write_text("".join(f"{place}\n" for place in dependencies()))
    with zipfile.ZipFile(wheel) as archive:
        has_kernel = any(name.startswith(KERNEL) and not name.endswith(".pyi") for name in archive.namelist())
    return Environment(commit, python, has_kernel)


def backend(environment: Environment) -> str:
    """Return the kernel that an environment's lowmem chooses on this machine."""
    command = [str(environment.python), "-I", "-c", "import lowmem; print(lowmem.backend())"]
    return _run(command, f"lowmem of {environment.commit} cannot be imported").strip()


def dependencies() -> list[str]:
    """Return the directories that the core dependencies are imported from."""
    places = []
    for name in VISIBLE:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise GateError(f"{name} is not installed beside {sys.executable}: both sides need it")
        places.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(places))


def _key(root: Path, commit: Commit, paths: tuple[str, ...]) -> str:
    """Return what a build depends on, as text: its sources, the interpreter and the compiler."""
    sources = _git(root, "ls-tree", "-r", commit.sha, "--", *paths)
    variables = (os.environ.get(name, "") for name in ("CC", "CFLAGS", "LDFLAGS"))
    beside = [sys.version, sys.platform, _compiler(), *variables]
    return hashlib.sha256(sources + "\0".join(beside).encode()).hexdigest()[:24]


def _compiler() -> str:
    """Return what the C compiler says of its version; nothing where there is none."""
    command = compiler()
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout


def _keep_kernel_alone(objects: Path) -> None:
    """Leave of an earlier build only the compiled kernel, and let it be newer than the sources it was made of."""
    for path in objects.rglob("*") if objects.is_dir() else ():
        if path.suffix in (".so", ".pyd"):
            path.touch()
        elif path.is_file():
            path.unlink()


def _run(command: list[str], otherwise: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise GateError(f"{otherwise}: {said[-1]}")
    return done.stdout
