"""The config.json of a GGUF file's model: the inverse of ``lowmem.io.formats.gguf.gguf_metadata``.

transformers' own leaves
out what changes the rotary embedding, the length of heads, and biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import file_error, short_repr
from lowmem.io.filesystem import open_regular_file, read_errors_with_path
from lowmem.io.formats.gguf.gguf_config_checks import checked_positive_integer, checked_positive_number
from lowmem.io.formats.gguf.gguf_file import GGUFHeader, read_gguf_header
from lowmem.io.formats.gguf.gguf_gemma3 import GEMMA3_PERIOD, gemma3_attention_scalar, gemma3_layer_types
from lowmem.io.formats.gguf.gguf_metadata import gguf_model_fields, llama3_rope_factors_or_none

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
"""The classes of the architectures whose metadata are all there is to know. Mistral's files are llama's."""

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_down.bias"}
"""Of what a config says that there are biases, and a tensor that a file then has. Those of a qwen2 are not said."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all models of Llama 3.1 to 3.3 have; the fourth number is the largest of a file's factors."""

_FACTORS = "rope_freqs.weight"
# Relative: factors and numbers are rounded to float32
_CLOSE = 1e-6
_COMPUTED = ("rope.", "attention.")
"""How the keys begin that say what a model computes, beside the shapes of its weights."""
_OF_SHAPES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys without which a file's heads are as long as its weights say."""
_LOCAL_THETA = "gemma3.rope.freq_base_swa"
_LENGTH = "rope.scaling.original_context_length"  # of yarn; without it the context's


def gguf_config_dict_or_none(file: Path) -> dict[str, Any] | None:
    """Return what config.json holds of a file's model; None: of an architecture that only transformers describes.

    Raises:
        FileError: the file is damaged, lacks what the config needs, or has what transformers does not compute.
    """
    with open_regular_file(file) as opened:
        header = read_gguf_header(file, opened)
        try:
            return _config_dict_from_header_or_none(header, _read_rope_divisors_or_none(file, opened, header))
        except ValueError as reason:
            raise file_error(file, f"{reason}; {_REMEDY}", "make a folder of") from None


def check_config_matches_gguf(file: Path, config: Any) -> None:
    """Raise a FileError if the config of transformers and the GGUF file describe different models."""
    with open_regular_file(file) as opened:
        header = read_gguf_header(file, opened)
        factors = _read_rope_divisors_or_none(file, opened, header)
    try:
        differs = _first_difference_text_or_none(header, factors, config.to_dict())
    except ValueError as reason:
        differs = str(reason)
    if differs is not None:
        remedy = "`lowmem quantize FILE FOLDER` writes a right config, or give config="
        raise file_error(file, f"{differs}; {remedy}", "load")


_count, _number = (
    partial(checked_positive_integer, remedy=""),
    partial(checked_positive_number, remedy=""),
)  # errors get the remedy of the file

_REMEDY = "`lowmem quantize FILE OUT.safetensors` needs no config"


def _config_dict_from_header_or_none(header: GGUFHeader, rope_divisors: Tensor | None) -> dict[str, Any] | None:
    """Return the config of a header; raise a ValueError for one that transformers does not compute."""
    metadata, arch = header.metadata, header.metadata.get("general.architecture")
    if arch not in _CLASSES:
        return None
    config: dict[str, Any] = {"model_type": arch, "architectures": [_CLASSES[arch]]}
    config |= {name: _count(metadata, f"{arch}.{key}") for name, key in _SIZES.items()}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = _count(metadata, f"{arch}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _count(metadata, f"{arch}.{key}", head) != head:
            raise ValueError(f"{arch}.{key}={metadata[f'{arch}.{key}']} is not the {head} of attention.key_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("it has no matrix 'token_embd.weight'")
    config = {
        **config,
        "num_key_value_heads": _count(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": _number(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope_parameters(metadata, arch, rope_divisors, config | {"head_dim": head}),
        **{name: True for name, tensor in _BIASES.items() if tensor in header.tensors and arch != "qwen2"},
        **{name: _token_id_or_none(metadata, f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()},
    }
    return _config_as_gemma3(metadata, config) if arch == "gemma3" else config


def _config_as_gemma3(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a Gemma 3, of what a llama's says of its file."""
    window, layers, head = "gemma3.attention.sliding_window", config["num_hidden_layers"], config["head_dim"]
    # Before a word for each of them is made
    if layers > 10**4:
        raise ValueError(f"gemma3.block_count={layers} is more layers than any model has")
    ropes = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": _number(metadata, _LOCAL_THETA, 10000.0)},
    }
    return {
        **config,
        "model_type": "gemma3_text",
        "sliding_window": _count(metadata, window),
        "layer_types": gemma3_layer_types(layers, _count(metadata, f"{window}_pattern", GEMMA3_PERIOD)),
        "query_pre_attn_scalar": gemma3_attention_scalar(
            layers, config["hidden_size"], config["num_attention_heads"], head
        ),
        "rope_parameters": ropes,
    }


def _rope_parameters(
    metadata: Mapping[str, Any], arch: str, rope_divisors: Tensor | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters of the rotary embedding."""
    prefix = f"{arch}.rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _number(metadata, f"{prefix}freq_base", 10000.0)}
    kind = metadata.get(f"{prefix}scaling.type", "none")
    if rope_divisors is not None and bool((rope_divisors != 1).any()):
        largest = float(rope_divisors.max())
        made = {**rope, "rope_type": "llama3", "factor": largest, **_LLAMA3}
        wanted = llama3_rope_factors_or_none({**config, "rope_parameters": made}) if 1 < largest < math.inf else None
        if kind != "none" or wanted is None or not _are_factors_close(wanted, rope_divisors):
            raise ValueError(f"{_FACTORS} has no factors of a Llama 3")
        return made
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{prefix}scaling.type={short_repr(kind)} is none of linear, yarn")
    known = ("type", "factor", "original_context_length", "finetuned")
    for key in metadata:
        name = key.removeprefix(f"{prefix}scaling.")
        if key != name and name not in known:
            raise ValueError(f"{key}={short_repr(metadata[key])} is nothing that a config of transformers says")
    scaled = {**rope, "rope_type": kind, "factor": _number(metadata, f"{prefix}scaling.factor")}
    if kind == "linear":
        return scaled
    length = _count(metadata, f"{arch}.{_LENGTH}", config["max_position_embeddings"])
    return {**scaled, "original_max_position_embeddings": length}


def _first_difference_text_or_none(
    header: GGUFHeader, rope_divisors: Tensor | None, config: dict[str, Any]
) -> str | None:
    """Return the first difference of a file and a config that changes what the model computes; or None."""
    metadata, arch = header.metadata, header.metadata.get("general.architecture")
    rope = config.get("rope_parameters") or {}
    if arch not in _CLASSES:
        name = next((name for name in header.tensors if "rope_f" in name), None)
        scaled = name is not None and rope.get("rope_type", "default") == "default"
        return f"{name} scales its rotary embedding, and config does not" if scaled else None
    # Of the window of a llama a file knows the context alone
    fields = gguf_model_fields(config if arch == "gemma3" else config | {"sliding_window": None})
    if not next(iter(fields)).startswith(f"{arch}."):
        return f"it is a {arch}, and config of a {short_repr(config.get('model_type'))}"
    # How embeddings are not scaled
    known = {key: value for key, value in metadata.items() if value != "none"}
    known.setdefault(f"{arch}.rope.freq_base", 10000.0)
    known.setdefault(f"{arch}.attention.head_count_kv", known.get(f"{arch}.attention.head_count"))
    known.setdefault(f"{arch}.{_LENGTH}", known.get(f"{arch}.context_length"))
    known.setdefault("gemma3.attention.sliding_window_pattern", GEMMA3_PERIOD)
    known.setdefault(_LOCAL_THETA, 10000.0)
    scaling = {key for key in known if key.startswith(f"{arch}.rope.scaling.")} - {f"{arch}.rope.scaling.finetuned"}
    if known.get(f"{arch}.rope.scaling.type") != "yarn":
        scaling.discard(f"{arch}.{_LENGTH}")
    for key in sorted(fields.keys() | scaling):
        name, config_value = key.removeprefix(f"{arch}."), fields.get(key)
        gguf_value = known.get(key, config_value if name in _OF_SHAPES else None)
        if name.startswith(_COMPUTED) and not _is_equal_or_close_float(gguf_value, config_value):
            return f"{key}={short_repr(gguf_value)} in it, and config says {short_repr(config_value)}"
    for name, tensor in _BIASES.items():
        has = tensor in header.tensors
        if arch != "qwen2" and has != bool(config.get(name, False)):
            return f"{name} is {has} in it, and config says {short_repr(config.get(name, False))}"
    scaled = llama3_rope_factors_or_none(config)
    if scaled is not None and rope_divisors is None:
        return f"it has no {_FACTORS}, and config scales its rotary embedding"
    if rope_divisors is not None and not _are_factors_close(
        torch.ones_like(rope_divisors) if scaled is None else scaled, rope_divisors
    ):
        return f"{_FACTORS} scales its rotary embedding otherwise than config"
    return None


def _read_rope_divisors_or_none(file: Path, opened: BufferedReader, header: GGUFHeader) -> Tensor | None:
    """Return the divisors of the frequencies of a file's rotary embedding, float32 (n,), or None."""
    tensor = header.tensors.get(_FACTORS)
    if tensor is None:
        return None
    if tensor.type != 0 or len(tensor.shape) != 1 or tensor.shape[0] > 2**16 or tensor.nbytes is None:
        raise file_error(file, f"its tensor {_FACTORS} is no vector of float32", "load")
    with read_errors_with_path(file):
        opened.seek(tensor.begin)
        content = opened.read(tensor.nbytes)
    if len(content) != tensor.nbytes:
        raise file_error(file, f"it was cut after it was opened, in tensor {_FACTORS}; get it again")
    return torch.frombuffer(bytearray(content), dtype=torch.float32)


def _are_factors_close(a: Tensor, b: Tensor) -> bool:
    # Infinity is close to itself alone
    return a.shape == b.shape and torch.allclose(a, b, rtol=_CLOSE, atol=0)


def _is_equal_or_close_float(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=_CLOSE) if isinstance(a, float) and isinstance(b, float) else a == b


def _token_id_or_none(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < 2**31):
        raise ValueError(f"{key}={short_repr(value)} must be a token's number")
    return value
