"""What a config.json says of compressed-tensors: read and checked against the tensors, and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lowmem.errors import short_repr
from lowmem.io.formats.foreign_format import config_contradiction_error, exact_match_predicate

INT8, FP8 = "compressed-tensors int8", "FP8"
_KINDS = {
    "pack-quantized": ("compressed-tensors", INT8),
    "int-quantized": (INT8,),
    "float-quantized": (FP8,),
    "mxfp4-pack-quantized": ("MXFP4",),
}
_SCHEMES = {INT8: (8, "int"), FP8: (8, "float"), "MXFP4": (4, "float"), "NVFP4": (4, "float")}
"""Bits and type of a weight by its kind; others are of 4 bits and "int"."""

SETTINGS = {"format": exact_match_predicate(*_KINDS, "mixed-precision", None)}


def check_some_scheme_fits_layer(
    config: Mapping[str, Any],
    layer_path: str,
    group_size: int,
    shape: tuple[int, ...],
    has_zero_points: bool,
    has_single_scale: bool = False,
) -> None:
    """Raise a ValueError unless a scheme of a config can be that of a layer whose groups have ``group_size``
    columns."""
    schemes = _weight_schemes(config)
    wrong = [_contradicting_field_or_none(weights, group_size, shape, has_single_scale) for weights in schemes]
    if wrong and wrong[0] is not None and None not in wrong:
        raise ValueError(
            f"its config.json says {wrong[0]}={short_repr(schemes[0][wrong[0]])}, and {short_repr(layer_path)} has "
            f"groups of {group_size} "
            f"of its {shape[-1]} columns; get both again from one source"
        )
    if schemes and not has_zero_points and all(weights.get("symmetric") is False for weights in schemes):
        raise ValueError(
            f"its config.json says that {short_repr(layer_path)} has zero points, and it has none; get it again"
        )


def _weight_schemes(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the groups of a config say of weights."""
    groups = config.get("config_groups")
    group_configs = groups.values() if isinstance(groups, dict) else ()
    return [
        group_config["weights"]
        for group_config in group_configs
        if isinstance(group_config, dict) and isinstance(group_config.get("weights"), dict)
    ]


def _contradicting_field_or_none(
    weight_scheme: Mapping[str, Any], group_size: int, shape: tuple[int, ...], has_single_scale: bool
) -> str | None:
    """Return a field of a scheme with which no layer of this shape can be, as an error names it; or None."""
    size, strategy, columns = weight_scheme.get("group_size"), weight_scheme.get("strategy"), shape[-1]
    if size is not None and (type(size) is not int or (columns if size == -1 else min(size, columns)) != group_size):
        return "group_size"
    fits = {
        "channel": group_size == columns and (not has_single_scale or shape[0] == 1),
        "group": not has_single_scale,
    }
    fits |= {"tensor": has_single_scale or (shape[0] == 1 and group_size == columns), "block": False, "token": False}
    if strategy is not None and not (isinstance(strategy, str) and fits.get(strategy, True)):
        return "strategy"
    return None if isinstance(weight_scheme.get("actorder"), str | bool | None) else "actorder"


def check_format_and_schemes(config: Mapping[str, Any], weight_kinds: Collection[str]) -> None:
    """Raise unless the format and one of the groups of a config can be those of the weights."""
    config_format, schemes = config.get("format"), _weight_schemes(config)
    if config_format in _KINDS and (others := set(weight_kinds).difference(_KINDS[config_format])):
        raise config_contradiction_error("format", config_format, f"its tensors are in {min(others)}")
    for bits, kind in sorted({_SCHEMES.get(weight, (4, "int")) for weight in weight_kinds}):
        alike = [weights for weights in schemes if weights.get("num_bits", 4) == bits]
        if schemes and not alike:
            raise config_contradiction_error("num_bits", schemes[0].get("num_bits", 4), f"its tensors have {bits}")
        if alike and not any(weights.get("type", kind) == kind for weights in alike):
            raise config_contradiction_error(
                "type", alike[0]["type"], f"its tensors are of type {kind} and have {bits} bits"
            )


def build_quantization_config(
    scheme_by_path: Mapping[str, Any], dense_paths: Collection[str], model_dtype: torch.dtype
) -> dict[str, Any]:
    """Return the ``quantization_config`` of packed layers: by path the format, group and symmetry."""
    names: dict[Any, list[str]] = {}
    for path, scheme in scheme_by_path.items():
        names.setdefault(scheme, []).append(path)
    formats = {format for format, _, _ in names}
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(names) == 1 else names[format, size, symmetric],
            "weights": _build_4bit_weight_scheme(format, size, symmetric),
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
        "ignore": list(dense_paths),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _build_4bit_weight_scheme(format: str, group_size: int, symmetric: bool) -> dict[str, Any]:
    floats = format == "mxfp4-pack-quantized"
    return {
        "num_bits": 4,
        "type": "float" if floats else "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        **({"scale_dtype": "torch.uint8"} if floats else {}),
    }
