"""How the ``lowmem`` command ends where ``main`` cannot catch an exception: with one line for an import that fails or
is interrupted, and silently for a closed pipe."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import NoReturn

# 128 + SIGPIPE: what shells report for a process that SIGPIPE ended
CLOSED_PIPE = 141
# 128 + SIGINT: what shells report for Ctrl-C
INTERRUPTED = 130

# Exceptions of broken installations during imports; any other is a fault of lowmem.
_BROKEN = (
    *(ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError),
    *(AttributeError, LookupError, SyntaxError),
)


def is_lowmem_command_process() -> bool:
    """Whether this process was started as ``python -m lowmem`` or as the installed script."""
    # The value while Python locates the module
    if sys.argv[:1] == ["-m"]:
        # "lowmem", or with the option: "-mlowmem"
        module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
        option = module.removesuffix("lowmem")
        return option != module and (not option or (option.startswith("-") and option.endswith("m")))
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("lowmem", "lowmem.exe", "lowmem-script.py")


def install_import_failure_handlers() -> None:
    """Make the command end with one line if an import fails: with exit code 2, or 3 for a fault of lowmem.

    Ctrl-C during the imports ends it with one line and exit code 130.
    """
    if not is_lowmem_command_process():
        return
    # Not where it is ignored
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_immediately_on_sigint)
    # Not imported in the hook, since a package whose import has failed can no longer be imported from.
    from traceback import format_exception

    from lowmem.errors import command_error_line, command_error_message, truncated_error_line

    def exit_with_error_line(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        broken = isinstance(error, _BROKEN)
        line = (
            truncated_error_line(f"lowmem: {command_error_message(error)}")
            if broken
            else command_error_line("lowmem", error)
        )
        trace = "".join(format_exception(error)) if "--debug" in sys.argv else ""
        raise SystemExit(write_error_and_get_exit_code(trace + line, owns_process=True, exit_code=2 if broken else 3))

    sys.excepthook = exit_with_error_line


def _exit_immediately_on_sigint(signal_number: int, frame: FrameType | None) -> NoReturn:
    """End the process at once: a KeyboardInterrupt could be swallowed by an import, which has nothing to clean up."""
    with suppress(OSError):
        os.write(2, b"lowmem: interrupted\n")
    os._exit(INTERRUPTED)


def write_error_and_get_exit_code(line: str, owns_process: bool, exit_code: int = 2) -> int:
    """Write an error line to stderr, and return the exit code.

    Args:
        line: without its line end.
        owns_process: whether the process is the command's own, and about to end.
        exit_code: that is returned, unless nobody reads the line.
    """
    try:
        # None if it was closed at the start
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        return end_or_get_closed_pipe_exit_code(owns_process)
    except (OSError, ValueError):
        # A full disk, or a closed file: the error cannot be shown
        pass
    if owns_process:
        flush_or_discard_output()
    return exit_code


def end_or_get_closed_pipe_exit_code(owns_process: bool) -> int:
    """End the process silently by SIGPIPE, if it is the command's own; otherwise return ``CLOSED_PIPE``."""
    if owns_process:
        flush_or_discard_output()
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPIPE)
    return CLOSED_PIPE


def flush_or_discard_output() -> None:
    """Flush stdout and stderr, or discard their buffers, which Python would flush with an error at exit."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
