"""What the ``lowmem`` command does before it imports torch, so that no import ends in a traceback.

``python -m lowmem`` and the installed script import the whole package before ``main`` can catch anything: the hooks
are for that time. A process that only imports the library keeps its own. Importing this module takes as little time
as possible: until SIGINT is handled, Ctrl-C is a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import TracebackType

__all__ = ["CLOSED_PIPE", "discard_output", "end_closed_pipe", "guard_imports", "is_command", "write_error"]

CLOSED_PIPE = 141  # what shells show of a program that SIGPIPE ended

# What a broken installation raises while it is imported; anything else is a bug, which keeps its traceback.
_BROKEN = (
    *(ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError),
    *(AttributeError, LookupError, SyntaxError),
)


def is_command() -> bool:
    """Return whether this process was started as ``python -m lowmem`` or as the installed script."""
    if sys.argv[:1] == ["-m"]:  # while the module that -m names is looked for
        module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]  # or the option and it: -mlowmem
        option = module.removesuffix("lowmem")
        return option != module and (not option or (option.startswith("-") and option.endswith("m")))
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("lowmem", "lowmem.exe", "lowmem-script.py")


def guard_imports() -> None:
    """Let the command end with exit code 2 and one line, where an import fails or is interrupted."""
    if not is_command():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, _stop)
    # Here, because it takes a while; and not in the hook, because the package is gone once its import has failed.
    from lowmem.errors import one_line, reason

    def tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, _BROKEN):
            raise SystemExit(write_error(one_line(f"lowmem: {reason(error)}"), program=True))
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = tell


def write_error(line: str, program: bool) -> int:
    """Write the one line that says why the command ends to stderr, and return its exit code.

    Args:
        line: without its line end.
        program: the process is the command's, and about to end.
    """
    try:
        if sys.stderr is not None:  # it was closed at the start
            print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        return end_closed_pipe(program)
    except (OSError, ValueError):  # a full disk, or a closed file: nothing can be said
        pass
    if program:
        discard_output()
    return 2


def end_closed_pipe(program: bool) -> int:
    """End without a word, as programs do whose reader has gone, or return the exit code that says so."""
    if program:
        discard_output()
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPIPE)
    return CLOSED_PIPE


def discard_output() -> None:
    """Write what stdout and stderr hold, or drop it: Python would try again at its end, and complain."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _stop(number: int, frame: object) -> None:
    # No KeyboardInterrupt: what is being imported may swallow it, or wrap it. There is nothing to clean up yet.
    with suppress(OSError):  # stderr is closed
        os.write(2, b"lowmem: interrupted\n")
    os._exit(2)
