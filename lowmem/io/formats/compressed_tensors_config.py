"""What a config.json says of compressed-tensors: read and checked against the tensors, and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lowmem.errors import show
from lowmem.io.formats.foreign import contradiction, one_of

INT8, FP8 = "compressed-tensors int8", "FP8"
_KINDS = {
    "pack-quantized": ("compressed-tensors", INT8),
    "int-quantized": (INT8,),
    "float-quantized": (FP8,),
    "mxfp4-pack-quantized": ("MXFP4",),
}
_SCHEMES = {INT8: (8, "int"), FP8: (8, "float"), "MXFP4": (4, "float"), "NVFP4": (4, "float")}
"""Bits and type of a weight by its kind; others are of 4 bits and "int"."""

SETTINGS = {"format": one_of(*_KINDS, "mixed-precision", None)}


def check_scheme(
    config: Mapping[str, Any], layer: str, group: int, shape: tuple[int, ...], has_zeros: bool, is_whole: bool = False
) -> None:
    """Raise a ValueError unless a scheme of a config can be that of a layer whose groups have ``group`` columns."""
    schemes = _schemes(config)
    wrong = [_wrong_field(weights, group, shape, is_whole) for weights in schemes]
    if wrong and wrong[0] is not None and None not in wrong:
        raise ValueError(
            f"its config.json says {wrong[0]}={show(schemes[0][wrong[0]])}, and {show(layer)} has groups of {group} "
            f"of its {shape[-1]} columns; get both again from one source"
        )
    if schemes and not has_zeros and all(weights.get("symmetric") is False for weights in schemes):
        raise ValueError(f"its config.json says that {show(layer)} has zero points, and it has none; get it again")


def _schemes(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the groups of a config say of weights."""
    groups = config.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    return [one["weights"] for one in found if isinstance(one, dict) and isinstance(one.get("weights"), dict)]


def _wrong_field(weights: Mapping[str, Any], group: int, shape: tuple[int, ...], is_whole: bool) -> str | None:
    """Return the field of a scheme that cannot be that of a layer, as ``check_scheme`` has it; or None."""
    size, strategy, columns = weights.get("group_size"), weights.get("strategy"), shape[-1]
    if size is not None and (type(size) is not int or (columns if size == -1 else min(size, columns)) != group):
        return "group_size"
    fits = {"channel": group == columns and (not is_whole or shape[0] == 1), "group": not is_whole}
    fits |= {"tensor": is_whole or (shape[0] == 1 and group == columns), "block": False, "token": False}
    if strategy is not None and not (isinstance(strategy, str) and fits.get(strategy, True)):
        return "strategy"
    return None if isinstance(weights.get("actorder"), str | bool | None) else "actorder"


def check_config(config: Mapping[str, Any], weights: Collection[str]) -> None:
    """Raise unless the format and one of the groups of a config can be those of the weights."""
    own, schemes = config.get("format"), _schemes(config)
    if own in _KINDS and (others := set(weights).difference(_KINDS[own])):
        raise contradiction("format", own, f"its tensors are in {min(others)}")
    for bits, kind in sorted({_SCHEMES.get(weight, (4, "int")) for weight in weights}):
        alike = [weights for weights in schemes if weights.get("num_bits", 4) == bits]
        if schemes and not alike:
            raise contradiction("num_bits", schemes[0].get("num_bits", 4), f"its tensors have {bits}")
        if alike and not any(weights.get("type", kind) == kind for weights in alike):
            raise contradiction("type", alike[0]["type"], f"its tensors are of type {kind} and have {bits} bits")


def written_config(schemes: Mapping[str, Any], dense: Collection[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``quantization_config`` of packed layers: by path the format, group and symmetry."""
    names: dict[Any, list[str]] = {}
    for path, scheme in schemes.items():
        names.setdefault(scheme, []).append(path)
    formats = {format for format, _, _ in names}
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(names) == 1 else names[format, size, symmetric],
            "weights": _weights(format, size, symmetric),
            "input_activations": None,
            "output_activations": None,
            "format": format,
        }
        for number, (format, size, symmetric) in enumerate(sorted(names))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(format: str, size: int, symmetric: bool) -> dict[str, Any]:
    floats = format == "mxfp4-pack-quantized"
    return {
        "num_bits": 4,
        "type": "float" if floats else "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
        **({"scale_dtype": "torch.uint8"} if floats else {}),
    }
