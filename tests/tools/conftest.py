"""What tests of the commands share: user modules, results, and errors of one line."""

import json
import sys
from pathlib import Path

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


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LINES = [{"text": f"item {n} costs {n * 7 % 10}"} for n in range(20)]
LINES += [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(20)]
LINES += [
    {"messages": [{"role": "user", "content": f"after {n}?"}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(20)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of a tiny llama with a tokenizer, and a file of examples."""
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    from tests.integrations.transformers.folders import write
    from tests.integrations.transformers.tokens import write_tokenizer

    monkeypatch.chdir(tmp_path)
    write_tokenizer(write(Path("llama")))
    config = Path("llama", "tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": CHAT}))
    Path("data.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    Path("text.txt").write_text(" ".join(line["text"] for line in LINES[:20]))
    return tmp_path
