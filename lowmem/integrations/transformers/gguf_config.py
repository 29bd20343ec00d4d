"""The config.json of a GGUF file's model: the inverse of ``lowmem.io.formats.gguf.fields``. transformers' own leaves
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

from lowmem.errors import refusal, show
from lowmem.io.atomic import open_regular, read_errors
from lowmem.io.formats.gguf.container import GGUFHeader, read_header
from lowmem.io.formats.gguf.fields import count_in, model_fields, number_in, rope_factors

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
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
_CLOSE = 1e-6  # relative: factors and numbers are rounded to float32
_COMPUTED = ("rope.", "attention.")
"""How the keys begin that say what a model computes, beside the shapes of its weights."""
_OF_SHAPES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys without which a file's heads are as long as its weights say."""
_LENGTH = "rope.scaling.original_context_length"  # of yarn; without it the context's


def config_of(file: Path) -> dict[str, Any] | None:
    """Return what config.json holds of a file's model; None: of an architecture that only transformers describes.

    Raises:
        FileError: the file is damaged, lacks what the config needs, or has what transformers does not compute.
    """
    with open_regular(file) as opened:
        header = read_header(file, opened)
        try:
            return _config(header, _factors(file, opened, header))
        except ValueError as reason:
            raise refusal(file, f"{reason}; {_REMEDY}", "make a folder of") from None


def check_config(file: Path, config: Any) -> None:
    """Raise a FileError if the config of transformers and the GGUF file describe different models."""
    with open_regular(file) as opened:
        header = read_header(file, opened)
        factors = _factors(file, opened, header)
    try:
        differs = _difference(header, factors, config.to_dict())
    except ValueError as reason:
        differs = str(reason)
    if differs is not None:
        remedy = "`lowmem quantize FILE FOLDER` writes a right config, or give config="
        raise refusal(file, f"{differs}; {remedy}", "load")


_count, _number = partial(count_in, remedy=""), partial(number_in, remedy="")  # errors get the remedy of the file

_REMEDY = "`lowmem quantize FILE OUT.safetensors` needs no config"


def _config(header: GGUFHeader, factors: Tensor | None) -> dict[str, Any] | None:
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
    return {
        **config,
        "num_key_value_heads": _count(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": _number(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope(metadata, arch, factors, config | {"head_dim": head}),
        **{name: True for name, tensor in _BIASES.items() if tensor in header.tensors and arch != "qwen2"},
        **{name: _token(metadata, f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()},
    }


def _rope(
    metadata: Mapping[str, Any], arch: str, factors: Tensor | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters of the rotary embedding."""
    prefix = f"{arch}.rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _number(metadata, f"{prefix}freq_base", 10000.0)}
    kind = metadata.get(f"{prefix}scaling.type", "none")
    if factors is not None and bool((factors != 1).any()):
        largest = float(factors.max())
        made = {**rope, "rope_type": "llama3", "factor": largest, **_LLAMA3}
        wanted = rope_factors({**config, "rope_parameters": made}) if 1 < largest < math.inf else None
        if kind != "none" or wanted is None or not _close(wanted, factors):
            raise ValueError(f"{_FACTORS} has no factors of a Llama 3")
        return made
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{prefix}scaling.type={show(kind)} is none of linear, yarn")
    known = ("type", "factor", "original_context_length", "finetuned")
    for key in metadata:
        name = key.removeprefix(f"{prefix}scaling.")
        if key != name and name not in known:
            raise ValueError(f"{key}={show(metadata[key])} is nothing that a config of transformers says")
    scaled = {**rope, "rope_type": kind, "factor": _number(metadata, f"{prefix}scaling.factor")}
    if kind == "linear":
        return scaled
    length = _count(metadata, f"{arch}.{_LENGTH}", config["max_position_embeddings"])
    return {**scaled, "original_max_position_embeddings": length}


def _difference(header: GGUFHeader, factors: Tensor | None, config: dict[str, Any]) -> str | None:
    """Return the first difference of a file and a config that changes what the model computes; or None."""
    metadata, arch = header.metadata, header.metadata.get("general.architecture")
    rope = config.get("rope_parameters") or {}
    if arch not in _CLASSES:
        name = next((name for name in header.tensors if "rope_f" in name), None)
        scaled = name is not None and rope.get("rope_type", "default") == "default"
        return f"{name} scales its rotary embedding, and config does not" if scaled else None
    fields = model_fields(config | {"sliding_window": None})  # of which a file knows the context alone
    if not next(iter(fields)).startswith(f"{arch}."):
        return f"it is a {arch}, and config of a {show(config.get('model_type'))}"
    known = {key: value for key, value in metadata.items() if value != "none"}  # how embeddings are not scaled
    known.setdefault(f"{arch}.rope.freq_base", 10000.0)
    known.setdefault(f"{arch}.attention.head_count_kv", known.get(f"{arch}.attention.head_count"))
    known.setdefault(f"{arch}.{_LENGTH}", known.get(f"{arch}.context_length"))
    scaling = {key for key in known if key.startswith(f"{arch}.rope.scaling.")} - {f"{arch}.rope.scaling.finetuned"}
    if known.get(f"{arch}.rope.scaling.type") != "yarn":
        scaling.discard(f"{arch}.{_LENGTH}")
    for key in sorted(fields.keys() | scaling):
        name, given = key.removeprefix(f"{arch}."), fields.get(key)
        found = known.get(key, given if name in _OF_SHAPES else None)
        if name.startswith(_COMPUTED) and not _same(found, given):
            return f"{key}={show(found)} in it, and config says {show(given)}"
    for name, tensor in _BIASES.items():
        has = tensor in header.tensors
        if arch != "qwen2" and has != bool(config.get(name, False)):
            return f"{name} is {has} in it, and config says {show(config.get(name, False))}"
    scaled = rope_factors(config)
    if scaled is not None and factors is None:
        return f"it has no {_FACTORS}, and config scales its rotary embedding"
    if factors is not None and not _close(torch.ones_like(factors) if scaled is None else scaled, factors):
        return f"{_FACTORS} scales its rotary embedding otherwise than config"
    return None


def _factors(file: Path, opened: BufferedReader, header: GGUFHeader) -> Tensor | None:
    """Return the divisors of the frequencies of a file's rotary embedding, float32 (n,), or None."""
    tensor = header.tensors.get(_FACTORS)
    if tensor is None:
        return None
    if tensor.type != 0 or len(tensor.shape) != 1 or tensor.shape[0] > 2**16 or tensor.nbytes is None:
        raise refusal(file, f"its tensor {_FACTORS} is no vector of float32", "load")
    with read_errors(file):
        opened.seek(tensor.begin)
        content = opened.read(tensor.nbytes)
    if len(content) != tensor.nbytes:
        raise refusal(file, f"it was cut after it was opened, in tensor {_FACTORS}; get it again")
    return torch.frombuffer(bytearray(content), dtype=torch.float32)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=_CLOSE, atol=0)  # infinity is close to itself alone


def _same(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=_CLOSE) if isinstance(a, float) and isinstance(b, float) else a == b


def _token(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < 2**31):
        raise ValueError(f"{key}={show(value)} must be a token's number")
    return value
