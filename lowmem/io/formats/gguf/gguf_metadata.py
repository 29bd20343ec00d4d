"""The metadata of a model in GGUF, as llama.cpp's converter fills them: from config.json, or an existing file."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import file_error, short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import read_exactly_into
from lowmem.io.formats.gguf.gguf_config_checks import (
    checked_object,
    checked_positive_integer,
    checked_positive_number,
)
from lowmem.io.formats.gguf.gguf_file import GGUFHeader, GGUFValue, read_gguf_header
from lowmem.io.formats.gguf.gguf_gemma3 import gemma3_config_as_llama_and_fields

ARCHITECTURES = MappingProxyType(
    {
        **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"},
        **{"smollm3": "smollm3", "gemma3_text": "gemma3"},
    }
)
"""``general.architecture`` by ``model_type`` of config.json."""

# By their config alone; others take an existing file
DESCRIBED = ("llama", "qwen2", "qwen3", "smollm3", "gemma3")

# Columns
MAX_HEAD = 2**16

_NOT_COPIED = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_NOT_COPIED_PARTS = ("split.", "quantize.")  # of files in parts, and how the other one was quantized

_COUNTS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.scaling.original_context_length"),
)
_NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
"""Fields of an architecture that are positive."""

# Types of values in GGUF
_FLAG, _TEXT, _ARRAY = 7, 8, 9
_TOKENIZER = "tokenizer.ggml."
_TEXTS = ("model", "pre", "tokenizer.chat_template")
_OF_TOKENS = MappingProxyType({"tokens": (_TEXT,), "scores": (6,), "token_type": (4, 5)})
"""Types of the arrays that have a value for each token: texts, float32 and integers of 32 bits."""

_FREE = ("context_length", "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length")
"""Fields that may differ from the config, or be another's default: llama.cpp takes what the file has."""


def gguf_architecture_of_model_type_or_raise(config: Mapping[str, Any]) -> str:
    """Return the architecture in GGUF; a ValueError if lowmem does not know its names there."""
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"model_type={short_repr(kind)} is no architecture that lowmem writes as GGUF: it writes {known}"
        )
    return architecture


def gguf_model_fields(config: Mapping[str, Any]) -> dict[str, GGUFValue]:
    """Return the fields of a model, by key; a ValueError for a value that llama.cpp does not compute."""
    arch = gguf_architecture_of_model_type_or_raise(config)
    if arch not in DESCRIBED:
        raise ValueError(
            f"model_type={short_repr(config['model_type'])} needs more than its config says: name an existing GGUF "
            "file of "
            "the model with --like"
        )
    others: dict[str, GGUFValue] = {}
    if arch == "gemma3":
        config, others = gemma3_config_as_llama_and_fields(config)
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={short_repr(config['hidden_act'])}: llama.cpp computes silu in a {arch}")
    layers = checked_positive_integer(config, "num_hidden_layers")
    rotated = config.get("no_rope_layers")
    known = [int((layer + 1) % 4 != 0) for layer in range(min(layers, 10**4))]
    if arch == "smollm3" and rotated not in (None, known):
        raise ValueError(f"no_rope_layers={short_repr(rotated)}: llama.cpp leaves out each fourth layer of a {arch}")
    heads, hidden = (
        checked_positive_integer(config, "num_attention_heads"),
        checked_positive_integer(config, "hidden_size"),
    )
    head = checked_positive_integer(config, "head_dim", hidden // heads)
    fields: dict[str, GGUFValue] = {
        "block_count": layers,
        "context_length": _context_length(config),
        "embedding_length": hidden,
        "feed_forward_length": checked_positive_integer(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": checked_positive_integer(config, "num_key_value_heads", heads),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": checked_positive_number(config, "rms_norm_eps"),
        "vocab_size": checked_positive_integer(config, "vocab_size"),
        **_rope_fields(config, head),
        **others,
    }
    return {f"{arch}.{key}": value for key, value in fields.items()}


def _context_length(config: Mapping[str, Any]) -> int:
    """Return the most tokens that llama.cpp computes right: it has no sliding window in these architectures."""
    length = checked_positive_integer(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return length
    return min(length, checked_positive_integer(config, "sliding_window"))


def _merged_rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of the rotary embedding, which older configs have in two places."""
    rope_parameters = checked_object(config, "rope_parameters") or checked_object(config, "rope_scaling")
    return {"rope_theta": config.get("rope_theta"), **rope_parameters}


def _rope_fields(config: Mapping[str, Any], head_dim: int) -> dict[str, GGUFValue]:
    rope = _merged_rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor={short_repr(part)} is not what llama.cpp computes in this architecture"
        )
    fields: dict[str, GGUFValue] = {
        "rope.freq_base": checked_positive_number(rope, "rope_theta", 10000.0),
        "rope.dimension_count": head_dim,
    }
    # Llama3: ``llama3_rope_factors_or_none``
    if kind in ("default", "llama3"):
        return fields
    if kind == "linear":
        return {
            **fields,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": checked_positive_number(rope, "factor"),
        }
    if kind == "yarn":
        known = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
        other = sorted(name for name, value in rope.items() if name not in known and value is not None)
        if other:
            raise ValueError(
                f"{other[0]}={short_repr(rope[other[0]])} of a yarn embedding is not written; name --like GGUF"
            )
        length = checked_positive_integer(
            rope, "original_max_position_embeddings", checked_positive_integer(config, "max_position_embeddings")
        )
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": checked_positive_number(rope, "factor")}
        return {**fields, "rope.scaling.original_context_length": length}
    raise ValueError(
        f"rope_type={short_repr(kind)} is none of default, linear, llama3, yarn, which llama.cpp computes"
    )


def llama3_rope_factors_or_none(config: Mapping[str, Any]) -> Tensor | None:
    """Return by what llama.cpp divides each frequency of a llama3 embedding, float32 (head_dim / 2); or None."""
    rope = _merged_rope_parameters(config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    head = checked_positive_integer(
        config,
        "head_dim",
        checked_positive_integer(config, "hidden_size") // checked_positive_integer(config, "num_attention_heads"),
    )
    # Before a number for each pair of them is made
    if head > MAX_HEAD:
        raise ValueError(f"head_dim={head} is longer than any head: {MAX_HEAD} is the most; repair config.json")
    base, factor = checked_positive_number(rope, "rope_theta", 10000.0), checked_positive_number(rope, "factor")
    low, high = checked_positive_number(rope, "low_freq_factor"), checked_positive_number(rope, "high_freq_factor")
    context = checked_positive_integer(rope, "original_max_position_embeddings")
    if not low < high:
        raise ValueError(f"low_freq_factor={low} must be less than high_freq_factor={high}; repair config.json")
    waves = 2 * math.pi * base ** (torch.arange(0, head, 2, dtype=torch.float64, device="cpu") / head)
    smooth = (context / waves - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(waves < context / high, 1.0, torch.where(waves > context / low, factor, factors))
    return factors.float()


@dataclass(frozen=True)
class OpenGGUFMetadataSource:
    """An open file, whose ``fields`` another file of the same model takes over as they lie in it."""

    path: Path
    file: BufferedReader
    header: GGUFHeader
    fields: dict[str, bytes]

    @property
    def architecture(self) -> str:
        """Its ``general.architecture``."""
        return str(self.header.metadata.get("general.architecture"))

    def check_matches_config(self, config: Mapping[str, Any]) -> None:
        """Raise a FileError unless it is of the model that a config describes."""
        arch = gguf_architecture_of_model_type_or_raise(config)
        if self.architecture != arch:
            why = f"it is a {short_repr(self.architecture)}, and config.json describes a {short_repr(arch)}"
            raise file_error(self.path, f"{why}; name a file of the same model", "copy from")
        if arch not in DESCRIBED:
            return
        for key, value in gguf_model_fields(config).items():
            file_value = self.header.metadata.get(key)
            if key.removeprefix(f"{arch}.") in _FREE or file_value is None:
                continue
            same = file_value == value
            if isinstance(value, float):
                same = isinstance(file_value, int | float) and math.isclose(file_value, value, rel_tol=1e-6)
            if not same:
                why = f"{key}={short_repr(file_value)} in it, and config.json says {short_repr(value)}"
                raise file_error(self.path, f"{why}; name a file of the same model", "copy from")

    def check_tokenizer_fields(self, embedding_rows: int) -> None:
        """Raise a FileError unless its tokenizer, if it has one, is that of an embedding of so many rows."""
        for key in self.fields:
            name = key.removeprefix(_TOKENIZER) if key.startswith(_TOKENIZER) else key
            value, (kind, count) = self.header.metadata[key], self._field_type_and_array_length_or_none(key)
            fits, what = True, ""
            if name in _OF_TOKENS:
                fits, what = (
                    kind in _OF_TOKENS[name] and count == embedding_rows,
                    f"an array for {embedding_rows} tokens",
                )
            elif name == "merges":
                fits, what = kind == _TEXT and count is not None, "an array of texts"
            elif name in _TEXTS:
                fits, what = (kind, count) == (_TEXT, None), "a text"
            elif key != name and name.endswith("_token_id"):
                fits, what = type(value) is int and 0 <= value < embedding_rows, f"one of {embedding_rows} tokens"
            elif key != name and name.startswith("add_"):
                fits, what = (kind, count) == (_FLAG, None), "true or false"
            if not fits:
                shown = f"{count} values of GGUF's type {kind}" if value is None else short_repr(value)
                raise file_error(self.path, f"{key}={shown} must be {what}; name another file", "copy from")
        model = self.header.metadata.get(f"{_TOKENIZER}model", "no_vocab")
        if model != "no_vocab" and f"{_TOKENIZER}tokens" not in self.fields:
            why = f"{_TOKENIZER}model={short_repr(model)}, and it has no {_TOKENIZER}tokens; name another file"
            raise file_error(self.path, why, "copy from")

    def _field_type_and_array_length_or_none(self, key: str) -> tuple[int, int | None]:
        """Return the type of a field's value, and None; of an array the type and the number of its values."""
        # Behind the length and the text of the key
        content, at = self.fields[key], 8 + len(key.encode())
        kind = int.from_bytes(content[at : at + 4], "little")
        return struct.unpack_from("<IQ", content, at + 4) if kind == _ARRAY else (kind, None)


def _check_metadata_numbers(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise a FileError unless the numbers of an existing file are some that a model has."""
    arch = f"{metadata.get('general.architecture')}."
    fields = {key.removeprefix(arch): value for key, value in metadata.items() if key.startswith(arch)}
    with value_errors_as_file_errors(path, "copy from"):
        for name in fields:
            if name in _COUNTS:
                checked_positive_integer(metadata, arch + name, remedy="; name another file")
            elif name in _NUMBERS:
                checked_positive_number(metadata, arch + name, remedy="; name another file")
    head = fields.get(
        "attention.key_length", fields.get("embedding_length", 0) // fields.get("attention.head_count", 1)
    )
    rotated = fields.get("rope.dimension_count", 0)
    if rotated > head or rotated % 2:
        why = f"{arch}rope.dimension_count={rotated} must be even, and at most {head}, the columns of a head"
        raise file_error(path, f"{why}; name another file", "copy from")


def read_copyable_gguf_metadata(path: Path, file: BufferedReader) -> OpenGGUFMetadataSource:
    """Read the metadata of an open file; a FileError if it is damaged, or no model."""
    header = read_gguf_header(path, file)
    metadata = header.metadata
    if metadata.get("general.type", "model") != "model":
        raise file_error(
            path, f"general.type={short_repr(metadata['general.type'])} is no model; name the model's file"
        )
    _check_metadata_numbers(path, metadata)
    fields = {}
    for key, place in header.field_slices.items():
        if key in _NOT_COPIED or key.startswith(_NOT_COPIED_PARTS):
            continue
        content = bytearray(place.stop - place.start)
        read_exactly_into(path, file, place.start, memoryview(content))
        fields[key] = bytes(content)
    return OpenGGUFMetadataSource(path, file, header, fields)
