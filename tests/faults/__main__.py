"""Plant faults in C, one at a time in a copy of the tree, and see that a test fails: ``python -m tests.faults``.

A fault is an entry of ``c.toml``, or of ``triton.toml`` (``--of triton``, where ``TRITON_INTERPRET=1``)::

    [[fault]]
    id = "c-bfloat16-nan"
    file = "lowmem/kernels/csrc/kernel.h"
    breaks = "rounding to bfloat16 turns some NaNs into zeros or infinities"
    find = "return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;"  # stands in the file once
    replace = "return rounded;"
    tests = ["tests/kernels/test_rows.py"]                                # at least one of which must fail
    select = "every_nan and portable"                                     # what pytest -k takes; optional
    kernel = "portable"                                                   # that serves; none for those of Triton
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from lowmem.kernels.native_loader import load_native_module_and_reason
from tests.faults.copies import SOURCE, Change, parser, try_changes

LISTS = {name: Path(__file__).with_name(f"{name}.toml") for name in ("c", "triton")}


def read_faults(path: Path = LISTS["c"], root: Path = SOURCE) -> dict[str, Change]:
    """Return the faults of a list by their ids; a ValueError names an entry that is wrong, or stale."""
    faults: dict[str, Change] = {}
    for entry in tomllib.loads(path.read_text(encoding="utf8"))["fault"]:
        name, file, find, tests = (entry[key] for key in ("id", "file", "find", "tests"))
        text = (root / file).read_text(encoding="utf8")
        if name in faults:
            raise ValueError(f"{name} is there twice")
        if (count := text.count(find)) != 1 or find == entry["replace"]:
            raise ValueError(f"{name}: find={find!r} stands {count} times in {file}, and must once, and be replaced")
        missing = [test for test in tests if not (root / test.partition("::")[0]).is_file()]
        if missing or not tests:
            raise ValueError(f"{name}: there is no {', '.join(missing) or 'test'}")
        shown = f"{name}: {entry['breaks']} ({file})"
        text = text.replace(find, entry["replace"])
        faults[name] = Change(shown, file, text, tuple(tests), entry.get("select", ""), entry.get("kernel", ""))
    return faults


def kernels() -> list[str]:
    """Return the compiled kernels that this processor can run."""
    module, reason = load_native_module_and_reason()
    if module is None:
        raise ValueError(reason)
    return [name for name, runs in module.isas() if runs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where every fault was caught, 1 where one was not, 2 for bad input."""
    options = parser("faults", __doc__)
    options.add_argument("--of", choices=list(LISTS), default="c", help="the list of faults (c)")
    options.add_argument("--only", nargs="+", metavar="ID", help="try these faults alone")
    given = options.parse_args(arguments)
    faults = read_faults(LISTS[given.of])
    if unknown := [name for name in given.only or () if name not in faults]:
        options.error(f"--only {' '.join(unknown)}: choose from {', '.join(faults)}")
    chosen = [faults[name] for name in given.only or faults]
    if given.list:
        print(*(fault.name for fault in chosen), sep="\n")
        return 0
    try:
        have = kernels() if given.of == "c" else [""]
        for fault in chosen:
            if fault.kernel not in have:
                print(f"skipped: this processor has no {fault.kernel}: {fault.name}")
        tried = [fault for fault in chosen if fault.kernel in have]
        return int(bool(try_changes(tried, given.jobs, unoptimized=given.of == "c")))
    except ValueError as reason:
        print(f"faults: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
