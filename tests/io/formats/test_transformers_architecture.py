"""The model of a folder, as transformers makes it: what is linear, what stays dense, and what is refused."""

import json
import re
import sys

import pytest
import torch

from lowmem.errors import FileError
from lowmem.io.formats.transformers_architecture import architecture_from_config
from lowmem.version import install_command


def test_without_transformers_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=re.escape(install_command("transformers"))):
        architecture_from_config(tmp_path, {"architectures": ["LlamaForCausalLM"]})


def described(folder, config):
    config.save_pretrained(folder)
    return architecture_from_config(folder, json.loads((folder / "config.json").read_text()))


def test_layers_of_real_models(tmp_path, monkeypatch):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e formats")
    from transformers import GPT2Config, LlamaConfig, T5Config
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

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
    monkeypatch.setitem(MODULES_TO_PATCH_FOR_QUANTIZATION, "LlamaMLP", {})
    message = "the LlamaMLP at 'model.layers.0.mlp' becomes other modules when transformers loads it"
    with pytest.raises(FileError, match=message):
        described(tmp_path / "llama", llama)


def test_a_config_without_a_model_is_refused(tmp_path):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e formats")
    for architectures in (None, [], "LlamaForCausalLM", ["NoSuchModel"], ["load_tool"], [1], ["AutoModel"]):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(FileError, match="architectures names"):
            architecture_from_config(tmp_path, {"architectures": architectures})
    for config in ({"model_type": "unknown"}, {"model_type": "llama", "hidden_size": "x"}, {"model_type": 3}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(FileError, match=r"cannot export .*config\.json.: transformers cannot build this model"):
            architecture_from_config(tmp_path, {"architectures": ["LlamaForCausalLM"], **config})
