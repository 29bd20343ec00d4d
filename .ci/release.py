"""Checks a release, prints its notes, and changes the commands that install lowmem on the day of the first one.

python .ci/release.py check v0.1.0     exit code 1, with a line for each reason, unless the tag can be released
python .ci/release.py notes v0.1.0     print the changes of the version
python .ci/release.py publish          let documentation and errors install lowmem from the package index
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = Path("lowmem/version.py")
DOCUMENTS = ("README.md", "docs/*.md", "docs/guides/*.md", "examples/*.py")
COMMAND = re.compile(r"(pip install\s+(?:-\S+ )*'?)(?:\.|lowmem)(?=\[|'|\s|$)", flags=re.MULTILINE)


def is_published(root: Path) -> bool:
    """Whether a package index has lowmem."""
    return "IS_PUBLISHED = True" in (root / VERSION).read_text()


def documents(root: Path) -> list[Path]:
    """Return the files that tell users how to install lowmem."""
    return sorted(path for pattern in DOCUMENTS for path in root.glob(pattern))


def section(root: Path, tag: str) -> tuple[str, str] | None:
    """Return the date and the text of a version's changes, or None if the change log has no such version."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf8")
    found = re.search(rf"^## \[{re.escape(tag.removeprefix('v'))}\] - (\S+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return None if found is None else (found[1], found[2].strip())


def problems(root: Path, tag: str) -> list[str]:
    """Return why a tag cannot be released."""
    (version,) = re.findall(r'^__version__ = "(.*)"$', (root / VERSION).read_text(), flags=re.MULTILINE)
    changes = section(root, tag)
    reasons = [] if tag == f"v{version}" else [f"tag {tag!r} is not v{version}, the version in {VERSION}"]
    if changes is None:
        reasons.append(f"CHANGELOG.md has no section of {tag}")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", changes[0]):
        reasons.append(f"CHANGELOG.md says {changes[0]!r} where the date of {tag} belongs, as 2027-01-31")
    if not is_published(root):
        reasons.append("documentation and errors install from a checkout: run python .ci/release.py publish")
    return reasons


def publish(root: Path) -> None:
    """Let documentation and errors install lowmem from the package index."""
    for path in documents(root):
        text = path.read_text(encoding="utf8")
        path.write_text(COMMAND.sub(r"\1lowmem", text), encoding="utf8")
    file = root / VERSION
    file.write_text(file.read_text().replace("IS_PUBLISHED = False", "IS_PUBLISHED = True"))


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Run a command; return the exit code."""
    match arguments:
        case ["check", tag]:
            reasons = problems(root, tag)
            print("\n".join(reasons) or f"{tag} can be released")
            return 1 if reasons else 0
        case ["notes", tag]:
            changes = section(root, tag)
            if changes is None:
                print(f"CHANGELOG.md has no section of {tag}", file=sys.stderr)
                return 1
            print(changes[1])
            return 0
        case ["publish"]:
            publish(root)
            return 0
        case ["-h" | "--help"]:
            print(__doc__)
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
