"""Writing a file whole or not at all, and opening one that is a file indeed."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path

from lowmem.errors import quoted, refusal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "PARTIAL",
    "atomic_file",
    "check_free",
    "check_writable",
    "map_file",
    "open_regular",
    "read_errors",
    "write_atomically",
    "write_errors",
]

PARTIAL = ".lowmem-*.partial"
"""The name of a file that is being written: a pattern for those who list directories."""


def check_writable(path: Path) -> None:
    """Raise an OSError that names ``path`` unless a file can be written there."""
    mode = _mode(path) or stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write {quoted(path)}: it is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise OSError(f"cannot write {quoted(path)}: it is a device or a pipe; name a regular file")
    with write_errors(path), tempfile.TemporaryFile(dir=_target(path).parent):
        pass


def check_free(path: Path) -> None:
    """Raise a FileExistsError if there is anything at ``path``, a dangling link too."""
    if os.path.lexists(path):
        raise FileExistsError(f"{quoted(path)} exists; remove it or choose another name")


@contextmanager
def atomic_file(path: Path, *, overwrite: bool = True) -> Iterator[BufferedRandom]:
    """Open a new file for writing and reading that gets its name ``path`` when the block ends.

    Until then it lies beside it under the name of a partial file. An error or an interruption removes that, and
    leaves what was there before; what a killed process left, the next save to ``path`` removes. A file that is
    replaced keeps its permissions, a new one has those that the umask leaves. What the block itself raises is
    passed on as it is: ``write_errors`` is for it.

    Raises:
        FileExistsError: something is there, or came to be meanwhile, and ``overwrite`` is False.
        OSError: it cannot be written.
    """
    path = _target(path) if overwrite else path
    _remove_leftovers(path)
    mode = _mode(path) if overwrite else None
    with _partial_file(path, 0o666 if mode is None else 0o600) as (file, partial):  # private until it is complete
        yield file
        with write_errors(path):
            file.flush()
            if mode is not None:
                with suppress(OSError):  # not every file system has permissions
                    os.chmod(partial, mode & 0o777)
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open files; elsewhere the lock is held until it is done
                file.close()
            _rename(partial, path, overwrite)
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
            f"cannot write {quoted(path)}: {reason.strerror}; choose a directory that can be written"
        ) from reason


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one that names the file and what to do."""
    try:
        yield
    except OSError as reason:
        raise OSError(f"cannot read {quoted(path)}: {reason.strerror}; name a file that can be read") from reason


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
        raise OSError(f"cannot read {quoted(path)}: it is a directory, a device or a pipe; name a regular file")
    return open(descriptor, "rb")


def map_file(path: Path, file: BufferedReader, size: int) -> mmap.mmap:
    """Map the first ``size`` bytes of a file into memory; what is changed in them is changed there only.

    Raises:
        FileError: the file is shorter.
        OSError: it cannot be mapped.
    """
    try:
        with read_errors(path):
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except ValueError:
        raise refusal(path, "it was cut while it was read; get it again") from None


# A partial file is locked while it is written, and its name says for which file it is: one that is not locked is what
# a killed process left. Where files cannot be locked the name says nothing, and the file is never taken for that.
# Containers of one machine see each other's locks, and so do clients of one NFS server, unless it is mounted with
# local locks.


def _marks(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16] + "-"


@contextmanager
def _partial_file(path: Path, mode: int) -> Iterator[tuple[BufferedRandom, Path]]:
    """Create a file beside ``path``, locked if that is possible; it is gone at the end, if it was not renamed."""
    for marks in (_marks(path), _marks(path), ""):  # the second if another process took the first for a leftover
        partial = path.with_name(PARTIAL.replace("*", marks + secrets.token_hex(8)))
        try:
            with write_errors(path):
                # tempfile's files do not follow the umask
                file = open(partial, "x+b", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
            try:
                if not marks or _lock(file):
                    yield file, partial
                    return
            finally:
                with suppress(OSError):  # flushes again what could not be written
                    file.close()
        finally:
            with suppress(OSError):  # gone when it was renamed
                partial.unlink()


def _lock(file: BufferedRandom) -> bool:
    """Lock a file until it is closed or its process ends; return whether that worked, and the file is still there."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # not every file system can
        return False
    return os.fstat(file.fileno()).st_nlink > 0


def _remove_leftovers(path: Path) -> None:
    """Remove the partial files of ``path`` that nobody writes any more, as far as that is possible."""
    if fcntl is None:
        return
    pattern = re.compile(re.escape(PARTIAL).replace(r"\*", f"{_marks(path)}[0-9a-f]{{16}}"))
    with suppress(OSError):  # the directory cannot be listed
        for name in filter(pattern.fullmatch, os.listdir(path.parent)):
            with suppress(OSError):  # locked, of another user, no file, or gone
                descriptor = os.open(path.with_name(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if stat.S_ISREG(os.fstat(descriptor).st_mode):
                        os.unlink(path.with_name(name))
                finally:
                    os.close(descriptor)


def _mode(path: Path) -> int | None:
    """Return the type and permissions of what is at ``path``, or None."""
    with write_errors(path):
        try:
            return path.stat().st_mode
        except FileNotFoundError:
            return None


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
