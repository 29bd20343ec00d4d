"""Writing a file whole or not at all, and opening one that is a file indeed."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path

__all__ = [
    "PARTIAL",
    "atomic_file",
    "check_free",
    "check_writable",
    "open_regular",
    "printable",
    "read_errors",
    "write_atomically",
    "write_errors",
]

PARTIAL = ".lowmem-*.partial"
"""What a file that is being written is called, for those who list directories."""


def printable(text: str, limit: int = 200) -> str:
    r"""Return text of any origin as a message or a table can show it: one line of at most ``limit`` characters.

    Control, bidirectional and other invisible characters and lone surrogates are written as ``\x1b`` or ``\u202e``,
    and ``...`` takes the place of the middle of what is too long. Backslashes stay, so that escaped text does too.
    """
    if len(text) > 2 * limit:  # don't escape what is cut out below
        text = text[:limit] + text[-limit:]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > limit:
        head = (limit - 3) // 2
        text = f"{text[:head]}...{text[head + 3 - limit :]}"
    return text


def check_writable(path: Path) -> None:
    """Raise an OSError that names ``path`` unless a file can be written there."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {str(path)!r}: it is a device or a pipe; name a regular file")
    with write_errors(path), tempfile.TemporaryFile(dir=_target(path).parent):
        pass


def check_free(path: Path) -> None:
    """Raise a FileExistsError if there is anything at ``path``, a dangling link too."""
    if os.path.lexists(path):
        raise FileExistsError(f"{str(path)!r} exists; remove it or choose another name")


@contextmanager
def atomic_file(path: Path, *, overwrite: bool = True) -> Iterator[BufferedRandom]:
    """Open a new file for writing and reading that gets its name ``path`` when the block ends.

    Until then it lies beside it under the name of a partial file; an error or an interruption removes that, and
    leaves what was there before. What the block itself raises is passed on as it is: ``write_errors`` is for it.

    Raises:
        FileExistsError: something is there, or came to be meanwhile, and ``overwrite`` is False.
        OSError: it cannot be written.
    """
    path = _target(path) if overwrite else path
    partial = path.with_name(PARTIAL.replace("*", secrets.token_hex(8)))
    try:
        with write_errors(path):
            file = open(partial, "x+b")  # noqa: SIM115  tempfile's files do not follow the umask
        try:
            yield file
            with write_errors(path):
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(OSError):  # flushes again what could not be written
                file.close()
        with write_errors(path):
            _rename(partial, path, overwrite)
    finally:
        with suppress(OSError):  # gone when it was renamed
            partial.unlink()
    _sync_directory(path.parent)


def write_atomically(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a file; an error or an interruption leaves what was there before.

    Raises:
        FileExistsError: something is there, or came to be meanwhile, and ``overwrite`` is False.
        OSError: it cannot be written.
    """
    with atomic_file(path, overwrite=overwrite) as file, write_errors(path):
        file.write(content)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one that names the file and what to do, but a FileExistsError."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as reason:
        raise OSError(
            f"cannot write {str(path)!r}: {reason.strerror}; choose a directory that can be written"
        ) from reason


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one that names the file and what to do."""
    try:
        yield
    except OSError as reason:
        raise OSError(f"cannot read {str(path)!r}: {reason.strerror}; name a file that can be read") from reason


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without waiting where it is a pipe.

    Raises:
        OSError: there is none, it is no regular file, or it cannot be read.
    """
    with read_errors(path):
        # O_NONBLOCK: a pipe opens at once, and is then refused; regular files know no such thing.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"cannot read {str(path)!r}: it is a directory, a device or a pipe; name a regular file")
    return open(descriptor, "rb")


def _rename(partial: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(partial, path)
        return
    try:
        os.link(partial, path)  # unlike a rename, never overwrites
    except OSError:  # it exists, or this file system has no hard links
        check_free(path)
        os.rename(partial, path)


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # not every system can: the file is whole, its new name may be lost in a crash
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))  # a link stays, and what it points to is written
