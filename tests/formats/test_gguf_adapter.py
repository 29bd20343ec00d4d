"""Adapters as GGUF, run by llama.cpp itself on a float32 base: its logits are those of lowmem's model."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("llama_cpp_py_sync", reason="llama-cpp-py-sync is not installed: tox -e formats")
pytest.importorskip("transformers", reason="transformers is not installed: tox -e formats")

import transformers

from lowmem import LoRA, adapter_layers, convert, export, save_adapter
from tests.formats.llama_cpp import llama_cpp

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages

TINY = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
KINDS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**TINY, sliding_window=None)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY, head_dim=16)),
}
TOKENS = [5, 0, 47, 11, 11, 3, 29]
TECHNIQUES = {
    "plain": LoRA(4, 6),
    "stabilized": LoRA(4, 6, rank_stabilized=True),
    "patterns": LoRA(4, 6, ranks={"*.k_proj": 2}, alphas={"*.q_proj": 1.3, "*.down_proj": 11}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(tmp_path, kind):
    torch.manual_seed(0)
    base = KINDS[kind]().eval()
    base.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "base.gguf", dtype=torch.float32)
    with torch.no_grad(), llama_cpp(tmp_path / "base.gguf") as loaded:
        plain = base(torch.tensor([TOKENS])).logits[0]
        assert (loaded.logits(TOKENS) - plain).abs().max() < 1e-5 * plain.abs().max()
        for name, technique in TECHNIQUES.items():
            model = convert(copy.deepcopy(base), technique, where=lambda *_: True)
            for adapter in adapter_layers(model, "default").values():
                nn.init.normal_(adapter.lora_a, std=0.1)
                nn.init.normal_(adapter.lora_b, std=0.1)
            path = tmp_path / f"{name}.gguf"
            save_adapter(model, path, format="gguf")
            loaded.adapt(path)
            expected = model(torch.tensor([TOKENS])).logits[0]
            assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
            assert (loaded.logits(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max(), name
            assert str(tmp_path).encode() not in path.read_bytes()
