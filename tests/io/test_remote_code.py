"""Code of folders: configs forget it, nothing is asked, and each call that could run some says that it must not."""

import ast
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lowmem
from lowmem.errors import FileError
from lowmem.io.model_folder import read_checked_model_config
from lowmem.io.remote_code import NEEDS_CODE, empty_stdin, has_trust_remote_code_in_text, remove_auto_map_entries

CALLS = ("from_pretrained", "from_config")
SOURCES = sorted(Path(lowmem.__file__).parent.rglob("*.py"))


def config(**content):
    return SimpleNamespace(sub_configs={}, auto_map={"AutoModel": "evil.Evil"}, **content)


def test_a_config_forgets_the_code_that_it_and_those_in_it_name():
    named = {"auto_map": {"AutoConfig": "evil.Evil"}, "size": 3}
    whole = config(text=config(inner=[config(), dict(named)]), pair=(dict(named),), other="auto_map")
    remove_auto_map_entries(whole)
    left = repr(whole)
    assert "evil" not in left
    assert left.count("'size': 3") == 2
    assert whole.other == "auto_map"


def test_a_config_of_any_depth_is_read():
    inner: dict = {"auto_map": {}}
    whole = config(deep=inner)
    for _ in range(10_000):
        inner["next"] = {"auto_map": {}}
        inner = inner["next"]
    remove_auto_map_entries(whole)
    assert "auto_map" not in inner


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"attn_implementation": "evil/kernel"}, "attn_implementation='evil/kernel' is code of the Hub"),
        ({"text": [{"_attn_implementation": {"": "sdpa", "inner": "evil/kernel:f"}}]}, "_attn_implementation="),
        ({"attn_implementation": "sdpa", "_name_or_path": "owner/name", "text": {"attn_implementation": None}}, None),
    ],
)
def test_a_config_that_names_a_kernel_of_the_hub_is_refused(tmp_path, content, told):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    if told is None:
        assert read_checked_model_config(file) == content
        return
    with pytest.raises(FileError, match=f"{told}.*none was run: remove it"):
        read_checked_model_config(file)


def test_no_question_is_answered(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\nthe next line\n"))
    with empty_stdin(), pytest.raises(EOFError):
        input()
    assert input() == "y"
    with pytest.raises(KeyError), empty_stdin():
        raise KeyError
    assert input() == "the next line"


def test_only_errors_that_name_the_option_are_about_code():
    assert has_trust_remote_code_in_text(ValueError("Please pass the argument `trust_remote_code=True`"))
    assert not has_trust_remote_code_in_text(ValueError("its config is damaged"))
    assert "trust_remote_code=True" in NEEDS_CODE


def is_untrusting(call: ast.Call, function: ast.FunctionDef | None) -> bool:
    """Whether a call says ``trust_remote_code=False``, or what an argument says that is False by default."""
    for given in call.keywords:
        if given.arg == "trust_remote_code":
            if isinstance(given.value, ast.Constant):
                return given.value.value is False
            if function is None or not isinstance(given.value, ast.Name):
                return False
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args]
            defaults = dict(zip(reversed([one.arg for one in named]), reversed(arguments.defaults), strict=False))
            defaults |= dict(zip([one.arg for one in arguments.kwonlyargs], arguments.kw_defaults, strict=True))
            default = defaults.get(given.value.id)
            return isinstance(default, ast.Constant) and default.value is False
    return False


def untold(source: str) -> list[int]:
    """Return the lines of calls that leave it to transformers whether code of a folder runs."""
    if not any(call in source for call in CALLS):
        return []
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    around = {id(inner): one for one in functions for inner in ast.walk(one)}  # the innermost comes last
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        call.lineno
        for call in calls
        if call.func.attr in CALLS and not is_untrusting(call, around.get(id(call)))  # type: ignore[attr-defined]
    ]


def test_each_call_that_reads_a_folder_says_that_no_code_of_it_runs():
    found = {str(path): untold(path.read_text(encoding="utf8")) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert sum(path.read_text(encoding="utf8").count(".from_pretrained(") for path in SOURCES) > 5


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("Auto.from_pretrained(folder)", [1]),
        ("Auto.from_pretrained(folder, trust_remote_code=None)", [1]),
        ("Auto.from_pretrained(folder, trust_remote_code=True)", [1]),
        ("Auto.from_pretrained(folder, **options)", [1]),
        ("Auto.from_pretrained(folder, trust_remote_code=False)", []),
        ("def f(folder, trust_remote_code=False):\n    Auto.from_config(a, trust_remote_code=trust_remote_code)", []),
        ("def f(*, trust_remote_code=False):\n    Auto.from_config(a, trust_remote_code=trust_remote_code)", []),
        ("def f(trust_remote_code):\n    Auto.from_config(a, trust_remote_code=trust_remote_code)", [2]),
        ("def f(*, trust_remote_code=None):\n    Auto.from_config(a, trust_remote_code=trust_remote_code)", [2]),
    ],
)
def test_the_walk_sees_calls_that_say_nothing(source, lines):
    assert untold(source) == lines
