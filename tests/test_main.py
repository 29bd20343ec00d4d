"""The command line: one line and exit code 2 for bad input, nothing on stdout but results."""

import subprocess
import sys

import pytest

from lowmem import __version__
from lowmem.__main__ import main
from lowmem.tools import COMMANDS


def run(*argv):
    """Return the exit code, whether main returns it or argparse exits with it."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"lowmem {__version__}\n"
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert run(command, "--help") == 0
    assert f"usage: lowmem {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["stats", "--unknown"],
        ["stats", "q4"],
        ["stats", "--batch", "0"],
        ["stats", "--batch", "two"],
        ["stats", "--input-shape", "3,-1"],
        ["stats", "--json", "--markdown"],
        ["stats", "bignet", "--batch", "9999999999999"],
        ["stats", "bignet", "--input-shape", "99999999999999"],
        ["stats", "--seed", "99999999999999999999"],
        ["stats", "--seed", "-1"],
        ["fit", "lora", "--rank", "999999999999"],
        ["compare", "bignet"],
        ["compare", "--tolerance", "-1"],
        ["compare", "--tolerance", "x"],
        ["fit"],
        ["fit", "q4"],
        ["fit", "lora", "--epochs", "0"],
        ["fit", "lora", "--lr", "nan"],
        ["fit", "lora", "--rank", "0"],
        ["fit", "lora", "--rank", "1.5"],
        ["fit", "low_precision", "--rank", "4"],
        ["fit", "lora", "--data", "mnist"],
        ["fit", "lora", "--data", "missing.npz"],
        ["bundle", "missing", "name"],
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(argv, capsys):
    assert run(*argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("lowmem")


def test_ctrl_c_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem.tools.stats.run", interrupted)
    assert run("stats") == 2
    assert capsys.readouterr().err == "lowmem stats: interrupted; what was not finished is not there: run it again\n"


def test_python_m_lowmem_is_the_same():
    shown = subprocess.run(
        [sys.executable, "-m", "lowmem", "stats", "q4"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 2
    assert shown.stderr.startswith("lowmem stats: variant='q4' is unknown: choose from bignet")
