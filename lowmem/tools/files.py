"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["PARTIAL", "check_free", "check_writable", "write_atomically"]

PARTIAL = ".lowmem-*.partial"
"""What a file that is being written is called, for those who list directories."""


def check_writable(path: Path) -> None:
    """Raise an OSError that names ``path`` unless a file can be written there."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {str(path)!r}: it is a device or a pipe; name a regular file")
    try:
        with tempfile.TemporaryFile(dir=_target(path).parent):
            pass
    except OSError as reason:
        raise _cannot_write(path, reason) from reason


def check_free(path: Path) -> None:
    """Raise a FileExistsError if there is anything at ``path``, a dangling link too."""
    if os.path.lexists(path):
        raise FileExistsError(f"{str(path)!r} exists; remove it or choose another name")


def write_atomically(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a file; an error or an interruption leaves what was there before.

    Raises:
        FileExistsError: something is there, or came to be meanwhile, and ``overwrite`` is False.
        OSError: it cannot be written.
    """
    path = _target(path) if overwrite else path
    partial = path.with_name(PARTIAL.replace("*", secrets.token_hex(8)))
    try:
        with open(partial, "xb") as file:  # tempfile's files do not follow the umask
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(partial, path)
            return
        try:
            os.link(partial, path)  # unlike a rename, never overwrites
        except OSError:  # it exists, or this file system has no hard links
            check_free(path)
            os.rename(partial, path)
    except FileExistsError:
        raise
    except OSError as reason:
        raise _cannot_write(path, reason) from reason
    finally:
        with suppress(OSError):  # gone when it was renamed
            partial.unlink()


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))  # a link stays, and what it points to is written


def _cannot_write(path: Path, reason: OSError) -> OSError:
    return OSError(f"cannot write {str(path)!r}: {reason.strerror}; choose a directory that can be written")
