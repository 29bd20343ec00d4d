"""The model of a folder, as transformers makes it: what is linear, what stays dense, and what is refused."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from lowmem.errors import FileError
from lowmem.io.formats.architecture import architecture_of


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


class PreTrainedModel(nn.Module):
    """What is used of transformers' own class, with layers."""

    _keep_in_fp32_modules, _keep_in_fp32_modules_strict = ("norm",), None
    all_tied_weights_keys = {"head.weight": "fc.weight"}  # noqa: RUF012  as transformers has it

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.up, self.norm = nn.Linear(4, 2), nn.Linear(2, 4), Conv1D(), nn.LayerNorm(4)

    @classmethod
    def _from_config(cls, config, dtype):
        return cls().to(dtype)

    def initialize_weights(self):
        return self.fc.weight


def put_stand_in(monkeypatch, becomes_other):
    """Put modules there that have what is used of transformers; ``becomes_other`` are names of classes."""
    found = {name: ModuleType(name) for name in ("transformers", "transformers.quantizers")}
    names = ("pytorch_utils", "quantizers.base", "quantizers.quantizers_utils")
    utils, base, more = (found.setdefault(f"transformers.{name}", ModuleType(name)) for name in names)
    top = found["transformers"]
    top.__version__, top.PreTrainedModel, top.Model = "5", PreTrainedModel, type("Model", (PreTrainedModel,), {})
    config = SimpleNamespace(dtype=torch.float16)
    top.AutoConfig = SimpleNamespace(from_pretrained=lambda folder, **_: config)
    utils.Conv1D, base.MODULES_TO_PATCH_FOR_QUANTIZATION = Conv1D, dict.fromkeys(becomes_other)
    base.HfQuantizer = SimpleNamespace(get_modules_to_not_convert=lambda model, skip, keep: ["head", *keep])
    more.should_convert_module = lambda path, patterns: path not in patterns
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_without_transformers_one_line_says_what_to_install_and_what_it_makes_is_described(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lowmem\[transformers\]'"):
        architecture_of(tmp_path, {"architectures": ["LlamaForCausalLM"]})
    put_stand_in(monkeypatch, ["Experts"])
    found = architecture_of(tmp_path, {"architectures": ["Model"]})
    assert found.dtype == torch.float16
    assert found.linear == {"fc": "linear", "head": "linear", "up": "conv1d"}
    assert (found.dense, found.tied) == ({"head"}, {"head.weight"})
    assert found.shapes["up.weight"] == (4, 8)
    assert {name for name, dtype in found.dtypes.items() if dtype == torch.float32} == {"norm.weight", "norm.bias"}
    assert found.refusal(["up"]) is None
    assert "cannot load a Model whose weights are packed" in found.refusal(["fc"])
    put_stand_in(monkeypatch, ["Experts", "LayerNorm"])
    with pytest.raises(FileError, match="the LayerNorm at 'norm' becomes other modules when transformers loads it"):
        architecture_of(tmp_path, {"architectures": ["Model"]})
    for wrong in (None, [], "Model", ["Other"], ["AutoConfig"], [1]):
        with pytest.raises(FileError, match="architectures names .*, which transformers 5 has not; repair"):
            architecture_of(tmp_path, {"architectures": wrong})


def described(folder, config):
    config.save_pretrained(folder)
    return architecture_of(folder, json.loads((folder / "config.json").read_text()))


@pytest.mark.thorough
def test_layers_of_real_models(tmp_path):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e formats")
    from transformers import GPT2Config, LlamaConfig, T5Config

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaConfig(**sizes, intermediate_size=32, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    found = described(tmp_path / "llama", llama)
    assert found.dtype == torch.bfloat16
    assert found.linear["model.layers.0.mlp.up_proj"] == "linear"
    assert found.dense == {"lm_head"}
    assert not found.tied
    assert found.shapes["model.layers.0.mlp.up_proj.weight"] == (32, 16)
    assert set(found.dtypes.values()) == {torch.bfloat16}
    gpt2 = GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, architectures=["GPT2LMHeadModel"])
    found = described(tmp_path / "gpt2", gpt2)
    assert found.linear["transformer.h.0.attn.c_attn"] == "conv1d"
    assert found.shapes["transformer.h.0.attn.c_attn.weight"] == (16, 48)
    assert found.tied == {"lm_head.weight"}
    t5 = T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=1, dtype="float16")
    t5.architectures = ["T5ForConditionalGeneration"]
    found = described(tmp_path / "t5", t5)
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in found.dense  # kept in float32
    assert found.dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float32
    assert "encoder.embed_tokens.weight" in found.tied
    assert "transformers cannot load a T5" in found.refusal(["encoder.block.0.layer.0.SelfAttention.q"])
    found = described(tmp_path / "llama again", llama)
    assert found.refusal(path for path in found.linear if path != "lm_head") is None


def test_a_config_without_a_model_is_refused(tmp_path):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e formats")
    for architectures in (None, [], "LlamaForCausalLM", ["NoSuchModel"], ["load_tool"], [1], ["AutoModel"]):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(FileError, match="architectures names"):
            architecture_of(tmp_path, {"architectures": architectures})
    for config in ({"model_type": "unknown"}, {"model_type": "llama", "hidden_size": "x"}, {"model_type": 3}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(FileError, match=r"cannot export .*config\.json.: transformers cannot build this model"):
            architecture_of(tmp_path, {"architectures": ["LlamaForCausalLM"], **config})
