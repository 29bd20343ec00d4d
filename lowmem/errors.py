"""Formats errors as one line that names the value, without control characters and torch's C++ traces."""

from __future__ import annotations

import os
import re
import reprlib

__all__ = [
    "LIMIT",
    "FileError",
    "describe",
    "error_line",
    "is_fault",
    "one_line",
    "printable",
    "quoted",
    "reason",
    "refusal",
    "show",
    "unbuilt",
]

LIMIT = 298  # characters of an error line, without its line end

_OUT_OF_MEMORY = "out of memory"
_REPORT = "; this is a fault of lowmem: please report it with what --debug prints"
_ALLOCATOR = re.compile(r"(\[enforce fail at [^]]*\].*?)?DefaultCPUAllocator: .*|std::bad_alloc", re.DOTALL)
_CPP = re.compile(r"\[enforce fail at [^]]*\]\s*|\s*\(?(Exception raised from |C\+\+ CapturedTraceback).*", re.DOTALL)


class FileError(ValueError):
    """A file is damaged, or not of the expected kind; the message names the file and the remedy."""


def refusal(path: str | os.PathLike[str], reason: str, task: str = "read") -> FileError:
    """Return the error for a file that is rejected: one line, even if ``reason`` quotes text of the file."""
    return FileError(f"cannot {task} {quoted(path)}: {printable(reason, 500)}")


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


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxtuple = _REPR.maxlist = 8


def show(value: object) -> str:
    """Return a short repr of any value, for errors."""
    return printable(_REPR.repr(value))


def one_line(text: str, taken: int = 0) -> str:
    """Return text as one printable line of at most ``LIMIT - taken`` characters."""
    return printable(" ".join(text.split()), LIMIT - taken)


def reason(error: BaseException) -> str:
    """Return the message of a command for the exception that ended it."""
    if _is_memory(error):
        return f"{describe(error)}; free memory, or take a smaller model, batch, shape or file"
    expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return _without_cpp(_text(error)) if expected else describe(error)


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
    text = _OUT_OF_MEMORY if isinstance(error, MemoryError) else _without_cpp(_text(error)).strip()
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


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except (Exception, SystemExit) as failure:  # noqa: BLE001  a user's exception may have a broken __str__
        return f"its text cannot be shown: {type(failure).__name__}"


def _without_cpp(text: str) -> str:
    return _CPP.sub("", _ALLOCATOR.sub(_OUT_OF_MEMORY, text))
