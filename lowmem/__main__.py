"""The command line: ``lowmem COMMAND ...`` or ``python -m lowmem COMMAND ...``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from traceback import format_exc
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from lowmem.distributed.processes import is_told_by_first, started_rank
from lowmem.errors import describe, error_line, is_fault, one_line
from lowmem.tools import COMMANDS
from lowmem.tools.output import stdout_for_json
from lowmem.tools.startup import INTERRUPTED, end_closed_pipe, write_error
from lowmem.version import __version__

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which raises errors of writing its output."""

    def error(self, message: str) -> NoReturn:
        see = f" (see {self.prog} --help)"
        line = one_line(f"{self.prog}: {message}", len(see)) + see
        self.exit(2, None if is_told_by_first(line) else line + "\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        print(message, end="", file=file or sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 usage or bad input, 3 a fault of lowmem,
    130 interrupted by Ctrl-C (143 by SIGTERM, 129 by SIGHUP).

    Without ``argv`` this process is the command's own: its arguments are ``sys.argv[1:]``, and SIGPIPE ends it when
    the reader of its output has closed the pipe.
    """
    program = argv is None
    given = sys.argv[1:] if argv is None else argv
    command = f"lowmem {given[0]}" if given and given[0] in COMMANDS else "lowmem"
    received: list[int] = []
    try:
        with _terminated_as_interrupted(program, received):
            if program:
                sys.excepthook = sys.__excepthook__  # removes the hook for the imports
                _prepare_streams()
            code = _run(given, program)
            return 128 + received[0] if received else code  # serve ends by itself
    except BrokenPipeError:
        return end_closed_pipe(program)
    except KeyboardInterrupt as interrupt:
        return _end_interrupted(command, str(interrupt), received, program)
    except Exception as error:  # noqa: BLE001  of any kind: faults get a code of their own
        if received:  # a library has made an error of the KeyboardInterrupt
            return _end_interrupted(command, "", received, program)
        line, code = error_line(command, error), 3 if is_fault(error) else 2
        trace = format_exc() if "--debug" in given else ""
        return code if is_told_by_first(line) else write_error(trace + line, program, code)


def _end_interrupted(command: str, told: str, received: Sequence[int], program: bool) -> int:
    """Print that the command was interrupted, and return its exit code: 128 and the signal, as shells report it."""
    code = 128 + received[0] if received else INTERRUPTED
    if started_rank() > 0:  # torchrun interrupts the others when one has failed
        return code
    told = told or "interrupted; what was not finished is not there: run it again"
    return write_error(f"{command}: {told}", program, code)


@contextmanager
def _terminated_as_interrupted(program: bool, received: list[int]) -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that commands clean up; ignored signals (nohup) stay ignored.

    The numbers of the signals are appended to ``received``.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    names = ("SIGINT", "SIGTERM", "SIGHUP") if program else ("SIGTERM", "SIGHUP")
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_streams() -> None:
    """Open the null device for a closed stdout or stderr, so that no other file gets its descriptor.

    Characters that stdout cannot encode are escaped, as Python does for stderr.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str], program: bool) -> int:
    parser = _Parser(prog="lowmem", description="Make PyTorch models small, and measure what that does.")
    parser.add_argument("--version", action="version", version=f"lowmem {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.add_argument("--debug", action="store_true", help="print the traceback of an error before its line")
        if name in argv[:1]:
            import_module(f"lowmem.tools.{name}").add_arguments(command)
    if not argv:
        parser.print_help()
        sys.stdout.flush()
        return 0
    try:
        arguments = parser.parse_args(argv)
    finally:
        sys.stdout.flush()  # raises if --help is written to a closed pipe
    run = import_module(f"lowmem.tools.{arguments.command}").run
    try:
        arguments.command_line = list(argv)
        with stdout_for_json(getattr(arguments, "json", False), program):
            code: int = run(arguments)
            sys.stdout.flush()
    except SystemExit as stop:  # from the user's model, since no command raises it
        raise ValueError(f"the model ended the program ({describe(stop)}); remove its sys.exit") from stop
    return code


if __name__ == "__main__":
    sys.exit(main())
