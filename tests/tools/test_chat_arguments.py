"""The chat template, its variables and the system message are those that are named, or those of the record."""

import argparse
import json
from types import SimpleNamespace

import pytest
from jinja2 import Environment

from lowmem import FileError
from lowmem.tools.chat_arguments import (
    ChatSettings,
    add_chat_arguments,
    apply_chat_arguments,
    read_recorded_chat_settings,
    template_with_settings,
)


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser, "a template")
    return parser.parse_args(argv)


def test_what_is_not_named_is_as_recorded(tmp_path):
    recorded = ChatSettings("be kind", {"a": 1})
    (tmp_path / "a.jinja").write_text("{{ messages }}\n")
    tokenizer = SimpleNamespace(chat_template="own")
    assert apply_chat_arguments(parsed(), tokenizer, recorded) == recorded
    assert tokenizer.chat_template == "own"
    given = parsed("--system", "s", "--template-kwargs", '{"b": [2]}', "--chat-template", str(tmp_path / "a.jinja"))
    found = apply_chat_arguments(given, tokenizer, recorded)
    assert found == ChatSettings("s", {"b": [2]}, "{{ messages }}\n")
    assert tokenizer.chat_template == "{{ messages }}\n"
    assert apply_chat_arguments(parsed("--chat-template", "none"), tokenizer) == ChatSettings()
    assert tokenizer.chat_template == "{{ messages }}\n"
    assert apply_chat_arguments(parsed("--template-kwargs", "{}"), tokenizer, recorded).template_kwargs == {}
    assert apply_chat_arguments(parsed(), tokenizer, ChatSettings(template="recorded")).template == "recorded"
    assert tokenizer.chat_template == "recorded"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}{{ strftime_now( \"%Y\" ) }}", '{{ "26 Jul 2024" }}{{ "2024" }}'),
        ("{% set day = strftime_now('%Y') %}", '{% set day = "2024" %}'),
        ("{% set date_string = strftime_now('%Y') %}", None),  # a variable that is given
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_template_that_writes_the_date_of_the_day_writes_the_recorded_one(template, expected):
    tokenizer = SimpleNamespace(chat_template=template)
    recorded = ChatSettings(template_kwargs={"date_string": "a"}, date="2024-07-26")
    assert apply_chat_arguments(parsed(), tokenizer, recorded).date == (expected and recorded.date)
    assert tokenizer.chat_template == (template if expected is None else expected)
    if expected:
        assert apply_chat_arguments(parsed(), SimpleNamespace(chat_template=template)) == ChatSettings()


def test_settings_come_back_from_a_record(tmp_path):
    assert read_recorded_chat_settings(tmp_path, "training.json") == ChatSettings()
    assert read_recorded_chat_settings(tmp_path / "missing", "training.json") == ChatSettings()
    for settings in (ChatSettings(), ChatSettings("be kind", {"enable_thinking": False}, date="2024-07-26")):
        (tmp_path / "training.json").write_text(json.dumps({"chat": settings.as_json(), "run": {}}))
        assert read_recorded_chat_settings(tmp_path, "training.json") == settings
    (tmp_path / "training.json").write_text('{"run": {}}')  # of a run before there were settings
    assert read_recorded_chat_settings(tmp_path, "training.json") == ChatSettings()
    for chat in (3, {"system": 3}, {"template_kwargs": "a"}, {"date": 3}):
        (tmp_path / "training.json").write_text(json.dumps({"chat": chat}))
        with pytest.raises(FileError, match=r"training.json': chat=.* must hold system, template_kwargs and date"):
            read_recorded_chat_settings(tmp_path, "training.json")
    (tmp_path / "training.json").write_text('{"chat": {"date": "today"}}')
    with pytest.raises(FileError, match=r"training.json': .*isoformat.*'today'"):
        read_recorded_chat_settings(tmp_path, "training.json")


def test_bad_values_are_refused_by_the_parser(capsys):
    for option, value, why in (
        ("--system", "", "'' must be a text that is not empty"),
        ("--chat-template", "", "'' must be a text that is not empty"),
        ("--template-kwargs", "{", "'{' must be a JSON object, as"),
        ("--template-kwargs", "[1]", "'[1]' must be a JSON object, as"),
    ):
        with pytest.raises(SystemExit):
            parsed(option, value)
        assert why in capsys.readouterr().err


def test_an_empty_or_missing_template_is_an_error_of_its_file(tmp_path):
    tokenizer = SimpleNamespace(chat_template="own")
    (tmp_path / "a.jinja").write_text(" \n")
    with pytest.raises(FileError, match=r"a.jinja': it is empty; name a file with a chat template"):
        apply_chat_arguments(parsed("--chat-template", str(tmp_path / "a.jinja")), tokenizer)
    with pytest.raises(OSError, match="cannot read"):
        apply_chat_arguments(parsed("--chat-template", str(tmp_path / "b.jinja")), tokenizer)
    assert tokenizer.chat_template == "own"


def test_a_template_takes_settings_that_nothing_else_says():
    def rendered(messages, **variables):
        template = template_with_settings(
            "\n{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ a }}{{ b }}", settings
        )
        return (
            Environment(trim_blocks=True, lstrip_blocks=True)
            .from_string(template)
            .render(messages=messages, **variables)
        )

    settings = ChatSettings('it\'s %} "so"\nü😀\\', {"a": None, "b": [True, "{{ x }}"], "c d": 1})
    user = {"role": "user", "content": "q"}
    assert rendered([user]) == f"\n<system>{settings.system}<user>qNone[True, '{{{{ x }}}}']"
    assert rendered([{"role": "system", "content": "s"}, user], a=1, b=2) == "\n<system>s<user>q12"
    assert template_with_settings("a", ChatSettings()) == "a"
