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

from lowmem.errors import WriteError, file_error, printable_line, quoted_path, unwritable_file_error

PARTIAL_GLOB = ".lowmem-*.partial"
"""Glob pattern of the names of files and folders that are being written, and of their locks."""


def check_writable(path: Path) -> None:
    """Raise an OSError that names ``path`` unless a file can be written there."""
    mode = _stat_mode_or_none(path) or stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write {quoted_path(path)}: it is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise OSError(f"cannot write {quoted_path(path)}: it is a device or a pipe; name a regular file")
    with write_errors_with_path(path), tempfile.TemporaryFile(dir=_real_path(path).parent):
        pass


def check_not_exists(path: Path) -> None:
    """Raise a FileExistsError if anything is at ``path``, also a dangling symbolic link."""
    if os.path.lexists(path):
        raise FileExistsError(f"{quoted_path(path)} exists; remove it or choose another name")


def check_outside_inputs(path: Path, inputs: Mapping[str, Path | None], argument_name: str = "OUT") -> None:
    """Raise a ValueError if a path to write is one of the inputs, or lies in one that is a folder.

    Links, relative paths, and upper and lower case are followed as the file system does.

    Args:
        path: to write; nothing may be there yet.
        inputs: by the names that the error gives them; None is left out.
        argument_name: of ``path``, for the error.
    """
    real_path = _real_path(path)
    for input_name, input_path in inputs.items():
        if input_path is not None and _is_same_path_or_file(real_path, input_path):
            raise ValueError(
                f"{argument_name}={quoted_path(path)} is {input_name}, which would be lost: name another place"
            )
        if input_path is not None and any(_is_same_path_or_file(parent, input_path) for parent in real_path.parents):
            raise ValueError(
                f"{argument_name}={quoted_path(path)} lies in {input_name}={quoted_path(input_path)}, which it would "
                "change: name a place outside"
            )


@contextmanager
def atomic_file(path: Path, *, overwrite: bool = True) -> Iterator[BufferedRandom]:
    """Open a new file for writing and reading that is renamed to ``path`` when the block ends.

    Until then it is a partial file in the same directory; an error or interruption removes it and leaves the old file
    as it was. What killed processes have left in the directory is removed. A replaced file keeps its permissions; a
    new file gets those of the umask. Errors of the block are passed on unchanged: wrap its writes in
    ``write_errors_with_path``.

    Raises:
        FileExistsError: ``overwrite`` is False and ``path`` exists, or was created meanwhile.
        OSError: the file cannot be written.

    Warns:
        UserWarning: files cannot be locked there, so that what killed processes have left stays.
    """
    path = _real_path(path) if overwrite else path
    mode = _stat_mode_or_none(path) if overwrite else None

    # Until it is complete
    private = 0o666 if mode is None else 0o600
    with _locked_partial_path(path.parent, path.name, path) as partial, ExitStack() as stack:
        with write_errors_with_path(path):
            # not tempfile, which ignores the umask
            file = open(partial, "x+b", opener=lambda name, flags: os.open(name, flags, private))  # noqa: SIM115
        stack.callback(_close_ignoring_errors, file)
        yield file
        with write_errors_with_path(path):
            file.flush()
            if mode is not None:
                # Not every file system has permissions
                with suppress(OSError):
                    os.chmod(partial, mode & 0o777)
            os.fsync(file.fileno())
            # Windows renames no open files
            file.close()
            if overwrite:
                os.replace(partial, path)
            else:
                try:
                    # Never overwrites, unlike rename
                    os.link(partial, path)
                except OSError:
                    # Path exists, or the file system has no hard links
                    check_not_exists(path)
                    os.rename(partial, path)
    try_fsync_file_or_folder(path.parent)


@contextmanager
def atomic_folder(target: Path, scratch_parent: Path | None = None) -> Iterator[Path]:
    """Make a folder that is renamed to ``target``, where nothing is yet, when the block ends. An error removes it.

    Args:
        target: its final path, which errors of writing in it name.
        scratch_parent: the folder of the same file system to make it in; None: the parent of ``target``.

    Raises:
        FileExistsError: ``target`` exists, or was created meanwhile.
        OSError: the folder cannot be written.
    """
    check_not_exists(target)
    with scratch_folder(scratch_parent or target.parent, target) as partial:
        yield partial
        with write_errors_with_path(target):
            for path in (*partial.iterdir(), partial):
                try_fsync_file_or_folder(path)
            check_not_exists(target)
            os.rename(partial, target)
        try_fsync_file_or_folder(target.parent)


@contextmanager
def scratch_folder(parent: Path, error_path: Path | None = None) -> Iterator[Path]:
    """Make a partial folder in ``parent`` for the block; then it is removed.

    What killed processes have left in ``parent`` is removed.

    Args:
        parent: the folder to make it in.
        error_path: the path that errors of writing name; None: ``parent``.

    Raises:
        OSError: it cannot be made, or written.

    Warns:
        UserWarning: files cannot be locked there, so that what killed processes have left stays.
    """

    named = error_path or parent
    with _locked_partial_path(parent, parent.name, named) as partial:
        with write_errors_with_path(named):
            partial.mkdir()
        try:
            yield partial
        except FileExistsError:
            raise
        except (OSError, SafetensorError) as reason:  # of writing in it, unless it says another path
            said = not isinstance(reason, OSError) or isinstance(reason, WriteError) or reason.strerror
            path = reason.path if isinstance(reason, WriteError) else getattr(reason, "filename", None)
            elsewhere = isinstance(path, str | bytes) and partial.name not in Path(os.fsdecode(path)).parts
            # A descriptor has no path
            if not said or elsewhere:
                raise
            raise unwritable_file_error(named, reason) from reason


@contextmanager
def exclusive_write_lock(path: Path) -> Iterator[None]:
    """Own ``path`` for the block, by a lock beside it; no other process can own it.

    A killed process owns nothing; what one has left beside ``path`` is removed.

    Raises:
        BlockingIOError: another process owns it; the error names that process.
        OSError: the directory cannot be written.

    Warns:
        UserWarning: files cannot be locked there: ``path`` has any number of owners.
    """
    place = _real_path(path)
    _remove_unlocked_leftovers(place.parent)
    base = place.parent / f".lowmem-{_name_hash_prefix(place.name)}{0:016}"
    owner = Path(f"{base}{_OWNER}")
    with ExitStack() as stack:
        try:
            # It waits for a process that removes what a killed owner left, or that is about to say who it is.
            stack.enter_context(_file_lock_or_warn(base, timeout_seconds=0.2))
        except TimeoutError:
            name = "another process"
            with suppress(OSError), open_regular_file(owner) as file:
                name = file.read(200).decode(errors="replace")
            raise BlockingIOError(
                f"{quoted_path(path)} is being written by {printable_line(name)}; wait for its end or choose another "
                "name"
            ) from None
        except OSError as reason:
            raise unwritable_file_error(path, reason) from reason
        stack.callback(_try_remove_regular_file_or_folder, owner)
        with write_errors_with_path(path):
            owner.unlink(missing_ok=True)
            # Follows no link
            with open(owner, "x") as file:
                file.write(f"process {os.getpid()} of {platform.node()}")
        yield


def write_atomically(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a file; an error or interruption leaves the old file as it was.

    Raises:
        FileExistsError: ``overwrite`` is False and ``path`` exists, or was created meanwhile.
        OSError: the file cannot be written.
    """
    with atomic_file(path, overwrite=overwrite) as file, write_errors_with_path(path):
        file.write(content)


@contextmanager
def write_errors_with_path(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, except FileExistsError, into one that names the file and the remedy."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as reason:
        raise unwritable_file_error(path, reason) from reason


@contextmanager
def read_errors_with_path(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one that names the file and the remedy."""
    try:
        yield
    except OSError as reason:
        raise OSError(f"cannot read {quoted_path(path)}: {reason.strerror}; name a file that can be read") from reason


def open_regular_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; a pipe does not block.

    Raises:
        OSError: the file does not exist, is no regular file, or cannot be read.
    """
    with read_errors_with_path(path):
        # O_NONBLOCK opens a pipe at once, which is then rejected; it has no effect on regular files.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"cannot read {quoted_path(path)}: it is a directory, a device or a pipe; name a regular file")
    return open(descriptor, "rb")


def read_text_and_sha256(path: Path) -> tuple[str, str]:
    """Return the text of a file in UTF-8, and its SHA-256 in hex.

    Raises:
        FileError: the file is not UTF-8.
        OSError: it cannot be read.
    """
    with open_regular_file(path) as file, read_errors_with_path(path):
        content = file.read()
    try:
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as reason:
        raise file_error(path, f"it is no UTF-8 text, from byte {reason.start}; save it in UTF-8") from None


def has_magic_bytes(path: Path, magic: bytes) -> bool:
    """Whether the first bytes of a file are ``magic``.

    Raises:
        OSError: as ``open_regular_file``.
    """
    with open_regular_file(path) as file, read_errors_with_path(path):
        return file.read(len(magic)) == magic


def read_exactly_into(
    path: Path, file: BufferedReader, offset: int, buffer: memoryview, error_suffix: str = ""
) -> None:
    """Read bytes of a file from ``offset`` on until ``buffer`` is full.

    Raises:
        FileError: the file ends before; ``error_suffix`` says where, as ", in tensor 'a'".
        OSError: it cannot be read.
    """
    with read_errors_with_path(path):
        file.seek(offset)
        count = file.readinto(buffer)
    if count != len(buffer):
        raise file_error(path, f"it was cut after it was opened{error_suffix}; get it again")


_LOCK, _OWNER = "-lock.partial", "-owner.partial"
_LEFTOVER = re.compile(r"(\.lowmem-[0-9a-f]{16}-[0-9a-f]{16})" + re.escape(_LOCK))


def _name_hash_prefix(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + "-"


@contextmanager
def _locked_partial_path(folder: Path, final_name: str, error_path: Path) -> Iterator[Path]:
    """Yield a path in ``folder`` to make a file or folder at, whose lock says that it is being written. At the end it
    is removed, unless it was renamed.

    Args:
        folder: what killed processes have left there is removed.
        final_name: is hashed into the path.
        error_path: the path that errors name.
    """
    _remove_unlocked_leftovers(folder)
    base = folder / f".lowmem-{_name_hash_prefix(final_name)}{secrets.token_hex(8)}"
    with ExitStack() as stack:
        with write_errors_with_path(error_path):
            # For a process that takes it for a leftover
            stack.enter_context(_file_lock_or_warn(base, timeout_seconds=60))
        partial = Path(f"{base}.partial")
        stack.callback(_try_remove_regular_file_or_folder, partial)
        yield partial


@contextmanager
def _file_lock_or_warn(lock_base: Path, timeout_seconds: float) -> Iterator[bool]:
    """Hold a lock for the block, by a file that is removed at the end; say whether the file system has locks.

    The system frees the lock of a killed process. Locks are visible to all containers of a machine and to all clients
    of an NFS server, unless it is mounted with local locks.

    Raises:
        TimeoutError: another process holds the lock for longer than ``timeout_seconds``.
        OSError: the file cannot be made.
    """
    # Here: its import takes longer than that of this file
    from filelock import FileLock

    # An error where it is no folder, which FileLock would make
    os.stat(f"{lock_base.parent}/.")
    path = Path(f"{lock_base}{_LOCK}")
    existed = os.path.lexists(path)
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout_seconds, poll_interval=0.01)
    except OSError as reason:
        if isinstance(reason, TimeoutError) or reason.filename is not None:
            raise
        if not existed:
            path.unlink(missing_ok=True)
        _warn_once_without_file_locks(lock_base.parent, reason.strerror or str(reason))
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            # Windows removes no open file
            with suppress(OSError):
                # Before others can lock it
                path.unlink()
            lock.release()
            if os.name == "nt":
                # Another process has opened it
                with suppress(OSError):
                    path.unlink()


@cache
def _warn_once_without_file_locks(folder: Path, reason: str) -> None:
    warnings.warn(
        f"files in {quoted_path(folder)} cannot be locked ({reason}): nothing keeps two runs from writing one file, "
        "and "
        f"what killed runs leave ({PARTIAL_GLOB}) stays; write to one name from one run at a time",
        stacklevel=2,
    )


def _close_ignoring_errors(file: BufferedRandom) -> None:
    # Closing flushes again what could not be written
    with suppress(OSError):
        file.close()


def _try_remove_regular_file_or_folder(path: Path) -> None:
    """Remove a file or folder, as far as possible; a renamed one is not there, and a link or pipe is not lowmem's."""
    with suppress(OSError):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISREG(mode):
            path.unlink()


def _remove_unlocked_leftovers(folder: Path) -> None:
    """Remove what killed processes have left in a folder, as far as possible: files whose locks are free."""
    # The directory cannot be listed
    with suppress(OSError):
        for match in filter(None, map(_LEFTOVER.fullmatch, os.listdir(folder))):
            base = folder / match[1]
            with (
                suppress(OSError),
                _file_lock_or_warn(base, timeout_seconds=0) as is_locked,
            ):  # its process runs, or is another user's
                for path in (f"{base}.partial", f"{base}{_OWNER}") if is_locked else ():
                    _try_remove_regular_file_or_folder(Path(path))


def _stat_mode_or_none(path: Path) -> int | None:
    """Return the type and permissions of what is at ``path``, or None."""
    with write_errors_with_path(path):
        try:
            return path.stat().st_mode
        except FileNotFoundError:
            return None


def try_fsync_file_or_folder(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename after it cannot outlive what it names."""
    # Where unsupported, a crash may lose the rename, but both files are whole
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_same_path_or_file(real_path: Path, other: Path) -> bool:
    return real_path == _real_path(other) or (real_path.exists() and other.exists() and real_path.samefile(other))


def _real_path(path: Path) -> Path:
    # A symbolic link is kept, and its target is written
    return Path(os.path.realpath(path))
