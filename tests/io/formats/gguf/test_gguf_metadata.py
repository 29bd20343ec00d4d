"""The metadata of a model in GGUF."""

import math
import re

import pytest
import torch

from lowmem.errors import FileError
from lowmem.io.formats.gguf.gguf_file import encode_metadata_field
from lowmem.io.formats.gguf.gguf_metadata import (
    gguf_architecture_of_model_type_or_raise,
    gguf_model_fields,
    llama3_rope_factors_or_none,
    read_copyable_gguf_metadata,
)
from tests.io.formats import written
from tests.io.formats.folders import CONFIG

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_the_config_of_a_llama_becomes_fields():
    assert gguf_model_fields(CONFIG) == {
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


def test_configs_of_other_models_and_older_ones_become_fields():
    def fields(**changes):
        return gguf_model_fields({**CONFIG, **changes})

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
            gguf_model_fields({**CONFIG, **changes})


def test_llama3_divides_low_frequencies_and_leaves_high_ones():
    """Llama 3.1's own: waves up to context / high stay, those from context / low on are divided by the factor."""
    assert llama3_rope_factors_or_none(CONFIG) is None
    found = llama3_rope_factors_or_none({**CONFIG, "head_dim": 32, "rope_parameters": LLAMA3})
    waves = 2 * math.pi * 500000.0 ** (torch.arange(0, 32, 2) / 32)
    assert found.shape == (16,)
    assert (found[waves < 8] == 1).all()
    assert (found[waves > 32] == 8).all()
    between = found[(waves >= 8) & (waves <= 32)]
    assert len(between)
    assert ((between >= 1) & (between <= 8)).all()
    with pytest.raises(ValueError, match="head_dim=268435456 is longer than any head"):
        llama3_rope_factors_or_none({**CONFIG, "rope_parameters": LLAMA3, "head_dim": 2**28})
    for changes in ({"low_freq_factor": 4.0}, {"factor": None}, {"original_max_position_embeddings": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            llama3_rope_factors_or_none({**CONFIG, "rope_parameters": {**LLAMA3, **changes}})


def existing_of(path, metadata):
    path.write_bytes(written.gguf(metadata))
    with open(path, "rb") as file:
        return read_copyable_gguf_metadata(path, file)


def test_fields_of_an_existing_file_are_copied_but_for_how_it_is_stored(tmp_path):
    like = {"general.architecture": "llama", **gguf_model_fields(CONFIG)}
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "c"], "tokenizer.ggml.model": "gpt2"}
    own = {"general.file_type": 3, "general.alignment": 32, "split.count": 0, "quantize.imatrix.file": "x"}
    found = existing_of(tmp_path / "a.gguf", {**like, **tokens, **own})
    assert found.fields.keys() == {*like, *tokens} - {"general.architecture"}
    assert found.fields["tokenizer.ggml.model"] in (tmp_path / "a.gguf").read_bytes()
    found.check_matches_config(CONFIG)
    found.check_matches_config({**CONFIG, "max_position_embeddings": 64})
    for changes in ({"num_hidden_layers": 2}, {"rms_norm_eps": 1e-5}, {"model_type": "qwen2"}):
        with pytest.raises(FileError, match="same model"):
            found.check_matches_config({**CONFIG, **changes})
    with pytest.raises(FileError, match="adapter"):
        existing_of(tmp_path / "c.gguf", {**like, "general.type": "adapter"})
    assert gguf_architecture_of_model_type_or_raise({"model_type": "smollm3"}) == "smollm3"


def test_numbers_of_an_existing_file_that_no_model_has_are_refused(tmp_path):
    like = {"general.architecture": "llama", **gguf_model_fields(CONFIG)}
    for key, value in (
        ("rope.dimension_count", 2**31),
        ("rope.dimension_count", 18),  # a head has 16 columns
        ("context_length", 0),
        ("attention.head_count_kv", [2]),
        ("attention.value_length", True),
        ("rope.freq_base", 0.0),
        ("rope.scaling.factor", float("inf")),
        ("attention.layer_norm_rms_epsilon", "1e-6"),
    ):
        with pytest.raises(
            FileError, match=rf"a\.gguf': llama\.{key}={re.escape(repr(value))} .*; name another file$"
        ):
            existing_of(tmp_path / "a.gguf", {**like, f"llama.{key}": value})
    existing_of(tmp_path / "a.gguf", {**like, "llama.rope.dimension_count": 8})


def test_tokens_of_an_existing_file_are_those_of_the_embedding(tmp_path):
    like = {"general.architecture": "llama", **gguf_model_fields(CONFIG)}
    tokens = {"model": "llama", "tokens": ["a", "b", "c"], "scores": [0.0, 1.0, 2.0], "token_type": [1, 1, 1]}
    tokens |= {"bos_token_id": 2, "merges": ["a b"], "add_bos_token": True, "pre": "default"}

    def check(**changes):
        own = {f"tokenizer.ggml.{name}": value for name, value in (tokens | changes).items() if value is not None}
        own["tokenizer.chat_template"] = "x" * 10**5
        fields = {key: encode_metadata_field(key, value)[8 + len(key) :] for key, value in own.items()}
        existing_of(tmp_path / "a.gguf", {**like, **fields}).check_tokenizer_fields(3)

    check()
    for name, value, told in (
        ("tokens", ["a", "b"], "2 values of GGUF's type 8 must be an array for 3 tokens"),
        ("tokens", [1, 2, 3], "must be an array for 3 tokens"),
        ("scores", [0.0, 1.0], "must be an array for 3 tokens"),
        ("token_type", [1.0, 1.0, 1.0], "must be an array for 3 tokens"),
        ("merges", "a b", "'a b' must be an array of texts"),
        ("bos_token_id", 3, "3 must be one of 3 tokens"),
        ("eos_token_id", 2**32 - 1, "4294967295 must be one of 3 tokens"),
        ("unknown_token_id", "a", "'a' must be one of 3 tokens"),
        ("add_eos_token", 1, "1 must be true or false"),
        ("pre", ["default"], "must be a text"),
        ("model", 3, "3 must be a text"),
    ):
        with pytest.raises(FileError, match=rf"a\.gguf': tokenizer\.ggml\.{name}=.*{told}.*; name another file$"):
            check(**{name: value})
    with pytest.raises(FileError, match=r"model='llama', and it has no tokenizer\.ggml\.tokens; name another file"):
        check(tokens=None, scores=None, token_type=None)
