"""Adapters as GGUF, read back by lowmem's own reader of headers; llama.cpp runs them in tests/formats."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lowmem import FourBit, LoRA, adapter_layers, convert, save_adapter
from tests.io.formats.written import header_of


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 32), nn.Linear(16, 16)
        self.rotary = nn.Linear(16, 16)


class Llama(nn.Module):
    """The names of transformers' llama: 4 heads, 2 of keys, with 8 rows each (of 4, the order is its own inverse)."""

    def __init__(self, kind="llama", tied=False):
        super().__init__()
        self.config = SimpleNamespace(model_type=kind, num_attention_heads=4, num_key_value_heads=2)
        layer = nn.ModuleDict({"self_attn": Attention(), "mlp": nn.ModuleDict({"down_proj": nn.Linear(16, 16)})})
        layers = nn.ModuleList([nn.ModuleDict({}), layer])
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(20, 16), "layers": layers})
        self.lm_head = nn.Linear(16, 20)
        if tied:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def get_input_embeddings(self):
        return self.model["embed_tokens"]

    def get_output_embeddings(self):
        return self.lm_head


def adapted(model, *ends, technique=None, base=()):
    torch.manual_seed(0)
    model = convert(model, *base, technique or LoRA(2, 6), where=lambda path, _: path.endswith(ends))
    for one in adapter_layers(model, "default").values():
        nn.init.normal_(one.lora_a)
        nn.init.normal_(one.lora_b)
    return model


def content(path):
    """Return the fields and tensors of a file."""
    header = header_of(path)
    raw = path.read_bytes()
    tensors = {
        name: np.frombuffer(raw, np.float32, one.nbytes // 4, one.begin).reshape(one.shape)
        for name, one in header.tensors.items()
    }
    return header.metadata, tensors


def test_names_fields_and_orders_are_those_of_llama_cpp(tmp_path):
    model = adapted(Llama(), "q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head")
    save_adapter(model, tmp_path / "a.gguf", format="gguf")
    fields, tensors = content(tmp_path / "a.gguf")
    assert fields == {
        "general.architecture": "llama", "general.type": "adapter", "general.name": "default", "general.file_type": 0,
        "adapter.type": "lora", "adapter.lora.alpha": 6.0,
    }  # fmt: skip
    places = adapter_layers(model, "default")
    names = {
        "lm_head": "output", "model.embed_tokens": "token_embd", "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "model.layers.1.self_attn.q_proj": "blk.1.attn_q", "model.layers.1.self_attn.k_proj": "blk.1.attn_k",
    }  # fmt: skip
    assert set(tensors) == {f"{name}.weight.lora_{part}" for name in names.values() for part in "ab"}
    for place, name in names.items():
        a, b = (value.detach().numpy() for value in (places[place].lora_a, places[place].lora_b))
        found_a, found_b = (tensors[f"{name}.weight.lora_{part}"] for part in "ab")
        assert np.array_equal(found_a, a.T if name == "token_embd" else a)
        if name in ("blk.1.attn_q", "blk.1.attn_k"):  # of each head's 8 rows, the two halves are interleaved
            b = b.reshape(-1, 2, 4, 2).swapaxes(1, 2).reshape(b.shape)
        assert np.array_equal(found_b, b)


def test_what_llama_cpp_does_not_scale_is_folded_into_b(tmp_path):
    ranked = LoRA(4, 6, ranks={"*q_proj": 2}, alphas={"*.down_proj": 0.3})
    for number, technique in enumerate([LoRA(4, 6, rank_stabilized=True), ranked, LoRA(4, 1e-30)]):
        base = (FourBit(block_size=16),)
        model = adapted(Llama(), "down_proj", "q_proj", "lm_head", technique=technique, base=base)
        save_adapter(model, tmp_path / f"{number}.gguf", format="gguf")
        fields, tensors = content(tmp_path / f"{number}.gguf")
        for place, name in {"model.layers.1.mlp.down_proj": "blk.1.ffn_down", "lm_head": "output"}.items():
            one = adapter_layers(model, "default")[place]
            a, b = (tensors[f"{name}.weight.lora_{part}"].astype(np.float64) for part in "ab")
            found = b @ a * (fields["adapter.lora.alpha"] / one.rank)
            exact = one.lora_b.detach().double().numpy() @ one.lora_a.detach().double().numpy() * one.scaling
            # B is rounded once to float32: half a unit in the last place of each of its numbers.
            bound = np.abs(b) @ np.abs(a) * (fields["adapter.lora.alpha"] / one.rank) * 2.0**-23
            assert np.all(np.abs(found - exact) <= bound)


@pytest.mark.parametrize(
    ("model", "ends", "message"),
    [
        (lambda: Llama("gpt2"), ("q_proj",), r"Llama \(gpt2\) has no names in GGUF that lowmem knows, which are"),
        (lambda: nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), ("q_proj",), "ModuleDict has no names in GGUF .*'peft'"),
        (Llama, ("rotary",), "rotary: weight .* has no known place in a GGUF file of 'llama'; leave it out"),
        (lambda: Llama(tied=True), ("lm_head",), "lm_head: its weight is that of the other end of the model"),
        (lambda: Llama(tied=True), ("embed_tokens",), "embed_tokens: its weight is that of the other end"),
    ],
)
def test_what_gguf_has_no_form_of_is_refused_by_name(tmp_path, model, ends, message):
    with pytest.raises(ValueError, match=message):
        save_adapter(adapted(model(), *ends), tmp_path / "a.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_trains_beside_the_adapter_is_not_left_out_in_silence(tmp_path):
    model = adapted(Llama(), "q_proj")
    model.lm_head.weight.requires_grad_()
    with pytest.raises(ValueError, match="^lm_head: its weight trains beside the adapter, .*freeze it"):
        save_adapter(model, tmp_path / "a.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_scaling_beyond_float32_is_refused_and_files_are_kept(tmp_path):
    technique = LoRA(2, 1e-10, alphas={"*lm_head": 3e38})
    model = adapted(Llama(), "q_proj", "k_proj", "lm_head", technique=technique)
    with pytest.raises(ValueError, match="lm_head: its B exceeds float32 with the scaling folded in: scale it down"):
        save_adapter(model, tmp_path / "a.gguf", format="gguf")
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists"):
        save_adapter(adapted(Llama(), "q_proj"), tmp_path / "a.gguf", format="gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"
