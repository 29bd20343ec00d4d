"""Atomic writes, and opening regular files only."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from lowmem.errors import WriteError, printable, quoted, refusal, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")

PARTIAL = ".lowmem-*.partial"
"""Glob pattern of the names of files and folders that are being written."""


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
    """Raise a FileExistsError if anything is at ``path``, also a dangling symbolic link."""
    if os.path.lexists(path):
        raise FileExistsError(f"{quoted(path)} exists; remove it or choose another name")


def check_outside(path: Path, inputs: Mapping[str, Path | None], name: str = "OUT") -> None:
    """Raise a ValueError if a path to write is one of the inputs, or lies in one that is a folder.

    Links, relative paths, and upper and lower case are followed as the file system does.

    Args:
        path: to write; nothing may be there yet.
        inputs: by the names that the error gives them; None is left out.
        name: of ``path``, for the error.
    """
    place = _target(path)
    for known, given in inputs.items():
        if given is not None and _is_same(place, given):
            raise ValueError(f"{name}={quoted(path)} is {known}, which would be lost: name another place")
        if given is not None and any(_is_same(parent, given) for parent in place.parents):
            raise ValueError(
                f"{name}={quoted(path)} lies in {known}={quoted(given)}, which it would change: name a place outside"
            )


@contextmanager
def atomic_file(path: Path, *, overwrite: bool = True) -> Iterator[BufferedRandom]:
    """Open a new file for writing and reading that is renamed to ``path`` when the block ends.

    Until then it is a partial file in the same directory; an error or interruption removes it and leaves the old file
    as it was. What killed processes have left in the directory is removed, where files can be locked. A replaced file
    keeps its permissions; a new file gets those of the umask. Errors of the block are passed on unchanged: wrap its
    writes in ``write_errors``.

    Raises:
        FileExistsError: ``overwrite`` is False and ``path`` exists, or was created meanwhile.
        OSError: the file cannot be written.
    """
    path = _target(path) if overwrite else path
    mode = _mode(path) if overwrite else None

    def make(partial: Path, stack: ExitStack) -> tuple[BufferedRandom, int]:
        private = 0o666 if mode is None else 0o600  # until it is complete
        with write_errors(path):
            # not tempfile, which ignores the umask
            file = open(partial, "x+b", opener=lambda name, flags: os.open(name, flags, private))  # noqa: SIM115
        stack.callback(_close, file)
        return file, file.fileno()

    with _partial(path.parent, path.name, make) as (file, partial):
        yield file
        with write_errors(path):
            file.flush()
            if mode is not None:
                with suppress(OSError):  # not every file system has permissions
                    os.chmod(partial, mode & 0o777)
            os.fsync(file.fileno())
            if fcntl is None:  # Windows cannot rename open files; elsewhere the lock is held until after the rename
                file.close()
            if overwrite:
                os.replace(partial, path)
            else:
                try:
                    os.link(partial, path)  # never overwrites, unlike rename
                except OSError:  # path exists, or the file system has no hard links
                    check_free(path)
                    os.rename(partial, path)
    sync(path.parent)


@contextmanager
def atomic_folder(target: Path, within: Path | None = None) -> Iterator[Path]:
    """Make a folder that is renamed to ``target``, where nothing is yet, when the block ends. An error removes it.

    Args:
        target: its final path, which errors of writing in it name.
        within: the folder of the same file system to make it in; None: the parent of ``target``.

    Raises:
        FileExistsError: ``target`` exists, or was created meanwhile.
        OSError: the folder cannot be written.
    """
    check_free(target)
    with scratch_folder(within or target.parent, target) as partial:
        yield partial
        with write_errors(target):
            for path in (*partial.iterdir(), partial):
                sync(path)
            check_free(target)
            os.rename(partial, target)
        sync(target.parent)


@contextmanager
def scratch_folder(within: Path, target: Path | None = None) -> Iterator[Path]:
    """Make a partial folder in ``within`` for the block; then it is removed.

    What killed processes have left in ``within`` is removed, where folders can be locked.

    Args:
        within: the folder to make it in.
        target: the path that errors of writing name; None: ``within``.

    Raises:
        OSError: it cannot be made, or written.
    """

    named = target or within

    def make(partial: Path, stack: ExitStack) -> tuple[None, int | None]:
        with write_errors(named):
            partial.mkdir()
        try:
            descriptor = os.open(partial, os.O_RDONLY)
        except OSError:  # Windows opens no folders
            return None, None
        stack.callback(os.close, descriptor)
        return None, descriptor

    with _partial(within, within.name, make) as (_, partial):
        try:
            yield partial
        except FileExistsError:
            raise
        except (OSError, SafetensorError) as reason:  # of writing in it, unless it says another path
            said = not isinstance(reason, OSError) or isinstance(reason, WriteError) or reason.strerror
            path = reason.path if isinstance(reason, WriteError) else getattr(reason, "filename", None)
            elsewhere = isinstance(path, str | bytes) and partial.name not in Path(os.fsdecode(path)).parts
            if not said or elsewhere:  # a descriptor has no path
                raise
            raise unwritable(named, reason) from reason


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Own ``path`` for the block, by a locked file beside it that names this process; no other process can own it.

    A killed process owns nothing; what one has left beside ``path`` is removed. Where files cannot be locked, a path
    has any number of owners.

    Raises:
        BlockingIOError: another process owns it; the error names that process.
        OSError: the directory cannot be written.
    """
    if fcntl is None:
        yield
        return
    place = _target(path)
    _remove_leftovers(place.parent)
    name = place.parent / PARTIAL.replace("*", f"{_name_hash(place.name)}{0:016}")
    descriptor = _own(name, path)
    try:
        with write_errors(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} of {os.uname().nodename}".encode())
        yield
    finally:
        with suppress(OSError):  # the file system has no locks, and another owner has removed it
            name.unlink()
        os.close(descriptor)


def write_atomically(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a file; an error or interruption leaves the old file as it was.

    Raises:
        FileExistsError: ``overwrite`` is False and ``path`` exists, or was created meanwhile.
        OSError: the file cannot be written.
    """
    with atomic_file(path, overwrite=overwrite) as file, write_errors(path):
        file.write(content)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, except FileExistsError, into one that names the file and the remedy."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as reason:
        raise unwritable(path, reason) from reason


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one that names the file and the remedy."""
    try:
        yield
    except OSError as reason:
        raise OSError(f"cannot read {quoted(path)}: {reason.strerror}; name a file that can be read") from reason


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; a pipe does not block.

    Raises:
        OSError: the file does not exist, is no regular file, or cannot be read.
    """
    with read_errors(path):
        # O_NONBLOCK opens a pipe at once, which is then rejected; it has no effect on regular files.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"cannot read {quoted(path)}: it is a directory, a device or a pipe; name a regular file")
    return open(descriptor, "rb")


def read_text(path: Path) -> tuple[str, str]:
    """Return the text of a file in UTF-8, and its SHA-256 in hex.

    Raises:
        FileError: the file is not UTF-8.
        OSError: it cannot be read.
    """
    with open_regular(path) as file, read_errors(path):
        content = file.read()
    try:
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as reason:
        raise refusal(path, f"it is no UTF-8 text, from byte {reason.start}; name a text file") from None


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether the first bytes of a file are ``magic``.

    Raises:
        OSError: as ``open_regular``.
    """
    with open_regular(path) as file, read_errors(path):
        return file.read(len(magic)) == magic


def read_into(path: Path, file: BufferedReader, start: int, out: memoryview, part: str = "") -> None:
    """Read bytes of a file from ``start`` on until ``out`` is full.

    Raises:
        FileError: the file ends before; ``part`` says where, as ", in tensor 'a'".
        OSError: it cannot be read.
    """
    with read_errors(path):
        file.seek(start)
        count = file.readinto(out)
    if count != len(out):
        raise refusal(path, f"it was cut after it was opened{part}; get it again")


_LEFTOVER = re.compile(re.escape(PARTIAL).replace(r"\*", "[0-9a-f]{16}-[0-9a-f]{16}"))


def _name_hash(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + "-"


@contextmanager
def _partial(
    folder: Path, name: str, make: Callable[[Path, ExitStack], tuple[_T, int | None]]
) -> Iterator[tuple[_T, Path]]:
    """Make a file or folder in ``folder`` and lock it; at the end it is removed unless it was renamed.

    A partial without a lock was left by a killed process, and is removed. A partial that cannot be locked (folders on
    NFS) has a name without a hash, so that it is never taken for a leftover. Locks are visible to all containers of a
    machine and to all clients of an NFS server, unless it is mounted with local locks.

    Args:
        folder: to make it in; what killed processes have left there is removed.
        name: is hashed into the name.
        make: makes it at a path, opens it until the stack is closed, and returns it with its descriptor, if any.
    """
    _remove_leftovers(folder)
    # The second try is for when another process removed the first one as a leftover, before it was locked.
    for name_hash in (_name_hash(name), _name_hash(name), ""):
        partial = folder / PARTIAL.replace("*", name_hash + secrets.token_hex(8))
        with ExitStack() as stack:
            stack.callback(_remove, partial)
            made, descriptor = make(partial, stack)
            if not name_hash or _lock(descriptor, partial):
                yield made, partial
                return


def _close(file: BufferedRandom) -> None:
    with suppress(OSError):  # closing flushes again what could not be written
        file.close()


def _remove(path: Path) -> None:
    """Remove a file or folder, as far as possible; a renamed one is not there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _lock(descriptor: int | None, path: Path) -> bool:
    """Lock a file or folder until it is closed or the process ends; return whether ``path`` is then locked."""
    if fcntl is None or descriptor is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # the file system has no locks
        return False
    return path.exists()


def _own(name: Path, path: Path) -> int:
    """Open and lock the file ``name``, which says who owns ``path``."""
    seen = False
    while True:
        with write_errors(path):
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if owner and seen:
                raise BlockingIOError(
                    f"{quoted(path)} is being written by {printable(owner)}; wait for its end or choose another name"
                ) from None
            seen = bool(owner)
            time.sleep(0.01)  # it is about to say who it is, or is a process that removes what a killed owner left
            continue
        except OSError:  # the file system has no locks
            return descriptor
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
        os.close(descriptor)  # its last owner has removed it before it was locked


def _remove_leftovers(folder: Path) -> None:
    """Remove the files and folders that killed processes have left in a folder, as far as possible."""
    if fcntl is None:
        return
    with suppress(OSError):  # the directory cannot be listed
        for name in filter(_LEFTOVER.fullmatch, os.listdir(folder)):
            with suppress(OSError):  # it is locked, of another user, a link, or has been removed
                descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    mode = os.fstat(descriptor).st_mode
                    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                        _remove(folder / name)
                finally:
                    os.close(descriptor)


def _mode(path: Path) -> int | None:
    """Return the type and permissions of what is at ``path``, or None."""
    with write_errors(path):
        try:
            return path.stat().st_mode
        except FileNotFoundError:
            return None


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename after it cannot outlive what it names."""
    with suppress(OSError):  # where unsupported, a crash may lose the rename, but both files are whole
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_same(path: Path, other: Path) -> bool:
    return path == _target(other) or (path.exists() and other.exists() and path.samefile(other))


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))  # a symbolic link is kept, and its target is written
