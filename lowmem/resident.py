"""Keeps what a process holds resident close to what it uses: returns freed pages that glibc keeps, and drops read
pages of mapped files. In training, keeps freed pages for the next step. Nothing happens where the system has no such
call."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Bytes: smaller allocations are not worth the time of malloc_trim
_LARGE = 2**22
# Bytes of parameters: for fewer, neither the heap nor the pages of files are looked at
_SMALL = 2**20
# Bytes: a little less than the largest block after which glibc raises its thresholds
_KEPT = 2**25 - 2**16
# MADV_DONTNEED of Linux
_DONTNEED = 4
_MAPS, _PAGES = "/proc/self/maps", "/proc/self/pagemap"


def release_memory_after_call(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate functions that replace parameters: pages that nothing needs any more are returned after the call.

    By then the function's variables, which may hold the old parameters, are gone. The old parameters must live until
    the function ends anyway, since the decorator holds them.
    """

    @wraps(function)
    def call_and_release_memory(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        models = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, nn.Module)]
        before = [parameter for model in models for parameter in model.parameters()]
        result = function(*args, **kwargs)
        models += [result] if isinstance(result, nn.Module) else []
        after = {id(parameter) for model in models for parameter in model.parameters()}
        _drop_unwritten_file_pages(parameter for parameter in before if id(parameter) not in after)
        before.clear()
        trim_heap_unless_small(*models)
        return result

    return call_and_release_memory


def trim_heap_unless_small(*models: nn.Module) -> None:
    """Return free pages of the heap, unless the models are small."""
    parameters = {parameter for model in models for parameter in model.parameters() if not is_lazy(parameter)}
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trim = _malloc_trim_function_or_none()
    if trim is not None and size >= _SMALL:
        trim(0)


def raise_heap_trim_threshold() -> None:
    """Let glibc keep up to 64 MiB of freed memory at the top of the heap, which it would return after each step.

    glibc returns the top of the heap once it is twice as large as the largest block that was mapped and freed so far
    (``man 3 mallopt``, M_MMAP_THRESHOLD). So map a block that nobody writes to, and free it. Until the process ends,
    smaller blocks then come from the heap. Where the user has set a threshold, this changes nothing.
    """
    if _malloc_trim_function_or_none() is None:
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(_KEPT))))


def resident_bytes_or_none() -> int | None:
    """Return the resident memory of this process; None where the system does not tell, as on macOS and Windows."""
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class HeapTrimmer:
    """Decides whether free heap pages are returned before an allocation: not where they are reused soon.

    Args:
        trim: returns free pages; None: ``malloc_trim`` of the C library, if it has one.
        resident: returns the process's resident bytes.
    """

    def __init__(
        self, trim: Callable[[int], Any] | None = None, resident: Callable[[], int | None] = resident_bytes_or_none
    ) -> None:
        self._trim, self._resident = trim, resident
        # Highest resident bytes so far after trimming, plus the allocation that followed
        self._highest = 0

    def trim_if_allocation_raises_peak(self, nbytes: int) -> None:
        """Trim the heap if an allocation of ``nbytes`` bytes is large and would raise the highest resident memory."""
        trim = self._trim or _malloc_trim_function_or_none()
        if nbytes < _LARGE or trim is None or (self._resident() or 0) + nbytes <= self._highest:
            return
        trim(0)
        self._highest = max(self._highest, (self._resident() or 0) + nbytes)


def drop_mapped_file_pages(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Drop the pages of mapped files, to which nothing may have been written; they are read again when needed."""
    libc = _libc_with_madvise_or_none()
    if libc is None:
        return
    known = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, paths)}
    with open(_MAPS, "rb") as maps:
        for line in maps:
            addresses, _, _, device, inode, *_ = line.split(maxsplit=5)
            if inode == b"0" or (_device_number(device), int(inode)) not in known:
                continue
            begin, end = (int(part, 16) for part in addresses.split(b"-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def _drop_unwritten_file_pages(parameters: Iterable[Tensor]) -> None:
    """Drop the pages of parameters that are views of a mapped file, as long as none of the pages was written to."""
    plain = [
        parameter
        for parameter in parameters
        if type(parameter) is nn.Parameter and parameter.is_cpu and parameter.is_contiguous()
    ]
    libc = _libc_with_madvise_or_none()
    if libc is None or sum(parameter.nbytes for parameter in plain) < _SMALL:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    with open(_PAGES, "rb", buffering=0) as pages:
        for parameter in plain:
            first, end = -(-parameter.data_ptr() // page), (parameter.data_ptr() + parameter.nbytes) // page
            flags = np.frombuffer(os.pread(pages.fileno(), max(0, end - first) * 8, first * 8), dtype=np.uint64)
            # In memory or swapped, and no file's
            if not (((flags >> 62) != 0) & ((flags >> 61) & 1 == 0)).any():
                libc.madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(len(flags) * page), _DONTNEED)


def _device_number(major_minor_hex: bytes) -> int:
    major, minor = (int(part, 16) for part in major_minor_hex.split(b":"))
    return os.makedev(major, minor)


@cache
def _libc_with_madvise_or_none() -> Any:
    """Return the C library where it can drop pages: on Linux."""
    if not sys.platform.startswith("linux") or not all(os.access(path, os.R_OK) for path in (_MAPS, _PAGES)):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return libc if hasattr(libc, "madvise") else None


@cache
def _malloc_trim_function_or_none() -> Any:
    """Return ``malloc_trim`` of the C library; None where it has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


trim_heap_before_allocation = HeapTrimmer().trim_if_allocation_raises_peak
