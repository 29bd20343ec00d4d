"""``lowmem bundle``: packs a directory into one runnable, verifiable and reproducible zip, whose bytes depend only on
the names and contents of the files: sorted, of one date and mode, and not compressed."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from lowmem.io.filesystem import PARTIAL_GLOB, check_not_exists, write_atomically
from lowmem.tools.output import escaped_and_truncated

MANIFEST = "MANIFEST.sha256"
# The comment of each bundle, by which later bundles leave it out
COMMENT = b"made by lowmem bundle"

# Names that are left out: caches, other programs' records, build products, compiled code (it depends on the machine,
# and cannot be imported from a zip), and the usual names of passwords and private keys. A project's top-level build
# and dist are left out, too, unless they are packages.
EXCLUDED_NAMES = (
    *("__pycache__", "*.py[cod]", "*.so", "*.so.*", "*.dylib", "*.dll", "*.o", "*.a", "*.egg-info", ".eggs"),
    *(".git", ".hg", ".svn", ".tox", ".nox", ".venv", "venv", "node_modules"),  # and directories with a pyvenv.cfg
    *(".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".benchmarks", ".ipynb_checkpoints"),
    *(".coverage", ".coverage.*", "htmlcov", ".DS_Store", "Thumbs.db", "*.swp", "*~", PARTIAL_GLOB),
    *(".env", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".aws", ".gnupg", ".kube", ".ssh"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519"),
)

# A manifest escapes backslashes and line ends; lone surrogates are not valid UTF-8.
UNPORTABLE_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")

MAIN_TEMPLATE = '''\
"""Runs the bundled package: python BUNDLE.zip ..."""

import runpy

runpy.run_module("{package}", run_name="__main__")
'''


def read_project_files_by_path(directory: str) -> dict[str, bytes]:
    """Return the contents of a project's files by their paths with slashes; those of a package begin with its name.

    Raises:
        ValueError: it is no directory, no files are left, or a link, name or type of file is not portable.
        OSError: a file cannot be read.
    """
    # Path("") would be the current directory
    if not os.path.isdir(directory):
        raise ValueError(f"directory={directory!r} is no directory; name a package, or a directory that holds one")
    root = Path(os.path.realpath(directory))
    package = os.path.isfile(root / "__init__.py")
    products = () if package else (root / "build", root / "dist")
    base = root.parent if package else root
    files = {}
    path = root
    try:
        for path in _iterate_included_files(root, products):
            _check_portable_file(path, root)
            content = path.read_bytes()
            if not (path.suffix.lower() == ".zip" and content.endswith(COMMENT)):
                files[path.relative_to(base).as_posix()] = content
    except OSError as reason:
        where = reason.filename or str(path)
        raise OSError(f"cannot read {where!r}: {reason.strerror}; make it readable or remove it") from reason
    if not files:
        raise ValueError(f"directory={directory!r} has no files besides caches and others that are always left out")
    return files


def _iterate_included_files(directory: Path, excluded_build_directories: Collection[Path]) -> Iterator[Path]:
    """Yield all paths except directories and ``EXCLUDED_NAMES``; links to directories are yielded, not followed."""
    for path in sorted(directory.iterdir()):
        if any(fnmatchcase(path.name, pattern) for pattern in EXCLUDED_NAMES) or os.path.isfile(path / "pyvenv.cfg"):
            continue
        if path in excluded_build_directories and path.is_dir() and not os.path.isfile(path / "__init__.py"):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _iterate_included_files(path, excluded_build_directories)
        else:
            yield path


def _check_portable_file(path: Path, root: Path) -> None:
    if UNPORTABLE_CHARACTERS.search(str(path.relative_to(root.parent))):
        raise ValueError(f"file={str(path)!r}: not every system can unzip this name; rename it")
    if path.is_symlink():
        _check_link_to_file_inside_root(path, root)
    elif not path.is_file():
        raise ValueError(f"file={str(path)!r} is neither a file nor a directory; take it out of the directory")


def _check_link_to_file_inside_root(link: Path, root: Path) -> None:
    target = Path(os.path.realpath(link))
    if not os.path.exists(target):
        where = "nowhere"
    elif target.is_dir():
        where = "to a directory"
    elif not target.is_relative_to(root):
        where = "outside the directory that is bundled"
    else:
        return
    raise ValueError(f"link={str(link)!r} points {where}; replace it by a copy of its target, or remove it")


def files_with_main_module(files: Mapping[str, bytes], directory: str) -> dict[str, bytes]:
    """Return the files with a top-level ``__main__.py``: their own, or one that runs their only package."""
    if "__main__.py" in files:
        return dict(files)
    split = [name.partition("/") for name in files]
    packages = [top for top, _, rest in split if rest == "__main__.py" and f"{top}/__init__.py" in files]
    packages = sorted(filter(str.isidentifier, packages))
    if not packages:
        raise ValueError(
            f"directory={directory!r} has nothing to run; add a __main__.py to its top, or to a package "
            "(a directory with an __init__.py) that is the directory or lies right in it"
        )
    if len(packages) > 1:
        raise ValueError(
            f"directory={directory!r} has several packages to run: {', '.join(packages)}; bundle one of them, "
            "or add a __main__.py to the top that chooses"
        )
    return {**files, "__main__.py": MAIN_TEMPLATE.format(package=packages[0]).encode()}


def zip_bytes_with_manifest(files: Mapping[str, bytes]) -> bytes:
    """Return a zip of the files and a manifest of their SHA-256 digests, which replaces an existing manifest."""
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files) if name != MANIFEST]
    files = {**files, MANIFEST: "".join(lines).encode()}
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as bundle:
        bundle.comment = COMMENT
        for name in sorted(files):
            entry = ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            # Unix, on every system: determines the meaning of external_attr
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            bundle.writestr(entry, files[name])
    return buffer.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("directory", metavar="DIRECTORY", help="a package, or a directory with one package to run")
    parser.add_argument("name", metavar="NAME", help="write NAME.zip, which must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    name, directory = arguments.name, arguments.directory
    if os.path.basename(name).lower() in ("", ".", "..", ".zip"):
        raise ValueError(f"name={name!r} must end in a file name, such as project_bundle")
    destination = Path(name if name.lower().endswith(".zip") else f"{name}.zip")
    check_not_exists(destination)
    files = files_with_main_module(read_project_files_by_path(directory), directory)
    payload = zip_bytes_with_manifest(files)
    write_atomically(destination, payload, overwrite=False)
    count = len({*files, MANIFEST})
    digest = hashlib.sha256(payload).hexdigest()
    print(
        f"{escaped_and_truncated(str(destination))}: {count} files, {len(payload)} bytes, sha256 {digest}",
        file=sys.stderr,
    )
    return 0
