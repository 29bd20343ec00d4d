"""``lowmem quantize`` of other programs' files."""

import json
import os
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowmem.__main__ import main
from lowmem.io.filesystem import exclusive_write_lock
from tests.io.formats.test_gptq_awq import layer
from tests.io.formats.test_open_foreign import SAMPLES


def test_a_gguf_file_is_kept_exactly_and_the_table_says_so(tmp_path, capsys):
    source, target = SAMPLES / "types.gguf", tmp_path / "a.safetensors"
    with redirect_stderr(sys.stdout):
        assert main(["quantize", str(source), str(target)]) == 0
    shown = capsys.readouterr().out
    assert "lm_head" not in shown  # rows of tensors are for --verbose
    with redirect_stderr(sys.stdout):
        assert main(["quantize", str(source), str(target), "--verbose"]) == 0
    summary = shown.partition("gguf: kept")[2]
    shown = capsys.readouterr().out
    assert shown.endswith(f"gguf: kept{summary}")
    assert shown.startswith(
        "note: types.gguf: 0.01 MiB of tensors become a model of 0.02 MiB, since weights in Q5_1, "
    )
    assert (
        "Q5_K take more bits there: `lowmem quantize IN OUT --include '*' --format int8` makes 0.01 MiB of"
        in shown.splitlines()[0]
    )
    assert "gguf: kept 13 of 13 tensors" in shown
    assert "Q4_K" in shown
    assert f"saved {target}" in shown
    assert main(["quantize", str(source), str(target), "--json", "--include", "lm_head.*", "--dtype", "float32"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lm_head.weight"]["kept"].startswith("bof4s, block_size=32")
    assert rows["model.norm.weight"]["kept"] == "float32"


def test_a_target_that_another_command_writes_is_refused(tmp_path, refused):
    out = tmp_path / "a.safetensors"
    with exclusive_write_lock(out):
        assert f"'{out}' is being written by process {os.getpid()} of " in refused(
            "quantize", SAMPLES / "types.gguf", out
        )


def test_weights_that_cannot_be_kept_exactly_need_requantize(tmp_path, capsys):
    source, target = tmp_path / "in.safetensors", tmp_path / "a.safetensors"
    parts, _ = layer(3, 64, 8, 16, order=torch.tensor([0] * 16 + [1] * 15 + [2] * 17 + [3] * 16))
    save_file({f"q.{name}": value for name, value in parts.items()}, source)
    assert main(["quantize", str(source), str(target)]) == 2
    assert "--requantize" in capsys.readouterr().err
    assert not target.exists()
    assert main(["quantize", str(source), str(target), "--requantize"]) == 0
    assert "quantized 1, with a relative error of at most 0." in capsys.readouterr().out


def test_a_folder_becomes_a_folder_that_from_pretrained_loads(tmp_path, capsys):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    from lowmem.integrations.transformers import from_exact
    from tests.integrations.transformers.folders import assert_same, load
    from tests.integrations.transformers.foreign import write_foreign

    source, target = write_foreign(tmp_path, "gptq desc_act"), tmp_path / "small"
    (source / "tokenizer.json").write_text("{}")
    assert main(["quantize", str(source), str(target), "--format", "int8"]) == 2
    assert "--format does not apply to" in capsys.readouterr().err
    assert main(["quantize", str(source), str(target), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    kept = rows["model.layers.0.mlp.up_proj.weight"]
    assert kept["kept"].endswith("gathered")
    assert (kept["kind"], kept["error"]) == ("GPTQ", None)
    assert rows["lm_head.weight"]["kept"] == "float32"
    assert_same(load(target), from_exact(source))
    assert (target / "tokenizer.json").read_text() == "{}"
    config = json.loads((source / "config.json").read_text())  # as AutoGPTQ wrote them, before it was in config.json
    (source / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (source / "config.json").write_text(json.dumps(config))
    assert main(["quantize", str(source), str(tmp_path / "older")]) == 0
    assert_same(load(tmp_path / "older"), load(target))
    options = ["--include", "lm_head.*", "--format", "int8", "--requantize", "--dtype", "bfloat16"]
    assert main(["quantize", str(source), str(tmp_path / "smaller"), *options]) == 0
    assert "quantized 1, with a relative error of at most 0.0" in capsys.readouterr().out
    smaller = load(tmp_path / "smaller")
    assert smaller.lm_head.forms["weight"].format == "int8"
    assert smaller.model.embed_tokens.weight.dtype == torch.bfloat16
    assert main(["quantize", str(source), str(target)]) == 2
    assert "small" in capsys.readouterr().err
    assert main(["quantize", str(source / "model.safetensors"), str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a file has no config.json: name its folder as IN, or OUT.safetensors" in line


def test_every_command_says_first_that_a_model_is_larger_than_its_file(place, capsys):
    """Of float16 in GGUF, which is computed in float32, and of zero points, which become float16 offsets."""
    from tests.integrations.transformers.foreign import write_foreign

    assert main(["export", "llama", "a.gguf", "--dtype", "f16"]) == 0
    foreign = write_foreign(place, "awq")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "llama" / file, foreign)
    fit = ["fit", "foreign", "--data", "data.jsonl", "--length", "4", "--cut", "--steps", "1"]
    for name, arguments in (
        ("a.gguf", ["generate", "a.gguf", "--prompt", "item", "--max-new-tokens", "2"]),
        ("a.gguf", ["quantize", "a.gguf", "kept"]),
        ("foreign", [*fit, "--dry-run"]),
        ("foreign", [*fit, "--save", "adapter"]),
        ("foreign", ["merge", "foreign", "adapter", "merged"]),
        ("foreign", ["stats", "foreign"]),
        ("foreign", ["compare", "foreign", "llama", "--text", "text.txt"]),
        ("foreign", ["quantize", "foreign", "small"]),
    ):
        capsys.readouterr()
        with redirect_stderr(sys.stdout):
            assert main(arguments) == 0
        told = capsys.readouterr().out.splitlines()
        first = next(line for line in told if not line.startswith("lowmem fit --dry-run: "))  # which say what it does
        assert first.startswith(f"note: {name}: "), arguments
        assert " MiB of tensors become a model of " in first, arguments
        dtype = "float16" if name == "a.gguf" else "bfloat16"
        assert f": `lowmem quantize IN OUT --dtype {dtype}` makes " in first, arguments


def test_a_missing_gguf_is_an_error_unless_the_tokenizer_is_left_out(place, refused, monkeypatch):
    """A folder without a tokenizer, and exit code 0, were found out much later."""
    assert main(["export", "llama", "a.gguf", "--dtype", "f16"]) == 0
    monkeypatch.setattr("lowmem.integrations.transformers.text_tokenizer.is_gguf_available", lambda: False)
    told = refused("quantize", "a.gguf", "kept")
    assert (
        "the tokenizer of 'a.gguf' takes the package gguf: pip install gguf, or write the folder without it" in told
    )
    assert not Path("kept").exists()
    for command in (
        ["generate", "a.gguf", "--prompt", "item"],
        ["fit", "a.gguf", "--data", "data.jsonl", "--length", "48", "--dry-run"],
    ):
        assert "takes the package gguf: pip install gguf" in refused(*command)
    assert main(["quantize", "a.gguf", "kept", "--no-tokenizer"]) == 0
    assert not [file.name for file in Path("kept").iterdir() if "token" in file.name]
    for source, target in (("a.gguf", "a.safetensors"), ("llama", "b"), ("llama/model.safetensors", "b.safetensors")):
        assert "--no-tokenizer" in refused("quantize", source, target, "--no-tokenizer")
