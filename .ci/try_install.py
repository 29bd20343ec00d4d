"""Try the installed lowmem: say what serves, and fail where that is not what it should be.

``python .ci/try_install.py`` needs what lowmem needs, and nothing of the tree that it lies in.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

COMMAND = shutil.which("lowmem", path=sysconfig.get_path("scripts")) or "lowmem"  # Windows: with its suffix
BYTES = {  # that they store
    "bignet": 75_612_160,
    "half_precision": 37_826_560,
    "four_bit": 10_178_560,
    "eight_bit": 19_320_832,
}


def read(*arguments: str) -> dict:
    """Return what a command prints as JSON."""
    done = subprocess.run([COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> int:
    """Return 0, or 1 after a line that says what is wrong."""
    info = read("info")
    print(f"lowmem {info['lowmem']}, torch {info['torch']}, Python {info['python']}, {info['platform']}")
    print(f"{info['location']}: {info['backend']}")
    stored = {row["model"]: row["actual_bytes"] for row in read("stats", *BYTES)}
    print(f"stored bytes: {stored}")

    wrong = []
    if Path(info["location"]).resolve().parent != Path(sysconfig.get_path("platlib")).resolve():
        wrong.append(f"imported from {info['location']}, which is not where it is installed")
    if info["backend"].startswith("reference:") != (sys.platform == "win32"):
        wrong.append("the compiled kernel serves everywhere but on Windows")
    if stored != BYTES:
        wrong.append(f"the models store {BYTES} bytes")
    for line in wrong:
        print(f"try_install: {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
