"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["check_writable", "write_atomically"]


def check_writable(path: Path) -> None:
    """Raise an OSError that names ``path`` unless a file can be written there."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as reason:
        raise OSError(f"{path} cannot be written: {reason.strerror}") from reason


def write_atomically(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write ``content`` to ``path``; an error or an interruption leaves what was there before.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: it cannot be written.
    """
    check_writable(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "xb") as file:  # not mkstemp: the file's permissions follow the umask
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(partial, path)
        else:
            os.link(partial, path)  # unlike a rename, it never replaces a file that appeared meanwhile
    except FileExistsError:
        raise FileExistsError(f"{path} exists; remove it or choose another name") from None
    finally:
        partial.unlink(missing_ok=True)
