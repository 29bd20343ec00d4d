"""The list of faults: read it, and say what is wrong with it.

A fault is an entry of a TOML file beside this one::

    [[fault]]
    id = "packing-nibbles-swapped"
    file = "lowmem/quant/packing.py"
    breaks = "unpacking takes the high nibbles for a block's first half"
    find = "torch.cat([block & 15, block >> 4], dim=-1)"      # stands in the file once
    replace = "torch.cat([block >> 4, block & 15], dim=-1)"
    tests = ["tests/quant/test_packing.py"]                         # at least one of which must fail
    select = "portable"                                       # what pytest -k takes; optional
    kernel = "portable"                                       # the kernel that serves; of C files only
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib  # type: ignore[no-redef]

LISTS = Path(__file__).parent
C_SUFFIXES = (".c", ".h")


@dataclass(frozen=True)
class Fault:
    """One change of one file; the fields are those of a list's entry."""

    id: str
    file: str
    breaks: str
    find: str
    replace: str
    tests: tuple[str, ...]
    select: str = ""
    kernel: str = ""

    @property
    def is_c(self) -> bool:
        return self.file.endswith(C_SUFFIXES)

    def planted_in(self, text: str) -> str:
        """Return the text of the file with the fault in it.

        Raises:
            ValueError: what is to be replaced does not stand there once: the list is stale.
        """
        count = text.count(self.find)
        if count != 1:
            raise ValueError(f"{self.id}: find={self.find!r} stands {count} times in {self.file}, and must once")
        return text.replace(self.find, self.replace)


def read_faults(paths: Iterable[Path] | None = None) -> list[Fault]:
    """Read the lists, in the order of their names.

    Raises:
        ValueError: one is no list of faults; it is named.
    """
    found = []
    known = {field.name for field in fields(Fault)}
    for path in sorted(LISTS.glob("*.toml")) if paths is None else paths:
        try:
            entries = tomllib.loads(path.read_text(encoding="utf8"))["fault"]
            for entry in entries:
                if unknown := entry.keys() - known:
                    raise ValueError(f"{entry.get('id', '?')} has {min(unknown)!r}, which no fault has")
                found.append(Fault(**{**entry, "tests": tuple(entry["tests"])}))
        except (KeyError, TypeError, ValueError) as reason:
            raise ValueError(f"{path.name} is no list of faults: {reason}") from reason
    return found


def errors_of(faults: Sequence[Fault], root: Path) -> list[str]:
    """Say what is wrong with a list for the tree at ``root``, a line each; stale faults above all."""
    errors = [f"{name} is there {count} times" for name, count in Counter(f.id for f in faults).items() if count > 1]
    for fault in faults:
        path = root / fault.file
        if not path.is_file():
            errors.append(f"{fault.id}: there is no {fault.file}")
            continue
        try:
            changed = fault.planted_in(path.read_text(encoding="utf8"))
            if not fault.is_c:
                compile(changed, fault.file, "exec")
        except (ValueError, SyntaxError) as reason:
            errors.append(f"{fault.id}: {reason}" if isinstance(reason, SyntaxError) else str(reason))
        if fault.find == fault.replace:
            errors.append(f"{fault.id} changes nothing")
        if not fault.tests:
            errors.append(f"{fault.id} names no tests")
        if fault.is_c != bool(fault.kernel):
            errors.append(f"{fault.id}: kernel={fault.kernel!r}, which faults in C have and others have not")
        errors += [
            f"{fault.id}: there is no {test}"
            for test in fault.tests
            if not (root / test.partition("::")[0]).is_file()
        ]
    return errors
