"""Draw names for a stranger to explain: ``python -m tests.drawn_names --peer PATH-OF-A-PACKAGE --peer ...``.

Functions and classes are drawn uniformly, seeded by the commit, and printed as a reader meets them: the file, the
class around, the name and the arguments, without docstring or body. Names of peers are the control. One reader
guesses what each does, and another compares the guesses with the source.
"""

import argparse
import ast
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN, PEERS = 80, 20


def names_in(file: Path, place: str) -> Iterator[str]:
    """Yield "place: class.name(arguments)" of the functions and classes of a file, without dunders."""

    def walk(node: ast.AST, around: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            inner = around
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{around}{child.name}."
                if not child.name.startswith("__"):
                    is_class = isinstance(child, ast.ClassDef)
                    given = ", ".join(map(ast.unparse, child.bases)) if is_class else ast.unparse(child.args)
                    yield f"{place}: {'class' if is_class else 'def'} {around}{child.name}({given})"
            yield from walk(child, inner)

    yield from walk(ast.parse(file.read_text(encoding="utf8")), "")


def names_of(package: Path) -> list[str]:
    """Return the names of all files of a package, in order of their paths."""
    files = sorted(package.rglob("*.py"))
    return [name for file in files for name in names_in(file, file.relative_to(package.parent).as_posix())]


def drawn(package: Path, count: int, seed: str) -> list[str]:
    """Return ``count`` names of a package, the same for the same seed and sources."""
    return random.Random(seed).sample(names_of(package), count)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, action="append", default=[], help="the folder of a peer's package")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    for package, count in [(ROOT / "lowmem", OWN), *((peer, PEERS) for peer in arguments.peer)]:
        print(f"\n{package.name}, drawn with {commit.strip()}\n")
        print(*drawn(package, count, commit.strip()), sep="\n")


if __name__ == "__main__":
    main()
