"""The names that a model has in GGUF and in Hugging Face's transformers, and the rows that llama.cpp reorders.

For rotary embeddings llama.cpp takes the two halves of each head interleaved, transformers one behind the other. Its
converter reorders the rows of the query and key projections of the llama family; here they are put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import short_repr


@dataclass(frozen=True)
class ArchitecturePartNames:
    """An architecture of GGUF: the names in transformers of a layer's parts, whether q and k are reordered, and what
    the weights of norms are more there."""

    parts: Mapping[str, str]
    has_reordered_rows: bool = False
    norm_shift: float = 0.0


_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

FAMILIES: dict[str, ArchitecturePartNames] = {
    "llama": ArchitecturePartNames(_LLAMA, has_reordered_rows=True),
    "smollm3": ArchitecturePartNames(_LLAMA, has_reordered_rows=True),
    "qwen2": ArchitecturePartNames(_LLAMA),
    "qwen3": ArchitecturePartNames({**_LLAMA, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}),
    "gemma3": ArchitecturePartNames(
        {
            **_LLAMA,
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_shift=1.0,
    ),
    "phi3": ArchitecturePartNames(
        {
            **{part: name for part, name in _LLAMA.items() if part not in ("attn_q", "attn_k", "attn_v", "ffn_gate")},
            "attn_qkv": "self_attn.qkv_proj",
            "ffn_up": "mlp.gate_up_proj",
        }
    ),
}
"""By ``general.architecture``. To add one, add an entry; does its converter change values or reorder rows?"""

_COMPUTED = re.compile(r"rope_freqs\.weight|(blk\.\d+\.)?(rope_freqs|rope_factors_(long|short))\.weight")
_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<part>\w+)\.(?P<kind>weight|bias)", re.ASCII)
_LAYER = re.compile(r"model\.layers\.(?P<layer>\d{1,6})\.(?P<part>.+)", re.ASCII)


@dataclass(frozen=True)
class GGUFTransformersNameMap:
    """The names of one model; methods raise a ValueError for names, or rows, that its architecture does not have."""

    architecture: str
    family: ArchitecturePartNames
    heads: dict[str, int]
    """The heads of ``attn_q`` and ``attn_k``, if their rows are reordered."""

    def transformers_name_or_none(self, gguf_name: str) -> str | None:
        """Return the name in transformers, or None for a tensor that the model computes itself."""
        if _COMPUTED.fullmatch(gguf_name):
            return None
        match = _NAME.fullmatch(gguf_name)
        if match is not None:
            layer, part, kind = match["layer"], match["part"], match["kind"]
            known = _ENDS.get(part) if layer is None else self.family.parts.get(part)
            if known is not None:
                return f"{known}.{kind}" if layer is None else f"model.layers.{int(layer)}.{known}.{kind}"
        raise ValueError(
            f"tensor {short_repr(gguf_name)} has no known place in a model of {short_repr(self.architecture)}; take "
            "the model's "
            "safetensors files"
        )

    def gguf_name(self, transformers_name: str) -> str:
        """Return the name in GGUF of a weight of the model: what ``transformers_name_or_none`` turns back."""
        path, _, kind = transformers_name.rpartition(".")
        layer = _LAYER.fullmatch(path)
        parts = _ENDS if layer is None else self.family.parts
        wanted = path if layer is None else layer["part"]
        for part, known in parts.items():
            if known == wanted and kind in ("weight", "bias"):
                return f"{part}.{kind}" if layer is None else f"blk.{int(layer['layer'])}.{part}.{kind}"
        raise ValueError(
            f"weight {short_repr(transformers_name)} has no known place in a GGUF file of "
            f"{short_repr(self.architecture)}"
        )

    def value_shift(self, gguf_name: str) -> float:
        """Return what the values of a tensor in the file are more than those of the model."""
        return self.family.norm_shift if gguf_name.endswith("norm.weight") else 0.0

    def file_rows_in_model_order_or_none(self, gguf_name: str, row_count: int) -> Tensor | None:
        """Return the file's row for each row of the model, or None where they are the same."""
        match = _NAME.fullmatch(gguf_name)
        heads = None if match is None else self.heads.get(match["part"])
        if heads is None:
            return None
        if row_count % (2 * heads):
            raise ValueError(
                f"tensor {short_repr(gguf_name)} has {row_count} rows, which do not divide into {heads} heads; get "
                "it again"
            )
        numbers = torch.arange(row_count, dtype=torch.int64, device="cpu").view(heads, row_count // heads // 2, 2)
        return numbers.transpose(1, 2).flatten()


def tensor_name_map_from_metadata(metadata: Mapping[str, Any]) -> GGUFTransformersNameMap:
    """Return the names of a model; a ValueError if they are unknown, or the metadata are not those of a whole one."""
    architecture = metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if metadata.get("general.type", "model") != "model":
        raise ValueError(f"general.type={short_repr(metadata['general.type'])} is no model; name the model's file")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            f"it is one of {short_repr(metadata['split.count'])} parts; join them with llama-gguf-split --merge"
        )
    if family is None or not isinstance(architecture, str):
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"general.architecture={short_repr(architecture)} has names that lowmem does not know: it knows {known}; "
            "take "
            "the model's safetensors files"
        )
    heads: dict[str, int] = {}
    if family.has_reordered_rows:
        for part, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
            # As many as those of q
            default = heads.get("attn_q")
            count = metadata.get(f"{architecture}.attention.{key}", default)
            if type(count) is not int or count < 1:
                raise ValueError(f"{architecture}.attention.{key}={short_repr(count)} must be a number; get it again")
            heads[part] = count
    return GGUFTransformersNameMap(architecture, family, heads)
