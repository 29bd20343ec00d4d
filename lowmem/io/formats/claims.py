"""Checks what a config.json says of the quantization against the tensors.

A folder that contradicts itself is refused. What a config leaves out, or says of what lowmem does not know, is no
contradiction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lowmem.errors import show
from lowmem.io.formats.compressed_tensors.reading import FP8, INT8

__all__ = ["METHODS", "check_claims"]

METHODS = {
    "bitsandbytes": "bitsandbytes",
    "gpt-oss": "mxfp4",
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed-tensors",
}
"""Format of the tensors -> the ``quant_method`` of its config."""


def check_claims(kinds: Mapping[str, Collection[str]], config: Mapping[str, Any]) -> None:
    """Raise unless a ``quantization_config`` can be that of tensors.

    Args:
        kinds: the formats of the tensors, each with the kinds of its weights.
        config: what config.json says, or nothing.

    Raises:
        ValueError: it names another known format, or settings that its tensors do not have.
    """
    method = config.get("quant_method")
    for kind, weights in kinds.items():
        if method in METHODS.values() and method != METHODS[kind]:
            raise _contradiction("quant_method", method, f"its tensors are those of {kind}")
        for name, allowed in _ALLOWED[kind].items():
            if name in config and not allowed(config[name]):
                raise _contradiction(name, config[name], f"lowmem reads no such {kind}, or its tensors differ")
        if kind == "compressed-tensors":
            _check_compressed(config, weights)


def _contradiction(name: str, value: object, why: str) -> ValueError:
    return ValueError(f"its config.json says {name}={show(value)}, and {why}; get both again from one source")


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda value: any(value is known or (value == known and type(value) is type(known)) for known in values)


_ALLOWED: dict[str, dict[str, Callable[[object], bool]]] = {
    "bitsandbytes": {"load_in_4bit": _one_of(True), "load_in_8bit": _one_of(False, None)},
    "gpt-oss": {},
    "gptq": {"checkpoint_format": _one_of("gptq", "gptq_v2", None)},
    "awq": {
        "bits": _one_of(4),
        "version": lambda value: isinstance(value, str) and value.lower() == "gemm",
    },
    "compressed-tensors": {
        "format": _one_of(
            "pack-quantized", "int-quantized", "float-quantized", "mxfp4-pack-quantized", "mixed-precision", None
        ),
    },
}


_PACKED = {
    "pack-quantized": ("compressed-tensors", INT8),
    "int-quantized": (INT8,),
    "float-quantized": (FP8,),
    "mxfp4-pack-quantized": ("MXFP4",),
}
_SCHEMES = {INT8: (8, "int"), FP8: (8, "float"), "MXFP4": (4, "float"), "NVFP4": (4, "float")}
"""Bits and type of a weight by its kind; others are of 4 bits and "int"."""


def _check_compressed(config: Mapping[str, Any], weights: Collection[str]) -> None:
    """Raise unless the format and one of the groups of a config can be those of the weights."""
    own, groups = config.get("format"), config.get("config_groups")
    if own in _PACKED and (others := set(weights).difference(_PACKED[own])):
        raise _contradiction("format", own, f"its tensors are in {min(others)}")
    if not isinstance(groups, dict) or not groups:
        return
    found = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    schemes = [weights for weights in found if isinstance(weights, dict)]
    for bits, kind in sorted({_SCHEMES.get(weight, (4, "int")) for weight in weights}):
        alike = [weights for weights in schemes if weights.get("num_bits", 4) == bits]
        if schemes and not alike:
            raise _contradiction("num_bits", schemes[0].get("num_bits", 4), f"its tensors have {bits}")
        if alike and not any(weights.get("type", kind) == kind for weights in alike):
            raise _contradiction("type", alike[0]["type"], f"its tensors are of type {kind} and have {bits} bits")
