"""What the ``lowmem`` command does before it imports torch, so that no import ends in a traceback.

``python -m lowmem`` and the installed script import the whole package before ``main`` can catch anything: the hooks
are for that time. A process that only imports the library keeps its own.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from lowmem.messages import one_line, reason

__all__ = ["guard_imports", "is_command"]


def is_command() -> bool:
    """Return whether this process was started as ``python -m lowmem`` or as the installed script."""
    if sys.argv[:1] == ["-m"]:  # while the module that -m names is looked for
        module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]  # or the option and it: -mlowmem
        return re.fullmatch(r"(-\w*m)?lowmem", module) is not None
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("lowmem", "lowmem.exe", "lowmem-script.py")


def guard_imports() -> None:
    """Let the command end in one line, where an import fails (exit code 2) or is interrupted (130)."""
    if is_command():
        sys.excepthook = _tell
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
            signal.signal(signal.SIGINT, _stop)


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not isinstance(error, ValueError | OSError | ImportError | MemoryError):
        sys.__excepthook__(kind, error, traceback)
        return
    print(one_line(f"lowmem: {reason(error)}"), file=sys.stderr)
    raise SystemExit(2)


def _stop(number: int, frame: object) -> NoReturn:
    # No KeyboardInterrupt: what is being imported may swallow it, or wrap it. There is nothing to clean up yet.
    with suppress(OSError):  # stderr is closed
        os.write(2, b"lowmem: interrupted\n")
    os._exit(128 + number)
