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

from lowmem.errors import refusal, refusing, show
from lowmem.io.atomic import read_into
from lowmem.io.formats.gguf.container import Field, GGUFHeader, read_header

ARCHITECTURES = MappingProxyType(
    {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "smollm3": "smollm3"}
)
"""``general.architecture`` by ``model_type`` of config.json."""

_DESCRIBED = ("llama", "qwen2", "qwen3", "smollm3")  # by their config alone; others take an existing file

MAX_HEAD = 2**16  # columns

_NOT_COPIED = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_NOT_COPIED_PARTS = ("split.", "quantize.")  # of files in parts, and how the other one was quantized

_COUNTS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.scaling.original_context_length"),
)
_NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
"""Fields of an architecture that are positive."""

_FLAG, _TEXT, _ARRAY = 7, 8, 9  # types of values in GGUF
_TOKENIZER = "tokenizer.ggml."
_TEXTS = ("model", "pre", "tokenizer.chat_template")
_OF_TOKENS = MappingProxyType({"tokens": (_TEXT,), "scores": (6,), "token_type": (4, 5)})
"""Types of the arrays that have a value for each token: texts, float32 and integers of 32 bits."""

_FREE = ("context_length", "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length")
"""Fields that may differ from the config, or be another's default: llama.cpp takes what the file has."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the architecture in GGUF; a ValueError if lowmem does not know its names there."""
    kind = config.get("model_type")
    found = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model_type={show(kind)} is no architecture that lowmem writes as GGUF: it writes {known}")
    return found


def model_fields(config: Mapping[str, Any]) -> dict[str, Field]:
    """Return the fields of a model, by key; a ValueError for a value that llama.cpp does not compute."""
    arch = architecture_of(config)
    if arch not in _DESCRIBED:
        raise ValueError(
            f"model_type={show(config['model_type'])} needs more than its config says: name an existing GGUF file of "
            "the model with --like"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={show(config['hidden_act'])}: llama.cpp computes silu in a {arch}")
    layers = count_in(config, "num_hidden_layers")
    rotated = config.get("no_rope_layers")
    known = [int((layer + 1) % 4 != 0) for layer in range(min(layers, 10**4))]
    if arch == "smollm3" and rotated not in (None, known):
        raise ValueError(f"no_rope_layers={show(rotated)}: llama.cpp leaves out each fourth layer of a {arch}")
    heads, hidden = count_in(config, "num_attention_heads"), count_in(config, "hidden_size")
    head = count_in(config, "head_dim", hidden // heads)
    fields: dict[str, Field] = {
        "block_count": layers,
        "context_length": _context(config),
        "embedding_length": hidden,
        "feed_forward_length": count_in(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": count_in(config, "num_key_value_heads", heads),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": number_in(config, "rms_norm_eps"),
        "vocab_size": count_in(config, "vocab_size"),
        **_rope(config, head),
    }
    return {f"{arch}.{key}": value for key, value in fields.items()}


_REPAIR = "; repair config.json"


def count_in(config: Mapping[str, Any], name: str, default: int | None = None, remedy: str = _REPAIR) -> int:
    """Return a positive integer of 31 bits; a ValueError for anything else. A default is taken for None, too."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{name}={show(value)} must be a positive integer{remedy}")
    return value


def number_in(config: Mapping[str, Any], name: str, default: float | None = None, remedy: str = _REPAIR) -> float:
    """Return a positive number below 2**64; a ValueError for anything else. A default is taken for None, too."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**64:
        raise ValueError(f"{name}={show(value)} must be a positive number{remedy}")
    return float(value)


def _context(config: Mapping[str, Any]) -> int:
    """Return the most tokens that llama.cpp computes right: it has no sliding window in these architectures."""
    length = count_in(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return length
    return min(length, count_in(config, "sliding_window"))


def _rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of the rotary embedding, which older configs have in two places."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_parameters={show(found)} must be an object; repair config.json")
    return {"rope_theta": config.get("rope_theta"), **found}


def _rope(config: Mapping[str, Any], head: int) -> dict[str, Field]:
    rope = _rope_of(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(f"partial_rotary_factor={show(part)} is not what llama.cpp computes in this architecture")
    fields: dict[str, Field] = {
        "rope.freq_base": number_in(rope, "rope_theta", 10000.0),
        "rope.dimension_count": head,
    }
    if kind in ("default", "llama3"):  # llama3: ``rope_factors``
        return fields
    if kind == "linear":
        return {**fields, "rope.scaling.type": "linear", "rope.scaling.factor": number_in(rope, "factor")}
    if kind == "yarn":
        known = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
        other = sorted(name for name, value in rope.items() if name not in known and value is not None)
        if other:
            raise ValueError(
                f"{other[0]}={show(rope[other[0]])} of a yarn embedding is not written; name --like GGUF"
            )
        length = count_in(rope, "original_max_position_embeddings", count_in(config, "max_position_embeddings"))
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": number_in(rope, "factor")}
        return {**fields, "rope.scaling.original_context_length": length}
    raise ValueError(f"rope_type={show(kind)} is none of default, linear, llama3, yarn, which llama.cpp computes")


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Return by what llama.cpp divides each frequency of a llama3 embedding, float32 (head_dim / 2); or None."""
    rope = _rope_of(config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    head = count_in(config, "head_dim", count_in(config, "hidden_size") // count_in(config, "num_attention_heads"))
    if head > MAX_HEAD:  # before a number for each pair of them is made
        raise ValueError(f"head_dim={head} is longer than any head: {MAX_HEAD} is the most; repair config.json")
    base, factor = number_in(rope, "rope_theta", 10000.0), number_in(rope, "factor")
    low, high = number_in(rope, "low_freq_factor"), number_in(rope, "high_freq_factor")
    context = count_in(rope, "original_max_position_embeddings")
    if not low < high:
        raise ValueError(f"low_freq_factor={low} must be less than high_freq_factor={high}; repair config.json")
    waves = 2 * math.pi * base ** (torch.arange(0, head, 2, dtype=torch.float64, device="cpu") / head)
    smooth = (context / waves - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(waves < context / high, 1.0, torch.where(waves > context / low, factor, factors))
    return factors.float()


@dataclass(frozen=True)
class Existing:
    """An open file, whose ``fields`` another file of the same model takes over as they lie in it."""

    path: Path
    file: BufferedReader
    header: GGUFHeader
    fields: dict[str, bytes]

    @property
    def architecture(self) -> str:
        """Its ``general.architecture``."""
        return str(self.header.metadata.get("general.architecture"))

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise a FileError unless it is of the model that a config describes."""
        arch = architecture_of(config)
        if self.architecture != arch:
            why = f"it is a {show(self.architecture)}, and config.json describes a {show(arch)}"
            raise refusal(self.path, f"{why}; name a file of the same model", "copy from")
        if arch not in _DESCRIBED:
            return
        for key, value in model_fields(config).items():
            found = self.header.metadata.get(key)
            if key.removeprefix(f"{arch}.") in _FREE or found is None:
                continue
            same = found == value
            if isinstance(value, float):
                same = isinstance(found, int | float) and math.isclose(found, value, rel_tol=1e-6)
            if not same:
                why = f"{key}={show(found)} in it, and config.json says {show(value)}"
                raise refusal(self.path, f"{why}; name a file of the same model", "copy from")

    def check_tokens(self, rows: int) -> None:
        """Raise a FileError unless its tokenizer, if it has one, is that of an embedding of so many rows."""
        for key in self.fields:
            name = key.removeprefix(_TOKENIZER) if key.startswith(_TOKENIZER) else key
            value, (kind, count) = self.header.metadata[key], self._type(key)
            fits, what = True, ""
            if name in _OF_TOKENS:
                fits, what = kind in _OF_TOKENS[name] and count == rows, f"an array for {rows} tokens"
            elif name == "merges":
                fits, what = kind == _TEXT and count is not None, "an array of texts"
            elif name in _TEXTS:
                fits, what = (kind, count) == (_TEXT, None), "a text"
            elif key != name and name.endswith("_token_id"):
                fits, what = type(value) is int and 0 <= value < rows, f"one of {rows} tokens"
            elif key != name and name.startswith("add_"):
                fits, what = (kind, count) == (_FLAG, None), "true or false"
            if not fits:
                shown = f"{count} values of GGUF's type {kind}" if value is None else show(value)
                raise refusal(self.path, f"{key}={shown} must be {what}; name another file", "copy from")
        model = self.header.metadata.get(f"{_TOKENIZER}model", "no_vocab")
        if model != "no_vocab" and f"{_TOKENIZER}tokens" not in self.fields:
            why = f"{_TOKENIZER}model={show(model)}, and it has no {_TOKENIZER}tokens; name another file"
            raise refusal(self.path, why, "copy from")

    def _type(self, key: str) -> tuple[int, int | None]:
        """Return the type of a field's value, and None; of an array the type and the number of its values."""
        content, at = self.fields[key], 8 + len(key.encode())  # behind the length and the text of the key
        kind = int.from_bytes(content[at : at + 4], "little")
        return struct.unpack_from("<IQ", content, at + 4) if kind == _ARRAY else (kind, None)


def _check_numbers(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise a FileError unless the numbers of an existing file are some that a model has."""
    arch = f"{metadata.get('general.architecture')}."
    own = {key.removeprefix(arch): value for key, value in metadata.items() if key.startswith(arch)}
    with refusing(path, "copy from"):
        for name in own:
            if name in _COUNTS:
                count_in(metadata, arch + name, remedy="; name another file")
            elif name in _NUMBERS:
                number_in(metadata, arch + name, remedy="; name another file")
    head = own.get("attention.key_length", own.get("embedding_length", 0) // own.get("attention.head_count", 1))
    rotated = own.get("rope.dimension_count", 0)
    if rotated > head or rotated % 2:
        why = f"{arch}rope.dimension_count={rotated} must be even, and at most {head}, the columns of a head"
        raise refusal(path, f"{why}; name another file", "copy from")


def read_existing(path: Path, file: BufferedReader) -> Existing:
    """Read the metadata of an open file; a FileError if it is damaged, or no model."""
    header = read_header(path, file)
    metadata = header.metadata
    if metadata.get("general.type", "model") != "model":
        raise refusal(path, f"general.type={show(metadata['general.type'])} is no model; name the model's file")
    _check_numbers(path, metadata)
    fields = {}
    for key, place in header.places.items():
        if key in _NOT_COPIED or key.startswith(_NOT_COPIED_PARTS):
            continue
        content = bytearray(place.stop - place.start)
        read_into(path, file, place.start, memoryview(content))
        fields[key] = bytes(content)
    return Existing(path, file, header, fields)
