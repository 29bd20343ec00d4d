"""Do what the guide says, as it is written, as its reader would: a small project, a fresh environment, the wheel.

    python .ci/guide.py [--wheel FILE] [--torch DIRECTORY]

The files of the project are the page's own. Its gates are unknown, stored, pass, fail when the model grows, are
updated and pass again; what the page shows of the failure is what pytest prints. Exit code 0 where all that is so, 1
where it is not, 2 where the wheel cannot be built or installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "gate-your-own-model.md"
FILE = re.compile(r"`([\w./-]+)`:\n\n```\w*\n(.*?)```", re.DOTALL)
SHOWN_FAILURE = re.compile(r"```\n(the memory of .*?)```", re.DOTALL)
SECONDS = 1800  # that a step may take: building the wheel takes minutes


def main(argv: Sequence[str] | None = None) -> int:
    """Try the guide, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="take this wheel instead of building one")
    parser.add_argument(
        "--torch",
        type=Path,
        metavar="DIRECTORY",
        help="a site-packages whose torch the environment sees: it need not be downloaded",
    )
    options = parser.parse_args(argv)
    page = GUIDE.read_text(encoding="utf8")
    with tempfile.TemporaryDirectory() as directory:
        project, environment = Path(directory, "project"), Path(directory, "environment")
        for name, text in FILE.findall(page):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text(text, encoding="utf8")
        try:
            wheel = options.wheel or build_wheel(Path(directory, "wheels"))
            python = make_environment(environment, wheel, options.torch)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"guide: cannot prepare the environment: {error}", file=sys.stderr)
            return 2
        return follow(page, project, python)


def build_wheel(directory: Path) -> Path:
    """Build the wheel of this checkout."""
    run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT)],
        ROOT,
        check=True,
    )
    (wheel,) = directory.glob("lowmem-*.whl")
    return wheel


def make_environment(directory: Path, wheel: Path, torch: Path | None) -> Path:
    """Install the wheel with the guide's extra in a new environment, and return its Python."""
    venv.create(directory, with_pip=True)
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    if torch is not None:
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        place = subprocess.run([python, "-c", purelib], capture_output=True, text=True, check=True).stdout.strip()
        Path(place, "torch_from_elsewhere.pth").write_text(f"{torch.resolve()}\n", encoding="utf8")
    run([str(python), "-m", "pip", "install", f"lowmem[testing] @ {wheel.resolve().as_uri()}"], directory, check=True)
    return python


def follow(page: str, project: Path, python: Path) -> int:
    """Take the guide's steps in a project, and return 0 where each ends as the page says."""
    model = project / "my_model.py"

    def pytest(arguments: str, expected: int) -> str:
        code, output = run([str(python), "-m", "pytest", *shlex.split(arguments)], project)
        if code != expected:
            raise AssertionError(f"`pytest {arguments}` ended with {code}, and the guide says {expected}")
        return output

    try:
        in_actions = only(re.findall(r"- run: pytest (.*)", page), "command of the Actions file")
        stores = only(re.findall(r"^pytest (--lowmem-baseline=\w+)$", page, re.MULTILINE), "command that stores")
        pytest(in_actions, 1)  # nothing is stored yet
        pytest(stores, 0)
        pytest(in_actions, 0)
        model.write_text(model.read_text(encoding="utf8").replace("width=2048", "width=2049"), encoding="utf8")
        output = pytest(in_actions, 1)
        shown = only(SHOWN_FAILURE.findall(page), "failure that the page shows")
        if any_key(shown) not in any_key(output):
            raise AssertionError(f"pytest printed something else than the guide shows:\n{shown}")
        update = re.findall(r"^    pytest (--lowmem-baseline=update .*)$", output, re.MULTILINE)
        updates = only(update, "command that pytest says would update the baseline")
        pytest(updates, 0)
        pytest(in_actions, 0)
    except AssertionError as error:
        print(f"guide: {error}", file=sys.stderr)
        return 1
    print("guide: every step ended as the page says")
    return 0


def only(found: Sequence[str], what: str) -> str:
    """Return what must be there once."""
    if len(found) != 1:
        raise AssertionError(f"there are {len(found)} of what must be there once: the {what}")
    return found[0]


def any_key(text: str) -> str:
    """Return a text without the kernel and the version of torch that name a baseline's file."""
    return re.sub(r"\w+-torch[\d.]+\.json", "KEY.json", text)


def run(command: Sequence[str], directory: Path, check: bool = False) -> tuple[int, str]:
    """Run a command without this checkout on its path, show what it prints, and return exit code and output."""
    print(f"$ {shlex.join(command)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LOWMEM_"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a file that is changed within a second would not be compiled again
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    print(done.stdout, flush=True)
    if check:
        done.check_returncode()
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
