"""Build the source distribution, and the wheel from it; try what is installed from each in a fresh environment.

    python .ci/dists.py DIRECTORY

Both are left in the directory. The environments see the torch of the interpreter that runs this, and nothing is
downloaded. Exit code 0 where all of it works, 1 where something does not, 2 where nothing can be built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/quant/test_packing.py", "tests/io/test_lowmem_file.py", "tests/tools/test_stats.py")
NEEDED = (
    "conftest.py",
    "examples/digits.py",
    "tests/conftest.py",
    "tests/strategies.py",
    "docs/format.md",
    "tox.ini",
    "benchmarks/cases.py",
    "README.md",
)


def main() -> int:
    """Return the exit code."""
    if len(sys.argv) != 2:
        print("usage: python .ci/dists.py DIRECTORY", file=sys.stderr)
        return 2
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        try:
            run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)], ROOT)
        except subprocess.CalledProcessError as error:
            print(f"dists: the build ended with exit code {error.returncode}", file=sys.stderr)
            return 2
        (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
        wrong = what_is_wrong_inside(sdist, wheel)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        tree = folder / sdist.name.removesuffix(".tar.gz")
        shutil.rmtree(tree / "lowmem")  # so that its tests import what is installed
        for dist in (wheel, sdist):
            try:
                try_in_fresh_environment(dist, folder / f"with-{dist.suffix[1:]}", tree)
            except subprocess.CalledProcessError as error:
                wrong.append(f"{dist.name}: {' '.join(map(str, error.cmd[1:4]))} ended with {error.returncode}")
        target.mkdir(parents=True, exist_ok=True)
        for dist in (wheel, sdist):
            shutil.copy2(dist, target)
    for line in wrong:
        print(f"dists: {line}", file=sys.stderr)
    return bool(wrong)


def what_is_wrong_inside(sdist: Path, wheel: Path) -> list[str]:
    """Return a line for each file that is missing, or one too many."""
    names = zipfile.ZipFile(wheel).namelist()
    wrong = [f"the wheel holds the C source {name}" for name in names if name.endswith((".c", ".h"))]
    if not any(name.startswith("lowmem/kernels/_native") and not name.endswith(".pyi") for name in names):
        wrong.append("the wheel holds no compiled kernel")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    return wrong + [f"the source distribution lacks {name}" for name in (*NEEDED, *TESTS) if name not in inside]


def try_in_fresh_environment(dist: Path, directory: Path, tree: Path) -> None:
    """Install a distribution in a new environment; run its command, and tests of the source distribution."""
    venv.create(directory)  # whose own setuptools, of older Pythons, would be too old
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(place, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf8")
    install = ["install", "--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall", str(dist)]
    run([sys.executable, "-m", "pip", "--python", str(python), *install], directory)
    run([str(python), str(ROOT / ".ci" / "try_install.py")], directory)
    run([str(python), "-m", "lowmem", "stats"], directory)
    run([str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], tree)


def run(command: list[str], directory: Path) -> None:
    """Run a command that has to end well, its output shown."""
    print("$", *command, flush=True)
    subprocess.run(command, cwd=directory, env={**os.environ, "LOWMEM_REQUIRE_KERNEL": "1"}, check=True)


if __name__ == "__main__":
    sys.exit(main())
