"""What tests of the commands share: user modules, results, and errors of one line."""

import json
import sys

import pytest

from lowmem.__main__ import main


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Return a function that writes a module into the working directory, which is ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    names = []

    def write(name, text):
        names.append(name)
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def results(capsys):
    """Return a function that runs a command with ``--json`` and returns the document."""

    def run(*argv):
        capsys.readouterr()
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys):
    """Return a function that runs a command that must end with code 2 and one short line, and returns that line.

    ``printed`` is the first word of what the command prints to stdout before.
    """

    def run(*argv, printed=""):
        capsys.readouterr()
        try:
            code = main(list(map(str, argv)))
        except SystemExit as stopped:  # argparse ends the process
            code = stopped.code
        out, err = capsys.readouterr()
        assert (code, out.partition(" ")[0], err.count("\n")) == (2, printed, 1), err
        assert err.startswith("lowmem")
        assert err[:-1].isprintable()
        assert len(err) < 300
        return err

    return run
