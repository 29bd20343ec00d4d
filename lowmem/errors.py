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

# Characters of an error line, without its line end
LIMIT = 298

_OUT_OF_MEMORY = "out of memory"
_REPORT = "; this is a fault of lowmem: please report it with what --debug prints"
_ALLOCATOR = re.compile(r"(\[enforce fail at [^]]*\].*?)?DefaultCPUAllocator: .*|std::bad_alloc", re.DOTALL)
# What safetensors says of a failed write
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CPP = re.compile(r"\[enforce fail at [^]]*\]\s*|\s*\(?(Exception raised from |C\+\+ CapturedTraceback).*", re.DOTALL)


class FileError(ValueError):
    """A file is damaged, or not of the expected kind; the message names the file and the remedy."""


def file_error(path: str | os.PathLike[str], reason: str, task: str = "read") -> FileError:
    """Return the error for a file that is rejected: one line, even if ``reason`` quotes text of the file."""
    return FileError(f"cannot {task} {quoted_path(path)}: {printable_line(reason, 500)}")


@contextmanager
def value_errors_as_file_errors(
    path: str | os.PathLike[str], task: str = "read", message_prefix: str = ""
) -> Iterator[None]:
    """Let a ValueError of the block name a file, and what it is about; a FileError names its own."""
    try:
        yield
    except FileError:
        raise
    except ValueError as error:
        raise file_error(path, f"{message_prefix}{error}", task) from None


class WriteError(OSError):
    """A file or folder cannot be written; the message names it and the remedy.

    Attributes:
        path: of the file or folder.
        system_message: by the system, on why.
        error_number: the system's error number, or None if it is unknown.
    """

    path: str
    system_message: str
    error_number: int | None


def unwritable_file_error(path: str | os.PathLike[str], cause: Exception) -> WriteError:
    """Return the error for a file or folder that cannot be written: one line, with the remedy.

    Args:
        path: of the file or folder, as the user knows it.
        cause: an OSError of the system, safetensors' error, or a WriteError about a part of the folder.
    """
    if isinstance(cause, WriteError):
        system_message, number = cause.system_message, cause.error_number
    elif isinstance(cause, OSError):
        system_message, number = cause.strerror or str(cause), cause.errno
    else:
        system_message, os_error_match = str(cause), _RUST_ERROR.search(str(cause))
        number = None if os_error_match is None else int(os_error_match[1])
    full = "make room on its disk, or choose another one"
    remedy = full if number in _FULL else "choose a directory that can be written"
    error = WriteError(f"cannot write {quoted_path(path)}: {truncated_error_line(system_message)}; {remedy}")
    error.path, error.system_message, error.error_number = os.fspath(path), system_message, number
    return error


def printable_line(text: str, max_length: int = 200) -> str:
    r"""Return text from a user or file as one line of at most ``max_length`` characters, for a message or table.

    Control, bidirectional and other invisible characters and lone surrogates are escaped as ``\x1b`` or ``\u202e``;
    the middle of a long text is replaced by ``...``. Backslashes are not escaped: escaped text does not change.
    """
    # Avoids escaping what is cut out below
    if len(text) > 2 * max_length:
        text = text[:max_length] + text[-max_length:]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > max_length:
        head = (max_length - 3) // 2
        text = f"{text[:head]}...{text[head + 3 - max_length :]}"
    return text


def quoted_path(path: str | os.PathLike[str]) -> str:
    """Return a path in quotes, for errors."""
    return printable_line(repr(os.fspath(path)), 400)


class _ShortRepr(reprlib.Repr):
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
            shown_fields = ((field.name, getattr(x, field.name)) for field in fields(x) if field.repr)
            return f"{kind}({', '.join(f'{name}={self.repr1(value, level - 1)}' for name, value in shown_fields)})"
        return super().repr_instance(x, level)


_REPR = _ShortRepr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxtuple = _REPR.maxlist = 8


def short_repr(value: object) -> str:
    """Return a short repr of any value, for errors; of tensors their shapes and dtypes, never their values."""
    return printable_line(_REPR.repr(value))


def is_one_of(value: object, choices: Iterable[object]) -> bool:
    """Whether a value equals one of the choices and is of its type: never an array, which compares by its items."""
    return any(isinstance(value, type(choice)) and value == choice for choice in choices)


def checked_path(argument_name: str, value: str | os.PathLike[str]) -> Path:
    """Return a path that a caller gave as an argument; a TypeError names the argument."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{argument_name}={short_repr(value)} must be the path of a file or folder")
    return Path(value)


def check_callable_with(argument_name: str, function: Any, requirement: str, *arguments: object) -> None:
    """Raise a TypeError unless a value can be called with ``arguments``; ``requirement`` says what it must be."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{argument_name}={short_repr(function)} must be {requirement}") from error
    except ValueError:
        # A builtin whose signature is unknown
        return


def truncated_error_line(text: str, reserved_length: int = 0) -> str:
    """Return text as one printable line of at most ``LIMIT - taken`` characters."""
    return printable_line(" ".join(text.split()), LIMIT - reserved_length)


def command_error_message(error: BaseException) -> str:
    """Return the message of a command for the exception that ended it."""
    if _is_out_of_memory(error):
        return f"{error_type_and_first_line(error)}; free memory, or take a smaller model, batch, shape or file"
    expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
    return _text_without_cpp_trace(exception_text(error)) if expected else error_type_and_first_line(error)


def is_internal_error(error: BaseException) -> bool:
    """Whether an exception is of no kind that lowmem raises for bad input, and memory has not run out."""
    return not isinstance(error, ValueError | OSError | ImportError | MemoryError) and not _is_out_of_memory(error)


def command_error_line(command: str, error: BaseException) -> str:
    """Return the line of a command for the exception that ended it; a fault's asks to report it."""
    if is_internal_error(error):
        return truncated_error_line(f"{command}: {error_type_and_first_line(error)}", len(_REPORT)) + _REPORT
    return truncated_error_line(f"{command}: {command_error_message(error)}")


def error_type_and_first_line(error: BaseException) -> str:
    """Return the type and the first line of any exception, and what it announces, in at most 120 characters."""
    text = (
        _OUT_OF_MEMORY if isinstance(error, MemoryError) else _text_without_cpp_trace(exception_text(error)).strip()
    )
    if text == _OUT_OF_MEMORY:
        return text
    first, *others = text.splitlines() or [""]
    if first.endswith(":") and others:
        first += f" {others[0].strip()}"
    return printable_line(f"{type(error).__name__}: {first}".removesuffix(": "), 120)


def model_build_failure_reason(error: BaseException) -> str:
    """Return why transformers cannot build a model; an error that lowmem's own code raised in the call says it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lowmem."):
        return truncated_error_line(command_error_message(error))
    return f"transformers cannot build this model ({error_type_and_first_line(error)}); get it again"


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError | RuntimeError) and _OUT_OF_MEMORY in error_type_and_first_line(error).lower()
    )


def exception_text(error: BaseException) -> str:
    """Return the text of any exception, also of one whose ``__str__`` fails."""
    try:
        return str(error)
    except (Exception, SystemExit) as failure:  # noqa: BLE001  a user's exception may have a broken __str__
        return f"its text cannot be shown: {type(failure).__name__}"


def _text_without_cpp_trace(text: str) -> str:
    return _CPP.sub("", _ALLOCATOR.sub(_OUT_OF_MEMORY, text))
