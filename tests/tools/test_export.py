"""``lowmem export``."""

import json
import os

import pytest
from torch import nn

import lowmem
from lowmem import FourBit, convert, save
from lowmem.__main__ import main
from lowmem.io.filesystem import exclusive_write_lock
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from tests.io.formats.folders import fourbit, weights_of, write_folder


def test_a_table_says_what_became_of_each_weight_and_the_errors_of_what_changed(tmp_path, capsys):
    weights = weights_of(fourbit("nf4"))
    weights["lm_head.weight"] = fourbit("q4_0")(weights["lm_head.weight"].dequantize())
    source, out = write_folder(tmp_path / "in", weights), tmp_path / "out.gguf"
    assert main(["export", str(source), str(out)]) == 2
    assert "--requantize" in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(source), str(out), "--requantize"]) == 0
    shown = capsys.readouterr()
    assert "lm_head" not in shown.out  # rows of weights are for --verbose
    out.unlink()
    assert main(["export", str(source), str(out), "--requantize", "--verbose"]) == 0
    assert (summary := shown.out)
    shown = capsys.readouterr()
    assert shown.out.endswith(summary)
    assert "lm_head.weight" in shown.out
    assert "gguf: 4 of 12 weights as they were" in shown.out
    assert "8 from nf4, block_size=64, scales=double to IQ4_NL: an error of 0.0" in shown.out
    assert "over all weights: 0.0" in shown.out
    assert "note: no tokenizer is written" in shown.err
    assert f"saved {out}" in shown.err
    assert main(["export", str(source), str(out), "--requantize"]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_target_that_another_command_writes_is_refused(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in", weights_of(fourbit("nf4"))), tmp_path / "out.gguf"
    with exclusive_write_lock(out):
        assert main(["export", str(source), str(out)]) == 2
    assert f"'{out}' is being written by process {os.getpid()} of " in capsys.readouterr().err


def test_json_is_the_rows_and_options_reach_the_writer(tmp_path, capsys):
    source = write_folder(tmp_path / "in", weights_of(fourbit("nf4")))
    out, again = tmp_path / "out", tmp_path / "again.gguf"
    assert main(["export", str(source), str(out), "--format", "gguf", "--dtype", "bf16", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lm_head.weight"]["kind"] == "BF16"
    assert 0 < rows["lm_head.weight"]["error"] < 2**-8
    assert rows["model.norm.weight"]["error"] is None
    assert main(["export", str(source), str(again), "--dtype", "f32", "--like", str(out)]) == 0
    with open_foreign_checkpoint(again) as file:
        assert file.tensors["lm_head.weight"].kind == "F32"


def test_a_file_of_lowmem_is_taken_as_a_folder_is(tmp_path, capsys):
    source = tmp_path / "own.safetensors"
    save(convert(nn.Linear(64, 64), FourBit("nf4")), source)
    assert main(["export", str(source), str(tmp_path / "out.gguf")]) == 2
    assert "it has no config.json beside it: export the model's folder" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, refused):
    source = write_folder(tmp_path / "in", weights_of(fourbit("q4_0")))
    before = sorted(path.name for path in source.iterdir())
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (
        [str(empty), str(tmp_path / "a.gguf")],
        [str(tmp_path / "none"), str(tmp_path / "a.gguf")],
        [str(source), str(tmp_path / "a.bin")],
        [str(source), str(tmp_path / "none" / "a.gguf")],
        [str(source), str(empty)],
        [str(source), str(tmp_path / "a.gguf"), "--like", str(empty)],
        [str(source), str(tmp_path / "a.gguf"), "--like", str(source / "model.safetensors")],
        [str(source), str(source / "a.gguf")],
    ):
        assert refused("export", *arguments).startswith("lowmem export: ")
    assert "lies in IN=" in refused("export", str(source), str(source / "new" / "a.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in"]
    with pytest.raises(ValueError, match="^out='.*a.gguf' lies in source='.*in', which it would change"):
        lowmem.export(source, source / "a.gguf")
    assert sorted(path.name for path in source.iterdir()) == before
