"""Checks a release, prints its notes, and changes the commands that install lowmem on the day of the first one.

python .ci/release.py check v0.1.0     exit code 1, with a line for each reason, unless the tag can be released
python .ci/release.py check v0.1.0 dist/*    and unless all links of what was built lead somewhere there
python .ci/release.py green ci.json    exit code 1 unless CI has succeeded, as `gh run list --json` prints it
python .ci/release.py notes v0.1.0     print the changes of the version
python .ci/release.py publish          let documentation and errors install lowmem from the package index
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = Path("lowmem/version.py")
DOCUMENTS = ("README.md", "docs/*.md", "docs/guides/*.md", "examples/*.py")
COMMAND = re.compile(r"(pip install\s+(?:-\S+ )*'?)(?:\.|lowmem)(?=\[|'|\s|$)", flags=re.MULTILINE)


LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
"""A link or picture of Markdown, or of HTML in it."""


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
    if not address(root):
        reasons.append(f"ADDRESS in {VERSION} is empty: links of README.md would lead nowhere on the package index")
    return reasons


def address(root: Path) -> str:
    """Return the project's address; "" before it is known."""
    (found,) = re.findall(r'^ADDRESS = "(.*)"$', (root / VERSION).read_text(), flags=re.MULTILINE)
    return str(found)


def description(dist: Path) -> str:
    """Return what the package index shows of a wheel or a source distribution."""
    if dist.suffix == ".whl":
        with zipfile.ZipFile(dist) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = archive.read(name)
    else:
        with tarfile.open(dist) as archive:
            metadata = archive.extractfile(f"{dist.name.removesuffix('.tar.gz')}/PKG-INFO").read()
    return metadata.decode().partition("\n\n")[2]


def dead_links(root: Path, tag: str, dist: Path) -> list[str]:
    """Return a line for each link or picture of a distribution's description that leads nowhere."""
    found = [one or other for one, other in LINK.findall(description(dist))]
    reasons = [] if found else [f"{dist.name} has a description without links"]
    for target in found:
        own = re.fullmatch(rf"{re.escape(address(root))}/(?:blob|raw)/([^/]+)/([^#]+)(?:#.*)?", target)
        if own and (own[1] != tag or not (root / own[2]).is_file()):
            reasons.append(f"{dist.name}: {target} is no file of {tag}")
        elif not own and not target.startswith(("https://", "#")):
            reasons.append(f"{dist.name}: {target} leads nowhere on the package index")
    return reasons


def unfinished(runs: list[dict[str, str]]) -> list[str]:
    """Return why CI has not succeeded for a commit, of the runs that it has had there, the newest first."""
    if not runs:
        return ["CI has not run on main for this commit: push it to main, and wait for CI"]
    newest = runs[0]
    if newest["conclusion"] == "success":
        return []
    state = newest["conclusion"] or newest["status"]
    return [f"CI is not green for this commit ({state}): {newest['url']}; tag a green one, or run this again"]


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
        case ["check", tag, *dists]:
            reasons = problems(root, tag) + [line for dist in dists for line in dead_links(root, tag, Path(dist))]
            print("\n".join(reasons) or f"{tag} can be released")
            return 1 if reasons else 0
        case ["green", file]:
            reasons = unfinished(json.loads(Path(file).read_text()))
            print("\n".join(reasons) or "CI is green")
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
