"""Drops pages of mapped files that were read: they would count as resident memory of the process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

__all__ = ["drop_pages"]

_DONTNEED = 4  # MADV_DONTNEED of Linux
_MAPS = "/proc/self/maps"


def drop_pages(files: Iterable[str | os.PathLike[str]]) -> None:
    """Give the pages of mapped files back, as far as the system can; who reads them again gets them from the file.

    Nothing may have been written to the mapped memory: that would be lost.
    """
    libc = _libc()
    if libc is None:
        return
    known = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, files)}
    with open(_MAPS, "rb") as maps:
        for line in maps:
            addresses, _, _, device, inode, *_ = line.split(maxsplit=5)
            if inode == b"0" or (_device(device), int(inode)) not in known:
                continue
            begin, end = (int(part, 16) for part in addresses.split(b"-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def _device(text: bytes) -> int:
    major, minor = (int(part, 16) for part in text.split(b":"))
    return os.makedev(major, minor)


@cache
def _libc() -> Any:
    """Return the C library where it can drop pages: on Linux."""
    if not sys.platform.startswith("linux") or not os.path.exists(_MAPS):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return libc if hasattr(libc, "madvise") else None
