"""Formats errors as one line that names the value, without control characters and torch's C++ traces."""

from __future__ import annotations

import errno
import inspect
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

LIMIT = 298  # characters of an error line, without its line end

_OUT_OF_MEMORY = "out of memory"
_REPORT = "; this is a fault of lowmem: please report it with what --debug prints"
_ALLOCATOR = re.compile(r"(\[enforce fail at [^]]*\].*?)?DefaultCPUAllocator: .*|std::bad_alloc", re.DOTALL)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # what safetensors says of a failed write
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CPP = re.compile(r"\[enforce fail at [^]]*\]\s*|\s*\(?(Exception raised from |C\+\+ CapturedTraceback).*", re.DOTALL)


class FileError(ValueError):
    """A file is damaged, or not of the expected kind; the message names the file and the remedy."""


def refusal(path: str | os.PathLike[str], reason: str, task: str = "read") -> FileError:
    """Return the error for a file that is rejected: one line, even if ``reason`` quotes text of the file."""
    return FileError(f"cannot {task} {quoted(path)}: {printable(reason, 500)}")


@contextmanager
def refusing(path: str | os.PathLike[str], task: str = "read", about: str = "") -> Iterator[None]:
    """Let a ValueError of the block name a file, and what it is about; a FileError names its own."""
    try:
        yield
    except FileError:
        raise
    except ValueError as error:
        raise refusal(path, f"{about}{error}", task) from None


class WriteError(OSError):
    """A file or folder cannot be written; the message names it and the remedy.

    Attributes:
        path: of the file or folder.
        said: by the system, on why.
        number: the system's error number, or None if it is unknown.
    """

    path: str
    said: str
    number: int | None


def unwritable(path: str | os.PathLike[str], reason: Exception) -> WriteError:
    """Return the error for a file or folder that cannot be written: one line, with the remedy.

    Args:
        path: of the file or folder, as the user knows it.
        reason: an OSError of the system, safetensors' error, or a WriteError about a part of the folder.
    """
    if isinstance(reason, WriteError):
        said, number = reason.said, reason.number
    elif isinstance(reason, OSError):
        said, number = reason.strerror or str(reason), reason.errno
    else:
        said, found = str(reason), _RUST_ERROR.search(str(reason))
        number = None if found is None else int(found[1])
    full = "make room on its disk, or choose another one"
    remedy = full if number in _FULL else "choose a directory that can be written"
    error = WriteError(f"cannot write {quoted(path)}: {one_line(said)}; {remedy}")
    error.path, error.said, error.number = os.fspath(path), said, number
    return error


def printable(text: str, limit: int = 200) -> str:
    r"""Return text from a user or file as one line of at most ``limit`` characters, for a message or table.

    Control, bidirectional and other invisible characters and lone surrogates are escaped as ``\x1b`` or ``\u202e``;
    the middle of a long text is replaced by ``...``. Backslashes are not escaped: escaped text does not change.
    """
    if len(text) > 2 * limit:  # avoids escaping what is cut out below
        text = text[:limit] + text[-limit:]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > limit:
        head = (limit - 3) // 2
        text = f"{text[:head]}...{text[head + 3 - limit :]}"
    return text


def quoted(path: str | os.PathLike[str]) -> str:
    """Return a path in quotes, for errors."""
    return printable(repr(os.fspath(path)), 400)


class _Repr(reprlib.Repr):
    """Shows tensors and arrays by type, shape and dtype, and modules and what holds tensors by their type."""

    def repr_instance(self, x: Any, level: int) -> str:
        """Return the text of a value that is no builtin container, string or number."""
        kind = type(x).__name__
        if isinstance(x, type):
            return super().repr_instance(x, level)
        if isinstance(shape := getattr(x, "shape", None), tuple):
            dtype = getattr(x, "dtype", None)
            return f"{kind} of shape {tuple(shape)}" + ("" if dtype is None else f", {dtype}")
        if callable(getattr(x, "named_modules", None)):
            return kind
        if is_dataclass(x):
            own = ((one.name, getattr(x, one.name)) for one in fields(x) if one.repr)
            return f"{kind}({', '.join(f'{name}={self.repr1(value, level - 1)}' for name, value in own)})"
        return super().repr_instance(x, level)


_REPR = _Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxtuple = _REPR.maxlist = 8


def show(value: object) -> str:
    """Return a short repr of any value, for errors; of tensors their shapes and dtypes, never their values."""
    return printable(_REPR.repr(value))


def is_one_of(value: object, choices: Iterable[object]) -> bool:
    """Whether a value equals one of the choices and is of its type: never an array, which compares by its items."""
    return any(isinstance(value, type(choice)) and value == choice for choice in choices)


def as_path(name: str, value: str | os.PathLike[str]) -> Path:
    """Return a path that a caller gave as an argument; a TypeError names the argument."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={show(value)} must be the path of a file or folder")
    return Path(value)


def check_function(name: str, value: Any, needs: str, *arguments: object) -> None:
    """Raise a TypeError unless a value can be called with ``arguments``; ``needs`` says what it must be."""
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name}={show(value)} must be {needs}") from error
    except ValueError:  # a builtin whose signature is unknown
        return


def one_line(text: str, taken: int = 0) -> str:
    """Return text as one printable line of at most ``LIMIT - taken`` characters."""
    return printable(" ".join(text.split()), LIMIT - taken)


def reason(error: BaseException) -> str:
    """Return the message of a command for the exception that ended it."""
    if _is_memory(error):
        return f"{describe(error)}; free memory, or take a smaller model, batch, shape or file"
    expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return _without_cpp(message_of(error)) if expected else describe(error)


def is_fault(error: BaseException) -> bool:
    """Whether an exception is of no kind that lowmem raises for bad input, and memory has not run out."""
    return not isinstance(error, ValueError | OSError | ImportError | MemoryError) and not _is_memory(error)


def error_line(command: str, error: BaseException) -> str:
    """Return the line of a command for the exception that ended it; a fault's asks to report it."""
    if is_fault(error):
        return one_line(f"{command}: {describe(error)}", len(_REPORT)) + _REPORT
    return one_line(f"{command}: {reason(error)}")


def describe(error: BaseException) -> str:
    """Return the type and the first line of any exception, and what it announces, in at most 120 characters."""
    text = _OUT_OF_MEMORY if isinstance(error, MemoryError) else _without_cpp(message_of(error)).strip()
    if text == _OUT_OF_MEMORY:
        return text
    first, *others = text.splitlines() or [""]
    if first.endswith(":") and others:
        first += f" {others[0].strip()}"
    return printable(f"{type(error).__name__}: {first}".removesuffix(": "), 120)


def unbuilt(error: BaseException) -> str:
    """Return why transformers cannot build a model; an error that lowmem's own code raised in the call says it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lowmem."):
        return one_line(reason(error))
    return f"transformers cannot build this model ({describe(error)}); get it again"


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | RuntimeError) and _OUT_OF_MEMORY in describe(error).lower()


def message_of(error: BaseException) -> str:
    """Return the text of any exception, also of one whose ``__str__`` fails."""
    try:
        return str(error)
    except (Exception, SystemExit) as failure:  # noqa: BLE001  a user's exception may have a broken __str__
        return f"its text cannot be shown: {type(failure).__name__}"


def _without_cpp(text: str) -> str:
    return _CPP.sub("", _ALLOCATOR.sub(_OUT_OF_MEMORY, text))
