"""Other programs' weights become files of lowmem's that hold the same values."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem import FourBit, LoRA, convert, load, merge, restore, save
from lowmem.errors import FileError
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint
from lowmem.io.shards import verify_and_map_lowmem_model
from tests.io.formats.test_gptq_awq import layer
from tests.io.formats.test_open_foreign import MADE, SAMPLES, values_of
from tests.rounding import OF_4_BITS, assert_product

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
        rows = import_foreign_checkpoint(SAMPLES / name, tmp_path / "a.safetensors")
        assert [(row.name, row.error) for row in rows] == [("layer.weight", None)]
        with open_foreign_checkpoint(SAMPLES / name) as file:
            expected = values_of(file.tensors["layer.weight"])
        model = load(tmp_path / "a.safetensors", partial(Layers, {"layer": expected.shape}))
        assert torch.equal(model.layer.quantized.dequantize(), expected)
        assert str(model.layer.stored_tensor("weight").form) == rows[0].kept
        x = torch.randn(3, expected.shape[1])
        torch.testing.assert_close(model.layer(x), x @ expected.T, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_dense_tensors_stay_are_rounded_or_quantized_as_asked(tmp_path):
    source = tmp_path / "in.safetensors"
    parts, _ = layer(1, 32, 8, 16)
    dense = {"head.weight": torch.randn(4, 32), "norm.weight": torch.randn(32), "count": torch.arange(3)}
    save_file({**{f"q.{name}": value for name, value in parts.items()}, **dense}, source)
    rows = import_foreign_checkpoint(source, tmp_path / "a.safetensors")
    assert {row.name: row.kept for row in rows if "q4_0" not in row.kept} == {
        "head.weight": "float32",
        "norm.weight": "float32",
        "count": "int64",
    }
    rows = import_foreign_checkpoint(source, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["head.weight"], dense["head.weight"].bfloat16())
    assert torch.equal(tensors["count"], dense["count"])
    rows = import_foreign_checkpoint(source, tmp_path / "a.safetensors", include=["*"], technique=FourBit("nf4"))
    assert {row.name: row.kept.partition(",")[0] for row in rows} == {
        "q.weight": "q4_0",
        "head.weight": "nf4",
        "norm.weight": "float32",
        "count": "int64",
    }
    (error,) = [row.error for row in rows if row.error is not None]
    assert 0.05 < error < 0.15
    with pytest.raises(ValueError, match="pattern 'x' matches no tensor; check it, the first is 'count'"):
        import_foreign_checkpoint(source, tmp_path / "a.safetensors", include=["*", "x"], technique=FourBit())


def test_what_is_not_exact_is_refused_unless_it_may_be_quantized_again(tmp_path):
    """Nothing is written, and the error says which tensor, why, and how to go on."""
    source, target = tmp_path / "in.safetensors", tmp_path / "a.safetensors"
    uneven = torch.tensor([0] * 15 + [1] * 17)[torch.randperm(32)]
    parts, weight = layer(3, 32, 8, 16, order=uneven)
    save_file({f"q.{name}": value for name, value in parts.items()}, source)
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4, "group_size": 16}}')
    with pytest.raises(FileError, match=r"q.weight, GPTQ: its groups do not have 16 .*IN OUT --requantize`"):
        import_foreign_checkpoint(source, target)
    assert not target.exists()
    (row,) = import_foreign_checkpoint(source, target, requantize=FourBit("nf4", block_size=16))
    assert 0 < row.error < 0.15
    model = load(target, lambda: Layers({"q": weight.shape}))
    lost = float((model.q.quantized.dequantize() - weight).norm() / weight.norm())
    assert lost == pytest.approx(row.error, rel=1e-3)


def test_groups_that_follow_activations_are_kept_with_the_order_of_their_columns(tmp_path):
    source, target = tmp_path / "in.safetensors", tmp_path / "a.safetensors"
    parts, weight = layer(3, 32, 8, 16, order=torch.randperm(32) // 16)
    save_file({f"q.{name}": value for name, value in parts.items()}, source)
    (row,) = import_foreign_checkpoint(source, target)
    assert row.kept.endswith(", gathered")
    model = load(target, lambda: Layers({"q": weight.shape}))
    assert row.after_bytes == sum(part.nbytes for part in model.parameters())
    assert torch.equal(model.q.weight.dequantize(), weight)
    x = torch.randn(3, 32)
    torch.testing.assert_close(model.q(x), x @ weight.T)
    save(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == target.read_bytes()
    with pytest.raises(FileError, match="columns are gathered, which linear layers alone can"):
        load(target, lambda: nn.ModuleDict({"q": nn.Embedding(8, 32)}))


class Experts(nn.Module):
    """A mixture as gpt-oss has it: its weights are (experts, in, out)."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(2, 64, 4))
        self.bias = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x):
        """Return the outputs of each expert: (2, rows, 4)."""
        return torch.stack([x @ self.down_proj[e] + self.bias[e] for e in range(2)])


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()


def gpt_oss(folder: Path) -> Path:
    """Write the sample with scales of a common size."""
    tensors = load_file(GPT_OSS)
    tensors["experts.down_proj_scales"] = tensors["experts.down_proj_scales"] % 10 + 120
    save_file(tensors, folder / "in.safetensors")
    return folder / "in.safetensors"


def test_transposed_experts_are_kept_and_the_file_says_so(tmp_path):
    source, target = gpt_oss(tmp_path), tmp_path / "a.safetensors"
    rows = import_foreign_checkpoint(source, target)
    assert {row.name: (row.shape, row.kept.partition(",")[0], row.error) for row in rows} == {
        "experts.down_proj": ((2, 64, 4), "fp4", None),
        "experts.bias": ((2, 4), "float32", None),
    }
    record = verify_and_map_lowmem_model(target).metadata["layers"]["experts.down_proj"]
    assert record["transposed"] is True
    with open_foreign_checkpoint(source) as file:
        expected = values_of(file.tensors["experts.down_proj"])
    model = load(target, Mixture)
    experts = model.experts
    weight, x = experts.down_proj, torch.randn(3, 64, requires_grad=True)
    assert weight.shape == (2, 64, 4)
    assert torch.equal(weight.dequantize(), expected)
    out = experts(x)
    for e in range(2):
        assert_product(out[e], x, expected[e].T, experts.bias[e], more=OF_4_BITS)
    assert not experts.dequantized_by
    save(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == target.read_bytes()
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one.experts.down_proj.dequantize(), expected)
    other = load(target, Mixture)
    other.load_state_dict(model.state_dict())
    straight = Mixture()
    with torch.no_grad():
        straight.experts.down_proj.copy_(expected)
    with pytest.raises(RuntimeError, match="transposed"):
        other.load_state_dict(convert(straight, FourBit("fp4", 32, "float16")).state_dict())
    adapted = convert(load(target, Mixture), LoRA(2))
    nn.init.normal_(adapted.experts.adapters.default.down_proj.lora_b)
    wanted = adapted.experts(x.detach())
    torch.testing.assert_close(merge(adapted, to=torch.float32).experts(x.detach()), wanted, rtol=1e-4, atol=1e-4)
    dense = restore(model)
    assert torch.equal(dense.experts.down_proj, expected)


def test_a_record_that_says_transposed_of_a_linear_layer_is_refused(tmp_path):
    source, target = gpt_oss(tmp_path), tmp_path / "a.safetensors"
    import_foreign_checkpoint(source, target)

    class Wrong(Mixture):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.down_proj = nn.Linear(4, 64)

    with pytest.raises(FileError, match="Linear cannot hold a weight that is stored transposed"):
        load(target, Wrong)
