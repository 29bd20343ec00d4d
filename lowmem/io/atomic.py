"""Atomic writes, and opening regular files only."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from io import BufferedRandom, BufferedReader
from pathlib import Path

from safetensors import SafetensorError

from lowmem.errors import WriteError, printable, quoted, refusal, unwritable

PARTIAL = ".lowmem-*.partial"
"""Glob pattern of the names of files and folders that are being written, and of their locks."""


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
    as it was. What killed processes have left in the directory is removed. A replaced file keeps its permissions; a
    new file gets those of the umask. Errors of the block are passed on unchanged: wrap its writes in
    ``write_errors``.

    Raises:
        FileExistsError: ``overwrite`` is False and ``path`` exists, or was created meanwhile.
        OSError: the file cannot be written.

    Warns:
        UserWarning: files cannot be locked there, so that what killed processes have left stays.
    """
    path = _target(path) if overwrite else path
    mode = _mode(path) if overwrite else None

    private = 0o666 if mode is None else 0o600  # until it is complete
    with _partial(path.parent, path.name, path) as partial, ExitStack() as stack:
        with write_errors(path):
            # not tempfile, which ignores the umask
            file = open(partial, "x+b", opener=lambda name, flags: os.open(name, flags, private))  # noqa: SIM115
        stack.callback(_close, file)
        yield file
        with write_errors(path):
            file.flush()
            if mode is not None:
                with suppress(OSError):  # not every file system has permissions
                    os.chmod(partial, mode & 0o777)
            os.fsync(file.fileno())
            file.close()  # Windows renames no open files
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

    What killed processes have left in ``within`` is removed.

    Args:
        within: the folder to make it in.
        target: the path that errors of writing name; None: ``within``.

    Raises:
        OSError: it cannot be made, or written.

    Warns:
        UserWarning: files cannot be locked there, so that what killed processes have left stays.
    """

    named = target or within
    with _partial(within, within.name, named) as partial:
        with write_errors(named):
            partial.mkdir()
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
    """Own ``path`` for the block, by a lock beside it; no other process can own it.

    A killed process owns nothing; what one has left beside ``path`` is removed.

    Raises:
        BlockingIOError: another process owns it; the error names that process.
        OSError: the directory cannot be written.

    Warns:
        UserWarning: files cannot be locked there: ``path`` has any number of owners.
    """
    place = _target(path)
    _remove_leftovers(place.parent)
    base = place.parent / f".lowmem-{_name_hash(place.name)}{0:016}"
    owner = Path(f"{base}{_OWNER}")
    with ExitStack() as stack:
        try:
            # It waits for a process that removes what a killed owner left, or that is about to say who it is.
            stack.enter_context(_locked(base, wait=0.2))
        except TimeoutError:
            name = "another process"
            with suppress(OSError), open_regular(owner) as file:
                name = file.read(200).decode(errors="replace")
            raise BlockingIOError(
                f"{quoted(path)} is being written by {printable(name)}; wait for its end or choose another name"
            ) from None
        except OSError as reason:
            raise unwritable(path, reason) from reason
        stack.callback(_remove, owner)
        with write_errors(path):
            owner.unlink(missing_ok=True)
            with open(owner, "x") as file:  # follows no link
                file.write(f"process {os.getpid()} of {platform.node()}")
        yield


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


_LOCK, _OWNER = "-lock.partial", "-owner.partial"
_LEFTOVER = re.compile(r"(\.lowmem-[0-9a-f]{16}-[0-9a-f]{16})" + re.escape(_LOCK))


def _name_hash(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + "-"


@contextmanager
def _partial(folder: Path, name: str, named: Path) -> Iterator[Path]:
    """Yield a path in ``folder`` to make a file or folder at, whose lock says that it is being written. At the end it
    is removed, unless it was renamed.

    Args:
        folder: what killed processes have left there is removed.
        name: is hashed into the path.
        named: the path that errors name.
    """
    _remove_leftovers(folder)
    base = folder / f".lowmem-{_name_hash(name)}{secrets.token_hex(8)}"
    with ExitStack() as stack:
        with write_errors(named):
            stack.enter_context(_locked(base, wait=60))  # for a process that takes it for a leftover
        partial = Path(f"{base}.partial")
        stack.callback(_remove, partial)
        yield partial


@contextmanager
def _locked(base: Path, wait: float) -> Iterator[bool]:
    """Hold a lock for the block, by a file that is removed at the end; say whether the file system has locks.

    The system frees the lock of a killed process. Locks are visible to all containers of a machine and to all clients
    of an NFS server, unless it is mounted with local locks.

    Raises:
        TimeoutError: another process holds the lock for longer than ``wait`` seconds.
        OSError: the file cannot be made.
    """
    from filelock import FileLock  # here: its import takes longer than that of this file

    os.stat(f"{base.parent}/.")  # an error where it is no folder, which FileLock would make
    path = Path(f"{base}{_LOCK}")
    existed = os.path.lexists(path)
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(wait, poll_interval=0.01)
    except OSError as reason:
        if isinstance(reason, TimeoutError) or reason.filename is not None:
            raise
        if not existed:
            path.unlink(missing_ok=True)
        _warn_without_locks(base.parent, reason.strerror or str(reason))
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()  # before others can lock it
            lock.release()
            if os.name == "nt":
                with suppress(OSError):  # another process has opened it
                    path.unlink()


@cache
def _warn_without_locks(folder: Path, reason: str) -> None:
    warnings.warn(
        f"files in {quoted(folder)} cannot be locked ({reason}): nothing keeps two runs from writing one file, and "
        f"what killed runs leave ({PARTIAL}) stays; write to one name from one run at a time",
        stacklevel=2,
    )


def _close(file: BufferedRandom) -> None:
    with suppress(OSError):  # closing flushes again what could not be written
        file.close()


def _remove(path: Path) -> None:
    """Remove a file or folder, as far as possible; a renamed one is not there, and a link or pipe is not lowmem's."""
    with suppress(OSError):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISREG(mode):
            path.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left in a folder, as far as possible: files whose locks are free."""
    with suppress(OSError):  # the directory cannot be listed
        for found in filter(None, map(_LEFTOVER.fullmatch, os.listdir(folder))):
            base = folder / found[1]
            with suppress(OSError), _locked(base, wait=0) as is_locked:  # its process runs, or is another user's
                for path in (f"{base}.partial", f"{base}{_OWNER}") if is_locked else ():
                    _remove(Path(path))


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
