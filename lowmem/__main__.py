"""``lowmem COMMAND ...``, the same as ``python -m lowmem COMMAND ...``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from lowmem.tools import COMMANDS
from lowmem.version import __version__

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 usage or bad input."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else ""
    try:
        with _terminated_as_interrupted():
            return _run(argv)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(command, " ".join(str(error).split()))
    except KeyboardInterrupt:
        return _fail(command, "interrupted; what was not finished is not there: run it again")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let a command that is told to end clean up, as Ctrl-C does."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.default_int_handler) for number in _numbers(names)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers(names: Sequence[str]) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _run(argv: Sequence[str]) -> int:
    parser = _Parser(prog="lowmem", description="Make PyTorch models small, and measure what that does.")
    parser.add_argument("--version", action="version", version=f"lowmem {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv[:1]:
            import_module(f"lowmem.tools.{name}").add_arguments(command)
    arguments = parser.parse_args(argv)
    code: int = import_module(f"lowmem.tools.{arguments.command}").run(arguments)
    return code


def _fail(command: str, reason: str) -> int:
    print(f"lowmem {command}: {reason}".replace("lowmem :", "lowmem:"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
