"""The list of faults in C, ``c.toml``: read it, and say what is wrong with it.

A fault is an entry::

    [[fault]]
    id = "c-bfloat16-nan"
    file = "lowmem/kernels/csrc/kernel.h"
    breaks = "rounding to bfloat16 turns some NaNs into zeros or infinities"
    find = "return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;"  # stands in the file once
    replace = "return rounded;"
    tests = ["tests/kernels/test_rows.py"]                                # at least one of which must fail
    select = "every_nan and portable"                                     # what pytest -k takes; optional
    kernel = "portable"                                                   # the kernel that serves
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("c.toml")


@dataclass(frozen=True)
class Fault:
    """One change of one file; the fields are those of a list's entry."""

    id: str
    file: str
    breaks: str
    find: str
    replace: str
    tests: tuple[str, ...]
    kernel: str
    select: str = ""

    def planted_in(self, text: str) -> str:
        """Return the text of the file with the fault in it."""
        count = text.count(self.find)
        if count != 1:
            raise ValueError(f"{self.id}: find={self.find!r} stands {count} times in {self.file}, and must once")
        return text.replace(self.find, self.replace)


def read_faults(path: Path) -> list[Fault]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf8"))["fault"]
        return [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    except (KeyError, TypeError, ValueError) as reason:
        raise ValueError(f"{path.name} is no list of faults: {reason}") from reason


def errors_of(faults: Sequence[Fault], root: Path) -> list[str]:
    """Say what is wrong with a list for the tree at ``root``, a line each; stale faults above all."""
    errors = [f"{name} is there {count} times" for name, count in Counter(f.id for f in faults).items() if count > 1]
    for fault in faults:
        path = root / fault.file
        if not path.is_file():
            errors.append(f"{fault.id}: there is no {fault.file}")
            continue
        try:
            fault.planted_in(path.read_text(encoding="utf8"))
        except ValueError as reason:
            errors.append(str(reason))
        if fault.find == fault.replace:
            errors.append(f"{fault.id} changes nothing")
        if not fault.tests:
            errors.append(f"{fault.id} names no tests")
        errors += [
            f"{fault.id}: there is no {test}"
            for test in fault.tests
            if not (root / test.partition("::")[0]).is_file()
        ]
    return errors
