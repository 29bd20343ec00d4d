"""``lowmem export``."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowmem
from lowmem import FourBit, convert, save
from lowmem.__main__ import main
from lowmem.io.filesystem import exclusive_write_lock, open_regular_file
from lowmem.io.formats.gguf.gguf_file import read_gguf_header
from lowmem.io.formats.lazy_model import open_lazy_model
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.quant.tensor import QuantizedTensor
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


def test_json_has_the_rows_and_options_reach_the_writer(tmp_path, capsys):
    source = write_folder(tmp_path / "in", weights_of(fourbit("nf4")))
    out, again = tmp_path / "out", tmp_path / "again.gguf"
    assert main(["export", str(source), str(out), "--format", "gguf", "--dtype", "bf16", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["files"], shown["commands"]) == ([str(out)], [])
    rows = {row["name"]: row for row in shown["weights"]}
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


@pytest.fixture
def tuned(place):
    """An adapter that was trained on a base in q8_0, which GGUF holds exactly."""
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    options = ["--data", "text.txt", "--length", "48", "--steps", "2", "--lr", "0.01", "--format", "q8_0"]
    assert main(["fit", "llama", *options, "--save", "tuned", "--keep-base"]) == 0
    return Path("tuned")


def names_here() -> set[str]:
    return {path.name for path in Path().iterdir()}


def test_an_adapter_goes_beside_its_base_with_the_codes_that_trained(tuned, capsys):
    from lowmem.integrations.transformers import from_exact
    from tests.integrations.transformers.folders import load

    before = names_here()
    assert main(["export", "tuned", "kept.gguf"]) == 0
    assert "saved kept.gguf\nsaved kept-adapter.gguf\n" in capsys.readouterr().err
    (tuned / "base").rename(tuned.parent / "elsewhere")
    assert main(["export", "tuned", "stored.gguf"]) == 0
    assert names_here() - before == {
        "elsewhere", "kept.gguf", "kept-adapter.gguf", "stored.gguf", "stored-adapter.gguf"
    }  # fmt: skip
    for name in ("", "-adapter"):
        assert Path(f"kept{name}.gguf").read_bytes() == Path(f"stored{name}.gguf").read_bytes()
    code = "model.layers.0.mlp.up_proj.weight_packed"
    assert torch.equal(from_exact("kept.gguf").state_dict()[code], load("elsewhere").state_dict()[code])


def test_the_dense_base_of_an_adapter_is_exported_where_it_is_asked_for(tuned, capsys):
    assert main(["export", "tuned", "dense.gguf", "--dense-base"]) == 0
    with open_foreign_checkpoint(Path("dense.gguf")) as file:
        assert file.tensors["model.layers.0.mlp.up_proj.weight"].kind == "F32"
    assert Path("dense-adapter.gguf").is_file()


def test_an_adapter_of_another_format_is_a_folder_of_peft(tuned):
    argv = ["export", "tuned", "compressed", "--format", "compressed-tensors", "--requantize"]
    assert main(argv) == 0
    config = json.loads(Path("compressed-adapter", "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "compressed"
    weights = [load_file(Path(folder, "adapter_model.safetensors")) for folder in ("tuned", "compressed-adapter")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_export_that_fails_leaves_neither_base_nor_adapter(tuned, refused):
    before = names_here()
    assert "cannot read 'none.gguf'" in refused("export", "tuned", "out.gguf", "--like", "none.gguf")
    Path("out-adapter.gguf").touch()
    assert "'out-adapter.gguf' exists" in refused("export", "tuned", "out.gguf")
    Path("out-adapter.gguf").unlink()
    told = refused("export", "tuned/base", "out.gguf", "--dense-base")
    assert "--dense-base applies to an adapter, and IN='tuned/base' is none: leave it out" in told
    assert "lies in the base=" in refused("export", "tuned", "llama/out.gguf", "--dense-base")
    Path("llama").rename("elsewhere")
    assert "name the base with --base" in refused("export", "tuned", "out.gguf", "--dense-base")
    Path("elsewhere").rename("llama")
    assert names_here() == before


def test_an_adapter_of_a_gguf_file_goes_beside_a_copy_of_it(place, capsys, refused):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    assert main(["quantize", "llama", "small", "--format", "q4_0"]) == 0
    assert main(["export", "small", "base.gguf", "--requantize"]) == 0
    assert main(["fit", "base.gguf", "--data", "data.jsonl", "--steps", "2", "--lr", "0.01", "--save", "tuned"]) == 0
    capsys.readouterr()
    assert main(["export", "tuned", "out.gguf"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "saved out.gguf\nsaved out-adapter.gguf\n"
    assert "gguf: 20 of 20 weights as they were" in shown.out
    assert Path("out.gguf").read_bytes() == Path("base.gguf").read_bytes()
    with open_regular_file(Path("out-adapter.gguf")) as file:
        assert "blk.0.ffn_up.weight.lora_a" in read_gguf_header(Path("out-adapter.gguf"), file).tensors
    before = names_here()
    for options in (["out", "--format", "bitsandbytes"], ["other.gguf", "--dtype", "f16"]):
        told = refused("export", "tuned", *options)
        assert "base.gguf FOLDER`, and name that with --base FOLDER" in told
    assert names_here() == before
    assert main(["quantize", "base.gguf", "folder"]) == 0
    assert main(["export", "tuned", "out", "--format", "compressed-tensors", "--base", "folder"]) == 0
    assert "the adapter says that it was trained on" in capsys.readouterr().err
    (Path("tuned") / "chat_template.jinja").write_text("another")
    capsys.readouterr()
    assert main(["export", "tuned", "other.gguf"]) == 0
    told = "the adapter was trained with another chat template: llama-server --chat-template-file tuned/chat_template"
    assert told in capsys.readouterr().err


def codes_by_name(path: Path) -> dict[str, torch.Tensor]:
    """Return the packed codes of each weight of a GGUF file, or of a folder of lowmem's."""
    with open_foreign_checkpoint(path) if path.is_file() else open_lazy_model(path) as source:
        tensors = source.tensors if path.is_file() else source.weights
        read = {name: tensor.read() for name, tensor in tensors.items()}
    return {name: value.packed for name, value in read.items() if isinstance(value, QuantizedTensor)}


def test_what_is_stored_for_llama_cpp_is_exported_with_the_same_codes(place, capsys):
    """A folder of quantize, calibrated or not, and the base of an adapter, kept or stored again."""
    Path("long.txt").write_text(" ".join(Path("text.txt").read_text() for _ in range(9)))
    assert main(["quantize", "llama", "small", "--for", "llama.cpp"]) == 0
    assert main(["quantize", "llama", "calibrated", "--for", "llama.cpp", "--calibrate", "long.txt"]) == 0
    options = ["--data", "text.txt", "--length", "48", "--steps", "1", "--for", "llama.cpp"]
    assert main(["fit", "llama", *options, "--save", "tuned"]) == 0
    assert main(["fit", "small", *options, "--save", "kept"]) == 0  # stored so already
    capsys.readouterr()
    for name in ("small", "calibrated", "tuned", "kept"):
        assert main(["export", name, f"{name}.gguf"]) == 0
        assert "gguf: 20 of 20 weights as they were" in capsys.readouterr().out
    codes = codes_by_name(Path("small"))
    assert len(codes) == 15
    for name in ("small.gguf", "tuned.gguf", "kept.gguf"):
        found = codes_by_name(Path(name))
        assert found.keys() == codes.keys()
        assert all(torch.equal(found[weight], code) for weight, code in codes.items()), name
    assert not all(map(torch.equal, codes_by_name(Path("calibrated")).values(), codes.values()))
    with open_foreign_checkpoint(Path("tuned.gguf")) as file:
        kinds = {name: tensor.kind for name, tensor in file.tensors.items() if len(tensor.shape) > 1}
    assert kinds.pop("model.embed_tokens.weight") == "Q8_0"
    assert set(kinds.values()) == {"IQ4_NL"}
    assert main(["quantize", "small.gguf", "again"]) == 0
    assert all(torch.equal(codes_by_name(Path("again"))[name], code) for name, code in codes.items())
