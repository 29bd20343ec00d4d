"""`lowmem fit --show N` prints rendered examples with what is learned, their ends and lengths; it trains nothing."""

import json
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from lowmem.__main__ import main
from lowmem.tools import fit_job, fit_show
from tests.tools.conftest import CHAT


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(fit_job, "base_files_sha256", lambda path: pytest.fail("it reads the weights"))


@pytest.mark.usefixtures("no_weights")
def test_what_is_learned_is_underlined_where_there_are_no_colours(place, capsys):
    talk = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c\nd"}]
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in [{"messages": talk}, {"text": "efg"}]))
    before = sorted(place.rglob("*"))
    assert main(["fit", "llama", "--data", "a.jsonl", "--show", "2", "--save", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data: a.jsonl: 1 messages, 1 text; up to 64 tokens in a row",
        "",
        "line 1: 25 tokens, learned to the end of 'c\\nd;'",
        "<user>a",
        "b;<assistant>c",
        "             ^^",
        "d;",
        "^^",
        "",
        "line 2: 4 tokens, learned to the end of 'fg</s>'",
        "efg</s>",
        " ^^^^^^",
        "",
        "tokens of the 2 examples: median 4, 90% 25, 99% 25, longest 25; --length 64",
    ]
    assert sorted(place.rglob("*")) == before


@pytest.mark.usefixtures("no_weights")
def test_control_characters_are_written_out_and_wide_ones_have_two_marks(place, capsys):
    Path("a.jsonl").write_text(json.dumps({"prompt": "\x1b[31m\ta\x9b", "completion": "b\u6f22\x07"}))
    assert main(["fit", "llama", "--data", "a.jsonl", "--show", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:5] == [
        "<user>\\x1b[31m\\ta\\x9b;<assistant>b漢\\x07;",
        " " * len("<user>\\x1b[31m\\ta\\x9b;<assistant>") + "^" * 8,
    ]


@pytest.mark.usefixtures("no_weights")
def test_what_is_learned_is_coloured_on_a_terminal(place, capsys, monkeypatch):
    made = Console
    monkeypatch.setattr(
        fit_show, "Console", lambda **options: made(**options, force_terminal=True, color_system="standard")
    )
    Path("a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    assert main(["fit", "llama", "--data", "a.jsonl", "--show", "1"]) == 0
    assert "<user>a;<assistant>\x1b[1;32mb;\x1b[0m\n" in capsys.readouterr().out


def test_more_examples_than_there_are_are_all_of_them(place, results, refused):
    found = results("fit", "llama", "--data", "data.jsonl", "--show", "99")
    assert len(found["examples"]) == 60
    assert found["examples"][0]["place"] == "line 1"
    assert found["lengths"].keys() == {"median", "90%", "99%", "longest"}
    assert "--data must name a file of texts" in refused("fit", "llama", "--show", "1")


def test_examples_are_shown_as_an_earlier_run_read_them(place, results):
    Path("a.jsonl").write_text("\n".join(json.dumps({"q": f"{n}?", "a": "b"}) for n in range(3)))
    Path("own.jinja").write_text("own" + CHAT)
    argv = ["fit", "llama", "--data", "a.jsonl"]
    options = ["--columns", "prompt=q", "completion=a", "--system", "s", "--chat-template", "own.jinja"]
    assert main([*argv, *options, "--steps", "1", "--save", "out"]) == 0
    Path("own.jinja").unlink()
    for run in (["--config", "out/training.json"], ["--save", "out", "--resume"]):
        found = results(*argv, *run, "--show", "1")
        assert "".join(text for text, _ in found["examples"][0]["pieces"]) == "own<system>s;<user>0?;<assistant>b;"
