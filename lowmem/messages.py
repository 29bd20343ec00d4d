"""Errors as one line: no traceback, no control characters, none of the C++ text that torch adds."""

from __future__ import annotations

import re

from lowmem.files import printable

__all__ = ["LIMIT", "describe", "one_line", "reason"]

LIMIT = 298  # characters of a line without its line end

_OUT_OF_MEMORY = "out of memory"
_ALLOCATOR = re.compile(r"(\[enforce fail at [^]]*\].*?)?DefaultCPUAllocator: .*|std::bad_alloc", re.DOTALL)
_CPP = re.compile(r"\[enforce fail at [^]]*\]\s*|\s*\(?(Exception raised from |C\+\+ CapturedTraceback).*", re.DOTALL)


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
