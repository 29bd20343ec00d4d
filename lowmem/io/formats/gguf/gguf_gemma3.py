"""What GGUF says of a Gemma 3 beside what it says of a llama: windows, where they are, and a rotary base for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.errors import short_repr
from lowmem.io.formats.gguf.gguf_config_checks import (
    checked_object,
    checked_positive_integer,
    checked_positive_number,
)
from lowmem.io.formats.gguf.gguf_file import GGUFValue

_GEMMA3_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
}
"""What a config means that does not say it."""

GEMMA3_PERIOD = 6
"""Layers from one with full attention to the next, where neither a config nor a file says another number."""


def gemma3_config_as_llama_and_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, GGUFValue]]:
    """Return the config of a Gemma 3 as a llama says the same, and the fields that a llama does not have.

    Raises:
        ValueError: a value that llama.cpp does not compute.
    """
    given = {**_GEMMA3_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    ropes = checked_object(given, "rope_parameters")
    full = {"rope_theta": given.get("rope_theta", 1e6), **checked_object(ropes, "full_attention")}
    full |= checked_object(given, "rope_scaling")
    local = {"rope_theta": given.get("rope_local_base_freq", 1e4), **checked_object(ropes, "sliding_attention")}
    sizes = "num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"
    layers, hidden, heads, head = (checked_positive_integer(given, name) for name in sizes)
    computed = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": gemma3_attention_scalar(layers, hidden, heads, head),
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"), False),
    }
    for name, value in computed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}={short_repr(given[name])}: llama.cpp computes {short_repr(value)} in a gemma3")
    for rope, kinds in ((full, ("default", "linear")), (local, ("default",))):
        if (kind := rope.get("rope_type", rope.get("type", "default"))) not in kinds:
            raise ValueError(f"rope_type={short_repr(kind)}: llama.cpp computes {' or '.join(kinds)} in a gemma3")
    as_llama = {name: value for name, value in given.items() if name != "sliding_window"}
    return as_llama | {"rope_parameters": full}, {
        "attention.sliding_window": checked_positive_integer(given, "sliding_window", 4096),
        "attention.sliding_window_pattern": _gemma3_period(given, layers),
        "rope.freq_base_swa": checked_positive_number(local, "rope_theta"),
    }


def gemma3_attention_scalar(layers: int, hidden: int, heads: int, head: int) -> int:
    """Return by whose root llama.cpp divides attention scores: it knows the model of 27B by its 62 layers."""
    return hidden // heads if layers == 62 else head


def gemma3_layer_types(layers: int, period: int) -> list[str]:
    """Return the kinds of attention of each layer, as ``layer_types`` of a config says them."""
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]


def _gemma3_period(config: Mapping[str, Any], layers: int) -> int:
    """Return the layers from one with full attention to the next; a ValueError where they differ."""
    types = config.get("layer_types")
    if types is None:
        return checked_positive_integer(config, "sliding_window_pattern", GEMMA3_PERIOD)
    is_list = isinstance(types, list) and len(types) == layers
    period = types.index("full_attention") + 1 if is_list and "full_attention" in types else layers + 1
    if not is_list or types != gemma3_layer_types(layers, period):
        raise ValueError(f"layer_types={short_repr(types)}: llama.cpp computes full attention in every n-th layer")
    return period
