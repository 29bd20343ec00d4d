"""The metadata of a model in GGUF."""

import math

import pytest
import torch

from lowmem.errors import FileError
from lowmem.io.export.gguf_fields import architecture_of, model_fields, read_existing, rope_factors
from tests.io.export.folders import CONFIG
from tests.io.foreign import written

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_a_llama():
    assert model_fields(CONFIG) == {
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.vocab_size": 96,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
    }


def test_other_configs():
    def fields(**changes):
        return model_fields({**CONFIG, **changes})

    mistral = fields(model_type="mistral", sliding_window=64, head_dim=32)
    assert mistral["llama.context_length"] == 64  # llama.cpp has no window in a llama
    assert mistral["llama.rope.dimension_count"] == mistral["llama.attention.key_length"] == 32
    qwen = fields(model_type="qwen2", sliding_window=64, use_sliding_window=False, num_key_value_heads=None)
    assert (qwen["qwen2.context_length"], qwen["qwen2.attention.head_count_kv"]) == (128, 4)
    older = fields(rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    assert older["llama.rope.freq_base"] == 5e5
    assert (older["llama.rope.scaling.type"], older["llama.rope.scaling.factor"]) == ("linear", 2.0)
    smollm3 = fields(model_type="smollm3", num_hidden_layers=5, no_rope_layers=[1, 1, 1, 0, 1])
    assert smollm3["smollm3.block_count"] == 5
    yarn = fields(rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    assert yarn["llama.rope.scaling.original_context_length"] == 32


def test_what_llama_cpp_does_not_compute_or_no_model_has_is_refused_by_name():
    for changes, words in (
        ({"model_type": "gpt2"}, r"model_type='gpt2'.*llama"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "phi3"}, "--like"),
        ({"model_type": "smollm3", "no_rope_layers": [0]}, r"no_rope_layers=\[0\]"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            model_fields({**CONFIG, **changes})


def test_llama3_divides_low_frequencies_and_leaves_high_ones():
    """Llama 3.1's own: waves up to context / high stay, those from context / low on are divided by the factor."""
    assert rope_factors(CONFIG) is None
    found = rope_factors({**CONFIG, "head_dim": 32, "rope_parameters": LLAMA3})
    waves = 2 * math.pi * 500000.0 ** (torch.arange(0, 32, 2) / 32)
    assert found.shape == (16,)
    assert (found[waves < 8] == 1).all()
    assert (found[waves > 32] == 8).all()
    between = found[(waves >= 8) & (waves <= 32)]
    assert len(between)
    assert ((between >= 1) & (between <= 8)).all()
    with pytest.raises(ValueError, match="head_dim=268435456 is longer than any head"):
        rope_factors({**CONFIG, "rope_parameters": LLAMA3, "head_dim": 2**28})
    for changes in ({"low_freq_factor": 4.0}, {"factor": None}, {"original_max_position_embeddings": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            rope_factors({**CONFIG, "rope_parameters": {**LLAMA3, **changes}})


def existing_of(path, metadata):
    path.write_bytes(written.gguf(metadata))
    with open(path, "rb") as file:
        return read_existing(path, file)


def test_fields_of_an_existing_file_are_copied_but_for_how_it_is_stored(tmp_path):
    like = {"general.architecture": "llama", **model_fields(CONFIG)}
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "c"], "tokenizer.ggml.model": "gpt2"}
    own = {"general.file_type": 3, "general.alignment": 32, "split.count": 0, "quantize.imatrix.file": "x"}
    found = existing_of(tmp_path / "a.gguf", {**like, **tokens, **own})
    assert found.fields.keys() == {*like, *tokens} - {"general.architecture"}
    assert found.vocabulary == 3
    assert found.fields["tokenizer.ggml.model"] in (tmp_path / "a.gguf").read_bytes()
    found.check(CONFIG)
    found.check({**CONFIG, "max_position_embeddings": 64})
    for changes in ({"num_hidden_layers": 2}, {"rms_norm_eps": 1e-5}, {"model_type": "qwen2"}):
        with pytest.raises(FileError, match="same model"):
            found.check({**CONFIG, **changes})
    for value in ([1e-6], "1e-6", True):  # where a number belongs
        found = existing_of(tmp_path / "d.gguf", {**like, "llama.attention.layer_norm_rms_epsilon": value})
        with pytest.raises(FileError, match="rms_epsilon=.* in it, and config.json says 1e-06; name a file of the"):
            found.check(CONFIG)
    assert existing_of(tmp_path / "b.gguf", {**like, "tokenizer.ggml.tokens": "abc"}).vocabulary is None
    with pytest.raises(FileError, match="adapter"):
        existing_of(tmp_path / "c.gguf", {**like, "general.type": "adapter"})
    assert architecture_of({"model_type": "smollm3"}) == "smollm3"
