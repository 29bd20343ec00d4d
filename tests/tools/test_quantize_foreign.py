"""``lowmem quantize`` of other programs' files."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lowmem.__main__ import main
from lowmem.io.atomic import owned
from tests.io.formats.test_gptq import layer
from tests.io.formats.test_recognize import SAMPLES


def test_a_gguf_file_is_kept_exactly_and_the_table_says_so(tmp_path, capsys):
    source, target = SAMPLES / "types.gguf", tmp_path / "a.safetensors"
    assert main(["quantize", str(source), str(target)]) == 0
    shown = capsys.readouterr()
    assert "gguf: kept 13 of 13 tensors" in shown.out
    assert "Q4_K" in shown.out
    assert f"saved {target}" in shown.err
    note = next(line for line in shown.err.splitlines() if line.startswith("note: "))
    assert "note: 5 of them, in Q5_1, Q5_0, Q8_0, Q6_K, Q5_K, are dense now and take" in note
    assert "--dtype bfloat16 rounds them, --include model.embed_tokens.weight --format int8" in note
    assert main(["quantize", str(source), str(target), "--json", "--include", "lm_head.*", "--dtype", "float32"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lm_head.weight"]["kept"].startswith("bof4s, block_size=32")
    assert rows["model.norm.weight"]["kept"] == "float32"


def test_a_target_that_another_command_writes_is_refused(tmp_path, refused):
    out = tmp_path / "a.safetensors"
    with owned(out):
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
    assert "quantized 1, with an error of up to 0." in capsys.readouterr().out


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
    assert "quantized 1, with an error of up to 0.0" in capsys.readouterr().out
    smaller = load(tmp_path / "smaller")
    assert smaller.lm_head.forms["weight"].format == "int8"
    assert smaller.model.embed_tokens.weight.dtype == torch.bfloat16
    assert main(["quantize", str(source), str(target)]) == 2
    assert "small" in capsys.readouterr().err
    assert main(["quantize", str(source / "model.safetensors"), str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a file has no config.json: name its folder as IN, or OUT.safetensors" in line
