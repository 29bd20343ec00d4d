"""``lowmem quantize`` of other programs' files."""

import json

import torch
from safetensors.torch import save_file

from lowmem.__main__ import main
from tests.io.foreign.test_gptq import layer
from tests.io.foreign.test_recognize import SAMPLES


def test_a_gguf_file_is_kept_exactly_and_the_table_says_so(tmp_path, capsys):
    source, target = SAMPLES / "types.gguf", tmp_path / "a.safetensors"
    assert main(["quantize", str(source), str(target)]) == 0
    shown = capsys.readouterr()
    assert "GGUF: kept 13 of 13 tensors" in shown.out
    assert "Q4_K" in shown.out
    assert f"saved {target}" in shown.err
    assert main(["quantize", str(source), str(target), "--json", "--include", "lm_head.*", "--dtype", "float32"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lm_head.weight"]["kept"].startswith("nf4")
    assert rows["model.norm.weight"]["kept"] == "float32"


def test_what_is_not_exact_is_an_error_that_names_the_option_which_prints_what_it_costs(tmp_path, capsys):
    source, target = tmp_path / "in.safetensors", tmp_path / "a.safetensors"
    parts, _ = layer(3, 64, 8, 16, order=torch.randperm(64) // 16)
    save_file({f"q.{name}": value for name, value in parts.items()}, source)
    assert main(["quantize", str(source), str(target)]) == 2
    assert "--requantize" in capsys.readouterr().err
    assert not target.exists()
    assert main(["quantize", str(source), str(target), "--requantize"]) == 0
    assert "quantized 1, with an error of up to 0." in capsys.readouterr().out
