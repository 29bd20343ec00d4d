"""The config of a GGUF file's model: the one that the file was written of, and others are refused by what differs."""

import math

import pytest
import torch
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lowmem import FileError
from lowmem.integrations.transformers.gguf_config import check_config_matches_gguf, gguf_config_dict_or_none
from lowmem.io.formats.gguf.gguf_file import GGUFTensorInfo, encode_metadata_field, write_new_gguf_file
from lowmem.io.formats.gguf.gguf_metadata import (
    gguf_architecture_of_model_type_or_raise,
    gguf_model_fields,
    llama3_rope_factors_or_none,
)
from tests.integrations.transformers.folders import SIZES

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3 = SIZES | {"num_hidden_layers": 7, "head_dim": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, head_dim=64, rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192}),
    "linear": LlamaConfig(
        **SIZES, attention_bias=True, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral": MistralConfig(**SIZES, head_dim=32, sliding_window=64),
    "qwen2": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "smollm3": SmolLM3Config(**SIZES | {"num_hidden_layers": 5}, pad_token_id=None, eos_token_id=3),
    "gemma3": Gemma3TextConfig(**GEMMA3, sliding_window=16, query_pre_attn_scalar=32),
    "gemma3 of other layers": Gemma3TextConfig(
        **GEMMA3 | {"num_hidden_layers": 5},
        sliding_window=8,
        sliding_window_pattern=3,
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    ),
}


ROTATED = "llama.rope.dimension_count"


def write(path, config, change=None, tensors=None):
    """Write what a file of a config's model says of it; ``change`` replaces fields, or removes them where None."""
    told = config.to_dict()
    arch = gguf_architecture_of_model_type_or_raise(told)
    told_in_phi3 = {} if arch != "phi3" else {"phi3.block_count": 1}
    fields = {"general.architecture": arch, **(told_in_phi3 or gguf_model_fields(told))}
    ids = (("bos_token_id", "bos"), ("eos_token_id", "eos"))
    fields |= {f"tokenizer.ggml.{key}_token_id": told[name] for name, key in ids if told[name] is not None}
    fields = {key: value for key, value in (fields | (change or {})).items() if value is not None}
    shapes = {"token_embd.weight": (told["vocab_size"], 2)}
    shapes |= {} if told["tie_word_embeddings"] else {"output.weight": (told["vocab_size"], 2)}
    shapes |= {"blk.0.attn_q.bias": (2,)} if told.get("attention_bias") or arch == "qwen2" else {}
    shapes |= {"blk.0.ffn_down.bias": (2,)} if told.get("mlp_bias") else {}
    contents = {name: torch.zeros(shape) for name, shape in shapes.items()}
    factors = llama3_rope_factors_or_none(told)
    contents |= {} if factors is None else {"rope_freqs.weight": factors}
    contents |= tensors or {}
    placed = [GGUFTensorInfo(name, tuple(one.shape), 0) for name, one in contents.items()]
    values = [(name, one.flatten().view(torch.uint8)) for name, one in contents.items()]
    write_new_gguf_file(
        path, {key: encode_metadata_field(key, value) for key, value in fields.items()}, placed, values
    )
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_that_of_the_model(name, tmp_path):
    config = CONFIGS[name]
    file = write(tmp_path / "a.gguf", config)
    found = AutoConfig.for_model(**gguf_config_dict_or_none(file))
    for one in (config, found):
        check_config_matches_gguf(file, one)
    told, wanted = found.to_dict(), config.to_dict()
    fields, expected = gguf_model_fields(told), gguf_model_fields(wanted)
    assert fields.keys() == expected.keys()
    for key, value in expected.items():
        assert fields[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), key
    factors = llama3_rope_factors_or_none(told), llama3_rope_factors_or_none(wanted)
    assert (factors[0] is factors[1] is None) or torch.equal(*factors)
    for key in ("tie_word_embeddings", "vocab_size", "bos_token_id", "eos_token_id"):
        assert told[key] == wanted[key], key
    for key in ("attention_bias", "mlp_bias"):
        assert told.get(key, False) == wanted.get(key, False), key


def test_a_config_that_says_otherwise_is_refused_by_what_differs(tmp_path):
    file = write(tmp_path / "a.gguf", CONFIGS["linear"])
    for change, says in {
        "rms_norm_eps": (1e-3, "layer_norm_rms_epsilon=9.99.*e-07 in it, and config says 0.001"),
        "num_key_value_heads": (4, "head_count_kv=2 in it, and config says 4"),
        "head_dim": (32, "attention.key_length=16 in it, and config says 32"),
        "attention_bias": (False, "attention_bias is True in it, and config says False"),
        "mlp_bias": (True, "mlp_bias is False in it, and config says True"),
        "rope_parameters": ({"rope_type": "default", "rope_theta": 1e4}, "scaling.factor=2.0 in it, and .* None"),
        "hidden_act": ("gelu", "llama.cpp computes silu in a llama"),
    }.items():
        other = LlamaConfig(**CONFIGS["linear"].to_dict() | {change: says[0]})
        with pytest.raises(FileError, match=f"cannot load .*a.gguf': .*{says[1]}.*lowmem quantize FILE FOLDER"):
            check_config_matches_gguf(file, other)
    with pytest.raises(FileError, match="it is a llama, and config of a 'qwen2'"):
        check_config_matches_gguf(file, CONFIGS["qwen2"])
    told = {name: one.to_dict() for name, one in CONFIGS.items()}
    rope = {name: {**one["rope_parameters"], "rope_theta": 5e5} for name, one in told.items()}
    plain = LlamaConfig(**told["llama3"] | {"rope_parameters": rope["llama"]})
    with pytest.raises(FileError, match="it has no rope_freqs.weight, and config scales"):
        check_config_matches_gguf(write(tmp_path / "b.gguf", plain), CONFIGS["llama3"])
    with pytest.raises(FileError, match=r"rope_freqs.weight scales its rotary embedding otherwise"):
        check_config_matches_gguf(write(tmp_path / "c.gguf", CONFIGS["llama3"]), plain)
    infinite = {"rope_freqs.weight": torch.full((32,), math.inf)}
    with pytest.raises(FileError, match=r"rope_freqs.weight scales its rotary embedding otherwise"):
        check_config_matches_gguf(write(tmp_path / "d.gguf", CONFIGS["llama3"], tensors=infinite), CONFIGS["llama3"])


def test_an_architecture_that_only_transformers_describes(tmp_path):
    config = Phi3Config(**SIZES, pad_token_id=None)
    file = write(tmp_path / "a.gguf", config)
    assert gguf_config_dict_or_none(file) is None
    check_config_matches_gguf(file, config)
    file = write(tmp_path / "b.gguf", config, tensors={"rope_factors_long.weight": torch.ones(8)})
    with pytest.raises(FileError, match="rope_factors_long.weight scales its rotary embedding, and config does not"):
        check_config_matches_gguf(file, config)


def test_what_no_config_can_say_is_refused_and_what_may_lack_has_its_default(tmp_path):
    config = CONFIGS["llama3"]
    ones = {"rope_freqs.weight": torch.ones(32)}
    cases = {
        "embedding_length": ({"llama.embedding_length": None}, {}, "llama.embedding_length=None must be a positive"),
        "heads": ({"llama.attention.head_count": [4, 4]}, {}, r"head_count=\[4, 4\] must be a positive integer"),
        "eps": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, {}, "rms_epsilon=0.0 must be a positive number"),
        "partial": ({"llama.rope.dimension_count": 32}, {}, "dimension_count=32 is not the 64 of attention.key_len"),
        "token": ({"tokenizer.ggml.eos_token_id": "a"}, {}, "eos_token_id='a' must be a token's number"),
        "longrope": ({"llama.rope.scaling.type": "longrope"}, ones, "type='longrope' is none of linear, yarn"),
        "yarn": (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 2.0},
            ones,
            "attn_factor=2.0 is nothing that a config",
        ),
        "factors": ({}, {"rope_freqs.weight": torch.full((32,), 3.0)}, "rope_freqs.weight has no factors of a Llama"),
        "head": (
            dict.fromkeys(("llama.attention.key_length", "llama.attention.value_length", ROTATED), 2**28),
            {},
            "head_dim=268435456 is longer than any head",
        ),
        "length": ({}, {"rope_freqs.weight": torch.full((9,), 3.0)}, "rope_freqs.weight has no factors of a Llama"),
        **{
            str(bad): ({}, {"rope_freqs.weight": torch.full((32,), bad)}, "rope_freqs.weight has no factors of a L")
            for bad in (0.0, -1.0, math.inf, math.nan)
        },
        "matrix": ({}, {"rope_freqs.weight": torch.ones(32, 1)}, "rope_freqs.weight is no vector of float32"),
        "vector": ({}, {"token_embd.weight": torch.ones(4)}, "it has no matrix 'token_embd.weight'"),
    }
    for name, (change, tensors, says) in cases.items():
        with pytest.raises(FileError, match=says):
            gguf_config_dict_or_none(write(tmp_path / f"{name}.gguf", config, change, tensors))
    for scaling in ({"rope.scaling.type": "none"}, {"rope.freq_base": None}, {"attention.head_count_kv": None}):
        change = {f"llama.{key}": value for key, value in scaling.items()}
        file = write(tmp_path / f"{next(iter(scaling))}.gguf", config, change, ones)
        found = gguf_config_dict_or_none(file)
        assert found["rope_parameters"]["rope_type"] == "default"
        check_config_matches_gguf(file, AutoConfig.for_model(**found))
    change = {"qwen2.rope.scaling.original_context_length": None, "qwen2.context_length": 16}
    file = write(tmp_path / "yarn of the context.gguf", CONFIGS["qwen2"], change)
    assert gguf_config_dict_or_none(file)["rope_parameters"]["original_max_position_embeddings"] == 16
    check_config_matches_gguf(file, AutoConfig.for_model(**gguf_config_dict_or_none(file)))


def test_a_file_of_a_gemma_3_may_lack_what_has_a_default(tmp_path):
    config = CONFIGS["gemma3"]
    lacks = {"gemma3.attention.sliding_window_pattern": None, "gemma3.rope.freq_base_swa": None}
    file = write(tmp_path / "a.gguf", config, lacks)
    check_config_matches_gguf(file, config)
    assert gguf_config_dict_or_none(file)["layer_types"] == config.layer_types
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    other = Gemma3TextConfig(**config.to_dict() | {"layer_types": types})
    with pytest.raises(FileError, match="sliding_window_pattern=6 in it, and config says 3"):
        check_config_matches_gguf(file, other)
    with pytest.raises(FileError, match="gemma3.attention.sliding_window=None must be a positive integer"):
        gguf_config_dict_or_none(write(tmp_path / "b.gguf", config, {"gemma3.attention.sliding_window": None}))
    with pytest.raises(FileError, match="gemma3.block_count=2000000000 is more layers than any model has"):
        gguf_config_dict_or_none(write(tmp_path / "c.gguf", config, {"gemma3.block_count": 2 * 10**9}))
    other = Gemma3TextConfig(**config.to_dict() | {"query_pre_attn_scalar": 256})
    with pytest.raises(FileError, match="query_pre_attn_scalar=256: llama.cpp computes 32 in a gemma3"):
        check_config_matches_gguf(file, other)
