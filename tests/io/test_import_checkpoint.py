"""Other programs' weights become files of lowmem's that hold the same values."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem import FourBit, load
from lowmem.errors import FileError
from lowmem.io.foreign.recognize import open_foreign
from lowmem.io.import_checkpoint import import_checkpoint
from lowmem.io.shards import read_model
from tests.io.foreign.test_gptq import layer
from tests.io.foreign.test_recognize import MADE, SAMPLES, values_of

GPT_OSS = SAMPLES / "gpt-oss.safetensors"


class Layers(nn.Module):
    """A model of linear layers by name."""

    def __init__(self, shapes):
        super().__init__()
        for name, (rows, columns) in shapes.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))


def test_every_weight_that_is_kept_comes_back_in_a_model_of_layers_to_the_bit(tmp_path):
    for name in MADE["sha256"]:
        if name in ("types.gguf", GPT_OSS.name):
            continue
        rows = import_checkpoint(SAMPLES / name, tmp_path / "a.safetensors")
        assert [(row.name, row.error) for row in rows] == [("layer.weight", None)]
        with open_foreign(SAMPLES / name) as file:
            expected = values_of(file.tensors["layer.weight"])
        model = load(tmp_path / "a.safetensors", partial(Layers, {"layer": expected.shape}))
        assert torch.equal(model.layer.quantized.dequantize(), expected)
        assert str(model.layer.stored_tensor("weight").form) == rows[0].kept
        x = torch.randn(3, expected.shape[1])
        torch.testing.assert_close(model.layer(x), x @ expected.T, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_gguf_file_in_one_file_or_in_shards(tmp_path):
    source = SAMPLES / "types.gguf"
    rows = import_checkpoint(source, tmp_path / "whole.safetensors")
    kept = {row.name: row.kept for row in rows}
    assert kept["lm_head.weight"] == "float16"
    assert kept["model.layers.1.mlp.down_proj.weight"] == "uint4, block_size=32, scales=float16_offsets"
    done = []
    import_checkpoint(source, tmp_path / "a.safetensors", shard_bytes=6000, progress=lambda *one: done.append(one))
    assert done == [(row.name, row.before_bytes) for row in rows]
    whole, parts = (read_model(tmp_path / name) for name in ("whole.safetensors", "a.safetensors.index.json"))
    assert whole.metadata["layers"] == parts.metadata["layers"]
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(value, parts.tensors[name]) for name, value in whole.tensors.items())


def test_dense_tensors_stay_are_rounded_or_quantized_as_asked(tmp_path):
    source = tmp_path / "in.safetensors"
    parts, _ = layer(1, 32, 8, 16)
    dense = {"head.weight": torch.randn(4, 32), "norm.weight": torch.randn(32), "count": torch.arange(3)}
    save_file({**{f"q.{name}": value for name, value in parts.items()}, **dense}, source)
    rows = import_checkpoint(source, tmp_path / "a.safetensors")
    assert {row.name: row.kept for row in rows if "q4_0" not in row.kept} == {
        "head.weight": "float32",
        "norm.weight": "float32",
        "count": "int64",
    }
    rows = import_checkpoint(source, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["head.weight"], dense["head.weight"].bfloat16())
    assert torch.equal(tensors["count"], dense["count"])
    rows = import_checkpoint(source, tmp_path / "a.safetensors", include=["*"], technique=FourBit("nf4"))
    assert {row.name: row.kept.partition(",")[0] for row in rows} == {
        "q.weight": "q4_0",
        "head.weight": "nf4",
        "norm.weight": "float32",
        "count": "int64",
    }
    (error,) = [row.error for row in rows if row.error is not None]
    assert 0.05 < error < 0.15
    with pytest.raises(ValueError, match="matches no tensor"):
        import_checkpoint(source, tmp_path / "a.safetensors", include=["x"], technique=FourBit())


def test_what_is_not_exact_is_refused_unless_it_may_be_quantized_again(tmp_path):
    """Nothing is written, and the error says which tensor, why, and how to go on."""
    source, target = tmp_path / "in.safetensors", tmp_path / "a.safetensors"
    parts, weight = layer(3, 32, 8, 16, order=torch.randperm(32) // 16)
    save_file({f"q.{name}": value for name, value in parts.items()}, source)
    with pytest.raises(FileError, match=r"q.weight, GPTQ: its groups follow the order .*\(--requantize\)"):
        import_checkpoint(source, target)
    assert not target.exists()
    (row,) = import_checkpoint(source, target, requantize=FourBit("nf4", block_size=16))
    assert 0 < row.error < 0.15
    model = load(target, lambda: Layers({"q": weight.shape}))
    lost = float((model.q.quantized.dequantize() - weight).norm() / weight.norm())
    assert lost == pytest.approx(row.error, rel=1e-3)


def test_transposed_experts_are_refused_and_quantized_again_in_the_shape_of_the_model(tmp_path):
    tensors = load_file(GPT_OSS)
    tensors["experts.down_proj_scales"] = tensors["experts.down_proj_scales"] % 10 + 120
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(FileError, match="transposed"):
        import_checkpoint(tmp_path / "in.safetensors", tmp_path / "a.safetensors")
    rows = import_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "a.safetensors", requantize=FourBit("nf4", block_size=8)
    )
    (row,) = [row for row in rows if row.error is not None]
    assert row.shape == (2, 64, 4)
    tensors = read_model(tmp_path / "a.safetensors")
    assert tensors.tensors["experts.down_proj_packed"].shape == (2, 64, 2)
    assert [*tensors.metadata["layers"]] == ["experts.down_proj"]


def test_the_target_is_neither_the_source_nor_an_index(tmp_path):
    source = tmp_path / "in.safetensors"
    source.write_bytes(Path(SAMPLES / "bitsandbytes-nf4.safetensors").read_bytes())
    with pytest.raises(ValueError, match="belongs to the source"):
        import_checkpoint(source, source)
    with pytest.raises(ValueError, match="what an index is called"):
        import_checkpoint(source, tmp_path / "a.index.json")
