"""Tiny models of transformers in folders, and what must be equal of two of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

SIZES = {"vocab_size": 258, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=258, n_embd=64, n_head=4, n_layer=2, n_positions=64, **ENDS),  # Conv1D, and tied
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),  # experts become one tensor
}
IDS = torch.arange(10, 30)[None]


def write(folder: Path, kind: str = "tied llama", dtype: torch.dtype = torch.float32, **more) -> Path:
    """Write a folder of random weights; return it."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype).save_pretrained(folder, **more)
    return folder


def load(folder: Path, *, as_class=AutoModelForCausalLM, **more):
    return as_class.from_pretrained(folder, **more)


def change_config(folder: Path, **changes) -> dict:
    """Change keys of config.json, where None removes one; return what it was."""
    file = folder / "config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**before, **changes}.items() if value is not None}))
    return before


def change_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Change tensors of a folder of one file, where None removes one; return what they were."""
    file = folder / "model.safetensors"
    before = load_file(file)
    changed = {name: value for name, value in {**before, **changes}.items() if value is not None}
    save_file(changed, file, {"format": "pt"})
    return before


def spoil(folder: Path, name: str) -> None:
    """Make a number of a weight a NaN."""
    weight = load_file(folder / "model.safetensors")[name]
    weight[0, 0] = torch.nan
    change_weights(folder, {name: weight})


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Two models have the same states, to the bit, and the same ties."""
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype, name
        assert torch.equal(value, states[1][name]), name
    assert ties(a) == ties(b)


def ties(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)
