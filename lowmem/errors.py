"""What errors say: one line that names the value; no control characters, and none of the C++ text that torch adds."""

from __future__ import annotations

import os
import re
import reprlib

__all__ = ["LIMIT", "FileError", "describe", "one_line", "printable", "quoted", "reason", "refusal", "show"]

LIMIT = 298  # characters of a line without its line end

_OUT_OF_MEMORY = "out of memory"
_ALLOCATOR = re.compile(r"(\[enforce fail at [^]]*\].*?)?DefaultCPUAllocator: .*|std::bad_alloc", re.DOTALL)
_CPP = re.compile(r"\[enforce fail at [^]]*\]\s*|\s*\(?(Exception raised from |C\+\+ CapturedTraceback).*", re.DOTALL)


class FileError(ValueError):
    """A file is damaged, or not of the kind that is read here; the message says which, and what to do."""


def refusal(path: str | os.PathLike[str], reason: str, task: str = "read") -> FileError:
    """Return the error that says why a file is not read: one line, whatever text of the file the reason repeats."""
    return FileError(f"cannot {task} {quoted(path)}: {printable(reason, 500)}")


def printable(text: str, limit: int = 200) -> str:
    r"""Return text of any origin as a message or a table can show it: one line of at most ``limit`` characters.

    Control, bidirectional and other invisible characters and lone surrogates are written as ``\x1b`` or ``\u202e``,
    and ``...`` takes the place of the middle of what is too long. Backslashes stay, so that escaped text does too.
    """
    if len(text) > 2 * limit:  # don't escape what is cut out below
        text = text[:limit] + text[-limit:]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > limit:
        head = (limit - 3) // 2
        text = f"{text[:head]}...{text[head + 3 - limit :]}"
    return text


def quoted(path: str | os.PathLike[str]) -> str:
    """Return a path as an error shows it."""
    return printable(repr(os.fspath(path)), 400)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxtuple = _REPR.maxlist = 8


def show(value: object) -> str:
    """Return a value as an error shows it: a string in quotes, and short, whatever it is."""
    return printable(_REPR.repr(value))


def one_line(text: str, taken: int = 0) -> str:
    """Return text of any origin as a line that a terminal can show, of which so many characters are taken."""
    return printable(" ".join(text.split()), LIMIT - taken)


def reason(error: BaseException) -> str:
    """Return what a command says of the error that ended it."""
    if isinstance(error, MemoryError | RuntimeError) and _OUT_OF_MEMORY in (said := describe(error)).lower():
        return f"{said}; free memory, or take a smaller model, batch, shape or file"
    expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return _without_cpp(_text(error)) if expected else describe(error)


def describe(error: BaseException) -> str:
    """Return the type and the first line of an exception of any origin, in at most 120 characters."""
    text = _OUT_OF_MEMORY if isinstance(error, MemoryError) else _without_cpp(_text(error)).strip()
    if text == _OUT_OF_MEMORY:
        return text
    first = text.splitlines()[0] if text else ""
    return printable(f"{type(error).__name__}: {first}".removesuffix(": "), 120)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except (Exception, SystemExit) as failure:  # noqa: BLE001  a user's exception can be broken, too
        return f"its text cannot be shown: {type(failure).__name__}"


def _without_cpp(text: str) -> str:
    return _CPP.sub("", _ALLOCATOR.sub(_OUT_OF_MEMORY, text))
