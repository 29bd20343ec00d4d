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

from lowmem.distributed.torchrun_processes import share_error_and_check_rank_zero, torchrun_rank_or_zero
from lowmem.errors import command_error_line, error_type_and_first_line, is_internal_error, truncated_error_line
from lowmem.tools import COMMANDS
from lowmem.tools.command_exit import INTERRUPTED, end_or_get_closed_pipe_exit_code, write_error_and_get_exit_code
from lowmem.tools.output import stdout_reserved_for_json
from lowmem.version import __version__

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class _OneLineErrorParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which raises errors of writing its output."""

    def error(self, message: str) -> NoReturn:
        see = f" (see {self.prog} --help)"
        line = truncated_error_line(f"{self.prog}: {message}", len(see)) + see
        self.exit(2, None if share_error_and_check_rank_zero(line) else line + "\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        print(message, end="", file=file or sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 usage or bad input, 3 a fault of lowmem,
    130 interrupted by Ctrl-C (143 by SIGTERM, 129 by SIGHUP).

    Without ``argv`` this process is the command's own: its arguments are ``sys.argv[1:]``, and SIGPIPE ends it when
    the reader of its output has closed the pipe.
    """
    program = argv is None
    arguments = sys.argv[1:] if argv is None else argv
    command = f"lowmem {arguments[0]}" if arguments and arguments[0] in COMMANDS else "lowmem"
    received: list[int] = []
    try:
        with _signals_as_keyboard_interrupt(program, received):
            if program:
                # Removes the hook for the imports
                sys.excepthook = sys.__excepthook__
                _open_and_escape_standard_streams()
            code = _parse_and_run(arguments, program)
            # Serve ends by itself
            return 128 + received[0] if received else code
    except BrokenPipeError:
        return end_or_get_closed_pipe_exit_code(program)
    except KeyboardInterrupt as interrupt:
        return _print_interruption_and_return_code(command, str(interrupt), received, program)
    except Exception as error:  # noqa: BLE001  of any kind: faults get a code of their own
        # A library has made an error of the KeyboardInterrupt
        if received:
            return _print_interruption_and_return_code(command, "", received, program)
        line, code = command_error_line(command, error), 3 if is_internal_error(error) else 2
        trace = format_exc() if "--debug" in arguments else ""
        return (
            code
            if share_error_and_check_rank_zero(line)
            else write_error_and_get_exit_code(trace + line, program, code)
        )


def _print_interruption_and_return_code(
    command: str, message: str, signal_numbers: Sequence[int], is_own_process: bool
) -> int:
    """Print that the command was interrupted, and return its exit code: 128 and the signal, as shells report it."""
    code = 128 + signal_numbers[0] if signal_numbers else INTERRUPTED
    # Torchrun interrupts the others when one has failed
    if torchrun_rank_or_zero() > 0:
        return code
    message = message or "interrupted; what was not finished is not there: run it again"
    return write_error_and_get_exit_code(f"{command}: {message}", is_own_process, code)


@contextmanager
def _signals_as_keyboard_interrupt(is_own_process: bool, received_signals: list[int]) -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that commands clean up; ignored signals (nohup) stay ignored.

    The numbers of the signals are appended to ``received_signals``.
    """

    def record_and_raise_interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
        received_signals.append(signal_number)
        raise KeyboardInterrupt

    names = ("SIGINT", "SIGTERM", "SIGHUP") if is_own_process else ("SIGTERM", "SIGHUP")
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, record_and_raise_interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_and_escape_standard_streams() -> None:
    """Open the null device for a closed stdout or stderr, so that no other file gets its descriptor.

    Characters that stdout cannot encode are escaped, as Python does for stderr.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _parse_and_run(argv: Sequence[str], is_own_process: bool) -> int:
    parser = _OneLineErrorParser(
        prog="lowmem",
        description="Make PyTorch models small, and measure what that does.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lowmem {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        # A new option would make abbreviations of others ambiguous
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        command.add_argument("--debug", action="store_true", help="print the traceback of an error before its line")
        if name in argv[:1]:
            import_module(f"lowmem.tools.{name}").add_arguments(command)
    if not argv:
        parser.print_help()
        sys.stdout.flush()
        return 0
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            command = commands.choices[arguments.command]
            command.error(f"unrecognized arguments: {' '.join(unknown)}{_suggested_option(command, unknown)}")
    finally:
        # Raises if --help is written to a closed pipe
        sys.stdout.flush()
    run = import_module(f"lowmem.tools.{arguments.command}").run
    try:
        arguments.command_line = list(argv)
        with stdout_reserved_for_json(getattr(arguments, "json", False), is_own_process):
            code: int = run(arguments)
            sys.stdout.flush()
    except SystemExit as stop:
        # From the user's model, since no command raises it
        raise ValueError(
            f"the model ended the program ({error_type_and_first_line(stop)}); remove its sys.exit"
        ) from stop
    return code


def _suggested_option(command: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """Return what to add to an error about unknown words: the option that the first one was meant to be, if any."""
    # With torch, which --help and --version do without
    from lowmem.tools.arguments import long_options, nearest_option_or_none

    options = (word.partition("=")[0] for word in words if word.startswith("--"))
    nearest = nearest_option_or_none(next(options, ""), long_options(command))
    return "" if nearest is None else f"; did you mean {nearest}?"


if __name__ == "__main__":
    sys.exit(main())
