"""What `lowmem fit` reads of its data, refuses of it, and says of it."""

import json
from datetime import date
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from lowmem.__main__ import main
from lowmem.integrations.transformers import TextTokenizer
from lowmem.integrations.transformers.text_tokenizer import read_tokenizer
from lowmem.tools import fit_language
from lowmem.tools.chat_arguments import read_recorded_chat_settings
from tests.tools.conftest import CHAT, LINES

QA = [{"question": f"after {n}?", "answer": f"{n + 1}"} for n in range(20)]


def write_lines(name, rows):
    Path(name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")


@pytest.fixture
def shown(results):
    """Return a function that reads the data of a run, and returns the first example's text and what is learned."""

    def run(*options):
        found = results("fit", "llama", *options, "--show", "1")
        pieces = found["examples"][0]["pieces"]
        return "".join(text for text, _ in pieces), "".join(text for text, learned in pieces if learned), found

    return run


def test_prompts_are_messages_where_the_model_has_a_template(place, shown, capsys):
    write_lines("a.jsonl", [{"prompt": "after 1?", "completion": "2"}])
    assert shown("--data", "a.jsonl")[:2] == ("<user>after 1?;<assistant>2;", "2;")
    assert shown("--data", "a.jsonl", "--system", "add")[0] == "<system>add;<user>after 1?;<assistant>2;"
    assert shown("--data", "a.jsonl", "--chat-template", "none")[:2] == ("after 1?2</s>", "2</s>")
    Path("other.jinja").write_text(CHAT.replace("<", "[").replace(">", "]"))
    assert shown("--data", "a.jsonl", "--chat-template", "other.jinja")[:2] == ("[user]after 1?;[assistant]2;", "2;")
    Path("variable.jinja").write_text("{{ greeting }}" + CHAT)
    options = ["--chat-template", "variable.jinja", "--template-kwargs", '{"greeting": "hello"}']
    assert shown("--data", "a.jsonl", *options)[0] == "hello<user>after 1?;<assistant>2;"
    config = Path("llama", "tokenizer_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    assert shown("--data", "a.jsonl")[:2] == ("after 1?2</s>", "2</s>")


def test_the_first_line_says_what_was_read_as_what(place, capsys):
    argv = ["fit", "llama", "--steps", "1", "--rank", "2"]
    assert main([*argv, "--data", "data.jsonl"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    kinds = "20 text, 20 prompt and completion in the chat template, 20 messages"
    assert first == f"data: data.jsonl: {kinds}; up to 64 tokens in a row"
    assert main([*argv, "--data", "data.jsonl", "--data", "text.txt", "--chat-template", "none"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    kinds = "20 text, 20 prompt and completion as plain text, 20 messages, 1 text file"
    assert first == f"data: data.jsonl, text.txt: {kinds}; up to 64 tokens in a row"
    assert main([*argv, "--data", "data.jsonl", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"]["prompts"] == "chat"
    assert "\ndata: data.jsonl: 20 text, 20 prompt and completion in the chat template" in err


def test_strings_with_the_template_s_own_tokens_are_refused_with_the_option(place, refused):
    write_lines("a.jsonl", [{"prompt": "<s>after 1?", "completion": "2"}])
    told = refused("fit", "llama", "--data", "a.jsonl", "--show", "1")
    assert "line 1: prompt holds '<s>', which the chat template writes itself: take it out, or train" in told
    assert told.endswith("with --chat-template none\n")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_a_table_of_questions_is_read_with_the_columns_that_the_error_suggests(suffix, place, refused, shown):
    between = {"csv": ",", "tsv": "\t"}.get(suffix)
    if between:
        write_lines(f"qa.{suffix}", [between.join(QA[0]), *(between.join(row.values()) for row in QA)])
    elif suffix == "json":
        Path("qa.json").write_text(json.dumps({"data": QA}))
    else:
        write_lines("qa.jsonl", QA)
    first = {"csv": "line 2", "tsv": "line 2", "json": "row 1", "jsonl": "line 1"}[suffix]
    told = refused("fit", "llama", "--data", f"qa.{suffix}", "--show", "1")
    assert f"cannot read 'qa.{suffix}': {first}, as each of its 20 rows: it has keys 'question', 'answer'" in told
    remedy = "--columns prompt=question completion=answer"
    assert told.endswith(f"name its columns with {remedy}\n")
    assert shown("--data", f"qa.{suffix}", *remedy.split())[0] == "<user>after 0?;<assistant>1;"


def test_bad_columns_are_refused(place, refused):
    write_lines("qa.jsonl", QA)
    for columns, why in (
        (["promt=question"], "'promt=question' must be KEY=COLUMN, where KEY is one of text, messages, prompt"),
        (["prompt"], "'prompt' must be KEY=COLUMN"),
        (["prompt="], "'prompt=' must be KEY=COLUMN"),
        (["prompt=question", "prompt=answer"], "--columns names prompt more than once: give each key one column"),
        (["prompt=question", "completion=a"], "and --columns names 'a': name columns that are there"),
    ):
        assert why in refused("fit", "llama", "--data", "qa.jsonl", "--columns", *columns, "--show", "1"), columns


def test_each_row_with_a_mistake_is_named_and_can_be_skipped(place, capsys, results):
    bad = {n: "{" if n % 2 else json.dumps({"prompt": f"{n}"}) for n in range(30, 1000, 49)}
    rows = [bad.get(n, json.dumps({"prompt": f"{n}", "completion": f"{n + 1}"})) for n in range(1, 1001)]
    assert len(bad) == 20
    write_lines("a.jsonl", rows)
    argv = ["fit", "llama", "--data", "a.jsonl", "--show", "1"]
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines[:-1]] == [f" line {n}" for n in bad]
    assert lines[-1] == (
        "lowmem fit: cannot read 'a.jsonl': 20 of 1,000 rows have mistakes, the first is line 30: mend them, or add "
        "--skip-bad-rows to train without them"
    )
    assert main([*argv, "--skip-bad-rows"]) == 0
    out, err = capsys.readouterr()
    assert "data: a.jsonl: 980 prompt and completion in the chat template" in out
    assert err.splitlines()[0] == "lowmem fit: 20 of 1,000 rows of a.jsonl are left out:"
    assert [line.split(":")[1] for line in err.splitlines()[1:21]] == [f" line {n}" for n in bad]


def test_rows_that_are_only_mistakes_are_refused_also_where_they_would_be_skipped(place, refused):
    write_lines("a.jsonl", [{"txt": 1}, {"txt": 2}])
    told = refused("fit", "llama", "--data", "a.jsonl", "--skip-bad-rows", "--show", "1")
    assert "line 1, as each of its 2 rows: it has keys 'txt'" in told


def test_several_files_and_folders_are_mixed(place, results):
    Path("more").mkdir()
    write_lines("more/qa.csv", ["instruction,output", *(",".join(row.values()) for row in QA)])
    found = results("fit", "llama", "--data", "data.jsonl", "--data", "more", "--steps", "1", "--save", "out")
    record = json.loads(Path("out", "training.json").read_text())
    assert (found["run"]["examples"], record["data"]) == (80, "data.jsonl, more")
    assert "trained on `data.jsonl, more`" in Path("out", "README.md").read_text()
    # One file has the digest that it had before several could be named
    found = results("fit", "llama", "--data", "more/qa.csv", "--steps", "1")
    digest = found["run"]["data"]
    assert digest == results("fit", "llama", "--data", "more", "--steps", "1")["run"]["data"]


def test_what_is_wrong_with_rows_is_said_with_the_first_row(place, capsys):
    config = Path("llama", "tokenizer_config.json")
    template = CHAT.replace("in messages %}", "in messages if m.role != 'system' %}").replace("};", "}")
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    talk = LINES[-1]["messages"]
    rows = [{"messages": talk}, {"messages": [{"role": "system", "content": "be kind"}, *talk]}]
    rows += [{"prompt": "a" * 70, "completion": "b"}]
    write_lines("a.jsonl", rows)
    write_lines("b.jsonl", [{"messages": [{"role": "user", "content": "new"}, talk[1]]}, {"messages": talk}])
    assert main(["fit", "llama", "--data", "a.jsonl", "--eval-data", "b.jsonl", "--steps", "1", "--cut"]) == 0
    told = capsys.readouterr().err
    for line in (
        "the chat template leaves out the message of the system: 1 rows of a.jsonl, the first is line 2",
        "no special token ends the answer, so that the model does not learn to stop: 3 rows of a.jsonl, the first is "
        "line 1",
        "1 examples of a.jsonl are left out, since nothing that counts is left; the first is line 3",
        "1 of the 2 held-out examples also stand in the part that is trained, so that its loss is too low; the "
        "first is line 2",
    ):
        assert f"lowmem fit: {line}\n" in told


def test_the_length_follows_from_the_data(place, shown):
    config = Path("llama", "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 4096}))
    base = len("<user>;<assistant>;")
    lengths = [100, 101, *[200] * 97, 1000]
    write_lines("a.jsonl", [{"prompt": "a" * (n - base - 1), "completion": "b"} for n in lengths])
    *_, found = shown("--data", "a.jsonl")
    assert (found["length"], found["lengths"]) == (256, {"median": 200, "90%": 200, "99%": 200, "longest": 1000})
    write_lines("b.jsonl", [{"prompt": "a" * 3000, "completion": "b"}])
    assert shown("--data", "b.jsonl", "--cut", "--length", "4096")[2]["length"] == 4096
    Path("c.txt").write_text("a" * 5000)
    *_, found = shown("--data", "c.txt")
    assert (found["length"], found["lengths"]["longest"]) == (512, 512)
    write_lines("d.jsonl", [{"text": "a" * 3000}])
    assert shown("--data", "d.jsonl")[2]["length"] == 2048
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 128}))
    assert shown("--data", "a.jsonl", "--cut")[2]["length"] == 128


def test_options_on_conversations_are_refused_where_there_are_none(place, refused):
    Path("own.jinja").write_text(CHAT)
    for option, value in (("--system", "a"), ("--template-kwargs", "{}"), ("--chat-template", "own.jinja")):
        told = refused("fit", "llama", "--data", "text.txt", option, value, "--show", "1")
        assert f"{option} applies to conversations, and the data has none: leave it out" in told


def test_the_end_of_an_answer_is_learned_where_it_is_the_padding_token(place, results):
    tokenizer = read_tokenizer(Path("llama"))
    assert tokenizer.pad_token_id == TextTokenizer(tokenizer).end
    write_lines("a.jsonl", [{"prompt": "a", "completion": "b"}])
    found = results("fit", "llama", "--data", "a.jsonl", "--chat-template", "none", "--show", "1")
    assert found["examples"][0]["pieces"] == [["a", False], ["b</s>", True]]
    assert found["examples"][0]["tokens"][-1] == tokenizer.pad_token_id


def test_settings_of_the_chat_are_recorded_and_change_a_run(place, capsys, refused):
    argv = ["fit", "llama", "--data", "data.jsonl", "--steps", "1", "--save", "out"]
    assert main([*argv, "--system", "add", "--template-kwargs", '{"a": 1}']) == 0
    record = json.loads(Path("out", "training.json").read_text())
    assert record["chat"] == {"system": "add", "template_kwargs": {"a": 1}, "date": None}
    told = refused("fit", *argv[1:], "--system", "other", "--template-kwargs", '{"a": 1}', "--resume")
    assert "system was 'add' and is 'other': go on with what the run was started with" in told


@pytest.mark.parametrize("is_done", [False, True])
def test_runs_of_earlier_versions_go_on_without_new_options(is_done, place, capsys, monkeypatch):
    """They trained prompts as plain text in rows of 512 tokens, or of as many as the model takes."""
    config = Path("llama", "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    argv = ["fit", "llama", "--data", "data.jsonl", "--data", "text.txt", "--steps", "3", "--save", "out"]
    with monkeypatch.context() as patch:
        if not is_done:
            patch.setattr(
                fit_language, "write_adapter_folder", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        code = main([*argv, "--length", "512", "--chat-template", "none", "--save-every", "1"])
        assert code == (0 if is_done else 130)
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 0
    run = json.loads(Path("out", "training.json").read_text())["run"]
    assert (run["length"], run["prompts"], run["window"]) == (512, None, None)
    assert ("is complete already" in capsys.readouterr().err) == is_done


def test_a_run_goes_on_with_the_options_that_it_was_started_with(place, capsys):
    write_lines("qa.jsonl", [{"q": "a" * 600, "a": "b"}] * 2)
    Path("text.txt").write_text("a" * 1200)
    config = Path("llama", "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    argv = ["fit", "llama", "--data", "qa.jsonl", "--data", "text.txt", "--steps", "1", "--save", "out"]
    Path("own.jinja").write_text("own" + CHAT)
    options = ["--columns", "prompt=q", "completion=a", "--system", "be kind", "--chat-template", "own.jinja"]
    assert main([*argv, *options]) == 0
    run = json.loads(Path("out", "training.json").read_text())["run"]
    assert (run["length"], run["window"], run["system"]) == (640, 512, "be kind")
    Path("own.jinja").unlink()
    assert main([*argv, "--resume"]) == 0
    assert "is complete already" in capsys.readouterr().err
    # The template is the adapter's own, too
    assert read_tokenizer(Path("out")).chat_template == "own" + CHAT


def test_a_state_holds_the_template_that_the_run_was_started_with(place, capsys, monkeypatch):
    Path("own.jinja").write_text("own" + CHAT)
    argv = ["fit", "llama", "--data", "data.jsonl", "--steps", "3", "--save-every", "1", "--save"]
    options = ["--chat-template", "own.jinja", "--template-kwargs", '{"a": 1}', "--system", "add"]
    assert main([*argv, "whole", *options]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(fit_language, "write_adapter_folder", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*argv, "out", *options]) == 130
    Path("own.jinja").write_text(CHAT)
    assert main([*argv, "out", "--resume"]) == 0
    for name in ("adapter_model.safetensors", "tokenizer.json", "training.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes(), name
    capsys.readouterr()
    assert main([*argv, "whole", "--chat-template", "own.jinja", "--resume"]) == 2
    assert "chat_template was " in capsys.readouterr().err


def test_the_date_that_a_template_writes_stays_that_of_the_training(place, capsys, monkeypatch, shown):
    undated = "{% if date_string is not defined %}{% set date_string = DATE %}{% endif %}{{ date_string }}" + CHAT
    dated = undated.replace("DATE", "strftime_now('%d %b %Y')")
    config = Path("llama", "tokenizer_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": dated}))
    data = ["--data", "data.jsonl", "--steps", "1"]
    assert main(["fit", "llama", *data, "--save", "out"]) == 0
    today = date.today()
    note = f"lowmem fit: the chat template writes today's date into prompts: that of OUT writes {today} every day\n"
    assert capsys.readouterr().err.count(note) == 1
    assert read_recorded_chat_settings(Path("out"), "training.json").date == str(today)
    write_lines("talk.jsonl", [LINES[-1]])
    assert shown("--data", "talk.jsonl")[0].startswith(f"{today:%d %b %Y}<user>")
    assert read_tokenizer(Path("out")).chat_template == undated.replace("DATE", f'"{today:%d %b %Y}"')
    # The run is one of another day
    record = Path("out", "training.json")
    record.write_text(record.read_text().replace(str(today), "2024-07-26"))
    assert main(["fit", "llama", *data, "--save", "out", "--resume"]) == 0
    assert "is complete already" in capsys.readouterr().err
    options = ["--template-kwargs", '{"date_string": "long ago"}']
    assert main(["fit", "llama", *data, *options, "--save", "fixed"]) == 0
    assert "today's date" not in capsys.readouterr().err
    assert shown("--data", "talk.jsonl", *options)[0].startswith("long ago<user>")
    write_lines("text.jsonl", LINES[:20])
    assert main(["fit", "llama", "--data", "text.jsonl", "--steps", "1"]) == 0
    assert "today's date" not in capsys.readouterr().err


def test_names_of_files_that_are_missing_are_no_names_of_the_hub(place, refused):
    for name in ("missing.jsonl", "a/missing.csv", "./a/b", "a/b/c"):
        told = refused("fit", "llama", "--data", name, "--show", "1")
        assert "cannot read" in told, told


PAIRS = [{"prompt": f"{n} and {n} is ", "chosen": f"{2 * n}", "rejected": f"{2 * n}, or so"} for n in range(12)]


def test_preferences_need_their_method_and_the_method_needs_them(place, refused):
    write_lines("pairs.jsonl", PAIRS)
    write_lines("other.jsonl", [{"question": "q", "preferred": "a", "rejected": "b"}])
    argv = ["fit", "llama", "--data"]
    assert "preferences are trained with --method dpo" in refused(*argv, "pairs.jsonl")
    assert "preferences are trained with --method dpo" in refused(*argv, "other.jsonl")
    told = refused(*argv, "other.jsonl", "--method", "dpo")
    assert "name its columns with --columns prompt=question chosen=preferred rejected=rejected" in told
    told = refused(*argv, "data.jsonl", "--method", "dpo")
    assert "--method dpo takes prompt, chosen and rejected: give it these, or leave --method out" in told
    told = refused(*argv, "text.txt", "--method", "dpo")
    assert "it is a text, and --method dpo takes prompt, chosen and rejected: leave --method out" in told
    for options in (["--beta", "0.1"], ["--beta", "0.1", "--method", "sft"]):
        told = refused(*argv, "pairs.jsonl", *options)
        assert "--beta=0.1 applies to preferences: add --method dpo, or leave it out" in told
    told = refused(*argv, "pairs.jsonl", "--method", "dpo", "--compare-dense")
    assert "--compare-dense measures a perplexity, which --method dpo has none of: leave it out" in told


def test_both_answers_of_preferences_are_shown(place, shown):
    write_lines("pairs.jsonl", [{"q": "1 and 1", "chosen": "2", "no": "2, or so"}])
    columns = ["--columns", "prompt=q", "chosen=chosen", "rejected=no"]
    text, learned, found = shown("--data", "pairs.jsonl", "--method", "dpo", "--system", "be brief", *columns)
    assert (text, learned) == ("<system>be brief;<user>1 and 1;<assistant>2;", "2;")
    chosen, rejected = found["examples"]
    assert (chosen["place"], rejected["place"]) == ("line 1, chosen", "line 1, rejected")
    assert rejected["pieces"][-1] == ["2, or so;", True]
