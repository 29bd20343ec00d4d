"""Every option of ``lowmem quantize`` with every kind of input: it is heeded, or an error of one line."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.__main__ import main
from lowmem.tools.quantize_options import KINDS, OPTIONS
from tests.io.formats.folders import CONFIG, shapes
from tests.io.formats.test_recognize import SAMPLES

GIVEN = {
    "bits": ["--bits", "6"],
    "format": ["--format", "bof4s"],
    "block_size": ["--block-size", "16"],
    "scales": ["--scales", "float32"],
    "search": ["--search"],
    "embeddings": ["--embeddings", "4bit"],
    "include": ["--include", "*"],
    "exclude": ["--exclude", "*up_proj*"],
    "shard_size": ["--shard-size", "1MB"],
    "requantize": ["--requantize"],
    "dtype": ["--dtype", "bfloat16"],
    "calibrate": ["--calibrate", "self"],
    "diagonal": ["--diagonal"],
    "resume": ["--resume", "done"],
}
TECHNIQUE = {"format", "block_size", "scales", "search"}
HEEDED = {
    "a dense file": TECHNIQUE | {"bits", "include", "exclude", "shard_size"},
    "a dense folder": TECHNIQUE | {"bits", "embeddings", "exclude", "shard_size", "calibrate"},
    "another program's": {"include", "shard_size", "requantize", "dtype"},
}
"""By the kind of input, the options that mean something when they are given alone."""


@pytest.fixture
def inputs(tmp_path):
    """One input of each kind, and where to write."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in shapes()}
    save_file(weights, tmp_path / "dense.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(weights, tmp_path / "folder" / "model.safetensors", {"format": "pt"})
    (tmp_path / "folder" / "config.json").write_text(json.dumps(CONFIG))
    name = "bitsandbytes-nf4.safetensors"
    parts = load_file(SAMPLES / name) | {"up_proj.weight": torch.randn(4, 64)}
    save_file(parts, tmp_path / name)
    return {
        "a dense file": ("dense.safetensors", "out.safetensors"),
        "a dense folder": ("folder", "out"),
        "another program's": (name, "out.safetensors"),
    }


def run(tmp_path, inputs, kind, options, capsys):
    """Return the exit code and what was said; what was written is removed."""
    source, out = inputs[kind]
    before = sorted(path.name for path in tmp_path.iterdir())
    code = main(["quantize", str(tmp_path / source), str(tmp_path / out), *options])
    written = [path for path in tmp_path.iterdir() if path.name not in before]
    for path in written:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return code, capsys.readouterr().err, written


def test_the_table_has_all_options_and_kinds():
    assert GIVEN.keys() == OPTIONS.keys()
    assert HEEDED.keys() == KINDS.keys()


def test_an_option_is_heeded_or_an_error_of_one_line_that_names_it(tmp_path, inputs, capsys):
    for kind, option in itertools.product(KINDS, OPTIONS):
        if option in HEEDED[kind] and kind.endswith("folder"):
            continue  # they take transformers, and the test below
        code, said, written = run(tmp_path, inputs, kind, GIVEN[option], capsys)
        if option in HEEDED[kind]:
            assert (code, bool(written)) == (0, True), (kind, option, said)
            continue
        assert (code, written) == (2, []), (kind, option)
        assert said.count("\n") == 1
        assert f"{GIVEN[option][0]} does not apply to" in said
        assert "leave" in said
        assert len(said) < 300


def test_options_of_a_technique_say_how_what_is_asked_for_is_quantized(tmp_path, inputs, capsys):
    """Of another program's file --include and --requantize ask; and --no-search is an option, too."""
    kind = "another program's"
    for asked, option in itertools.product(("include", "requantize"), sorted(TECHNIQUE)):
        assert run(tmp_path, inputs, kind, [*GIVEN[asked], *GIVEN[option]], capsys)[0] == 0
    assert run(tmp_path, inputs, kind, ["--no-search"], capsys)[0] == 2
    assert run(tmp_path, inputs, "a dense file", ["--no-search"], capsys)[0] == 0


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("a dense folder", ("bits", "embeddings"), "--embeddings"),
        ("a dense folder", ("bits", "format"), "--format"),
        ("a dense folder", ("calibrate", "diagonal", "resume"), "--resume"),
        ("a dense file", ("bits", "block_size"), "--block-size"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, inputs, capsys, kind, options, named):
    code, said, written = run(tmp_path, inputs, kind, [text for one in options for text in GIVEN[one]], capsys)
    assert (code, written, said.count("\n")) == (2, [], 1)
    assert f"{named} does not apply to" in said
    assert "use only one of them" in said


@pytest.mark.parametrize("option", ["search", "embeddings"])
def test_8_bits_have_neither_a_search_nor_other_embeddings(tmp_path, inputs, capsys, option):
    for kind in ("a dense file", "a dense folder"):
        code, said, written = run(tmp_path, inputs, kind, ["--format", "int8", *GIVEN[option]], capsys)
        assert (code, written, said.count("\n")) == (2, [], 1)
        assert f"{GIVEN[option][0]} does not apply to" in said


def test_what_each_heeded_option_changes(tmp_path, inputs, capsys):
    """None of them is taken and forgotten: each gives other bytes, or other files."""
    for kind in ("a dense file", "another program's"):
        source, out = (tmp_path / name for name in inputs[kind])
        assert main(["quantize", str(source), str(out)]) == 0
        plain = out.read_bytes()
        out.unlink()
        for option in HEEDED[kind] - {"requantize"}:  # nothing in it needs that
            options = ["--include", "*.mlp.*"] if option == "include" and kind == "a dense file" else GIVEN[option]
            options = ["--no-search"] if option == "search" else options  # the default format is searched for
            assert main(["quantize", str(source), str(out), *options]) == 0
            if option == "shard_size":
                assert out.with_name(f"{out.name}.index.json").exists()
            else:
                assert out.read_bytes() != plain, (kind, option)
            out.unlink(missing_ok=True)
    capsys.readouterr()


def test_folders_heed_what_they_take(tmp_path, inputs, capsys):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    for kind in ("a dense folder",):
        for option in sorted(HEEDED[kind] - {"calibrate"}):  # it takes a tokenizer: tests/integrations
            options = ["--exclude", "*.up_proj"] if option == "exclude" else GIVEN[option]
            code, said, written = run(tmp_path, inputs, kind, options, capsys)
            assert (code, len(written)) == (0, 1), (kind, option, said)
