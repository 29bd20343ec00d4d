"""Serializes forms of weights and adapters to a file's metadata, and parses them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lowmem.errors import short_repr
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter
from lowmem.nn.forms import CodedForm, Form, HalfForm
from lowmem.nn.techniques import EightBit, FourBit, Half, LoRA, blockwise_technique
from lowmem.quant.formats import EIGHT_BIT, FORMATS, IMPORTED
from lowmem.quant.scale_encodings import ENCODINGS, OFFSETS
from lowmem.quant.tensor import METHODS

FLAGS = ("transposed", "gathered")
"""What a record says of a 4-bit weight where it holds, and else not: older readers refuse the keys."""

CONFIG_VERSION = 2
"""Of a folder: of its ``quantization_config`` and the names of its tensors. It is raised with each change of them."""

_CONFIG = {"quant_method", "notice", "version", "technique", "skip", "train_dense", "layers", "adapters"}

_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_ADAPTER = ("rank", "alpha", "dropout")
_COMPUTED = {**_STORED, "float32": torch.float32, "float64": torch.float64, "int8": torch.int8}


def technique_that_stores_form(form: Form) -> Half | EightBit | FourBit:
    """Return the technique that stores a weight in a form.

    Raises:
        ValueError: no technique has such a form.
    """
    if isinstance(form, HalfForm):
        return Half(form.dtype)
    return blockwise_technique(form.format, form.block_size, form.scale_encoding, form.compute_dtype)


def form_to_record_dict(form: Form) -> dict[str, Any]:
    """Return the metadata record of a weight that is stored in a form."""
    kind = type(technique_that_stores_form(form)).__name__
    if isinstance(form, HalfForm):
        return {"technique": kind, "dtype": str(form)}
    compute = {} if form.compute_dtype is None else {"compute_dtype": str(form.compute_dtype).removeprefix("torch.")}
    return {
        "technique": kind,
        "format": form.format,
        "block_size": form.block_size,
        "scales": form.scale_encoding,
        "method": form.method,
        **compute,
        **dict.fromkeys(form.enabled_flag_names, True),
    }


def parameter_record_key(parameter_name: str) -> str:
    """Return where the record of a parameter is: at the path of the layer whose ``weight`` it is, or at its name."""
    return (
        parameter_name.removesuffix("weight").rstrip(".")
        if parameter_name.rpartition(".")[2] == "weight"
        else parameter_name
    )


def parse_form_record(record: object) -> Form:
    """Parse a record of ``form_to_record_dict``.

    Raises:
        ValueError: an invalid record; the message is short, whatever the record holds.
    """
    kind = checked_json_object(record).get("technique")
    if kind == "Half":
        fields = checked_json_object_with_keys(record, ("technique", "dtype"))
        return HalfForm(_STORED[_checked_choice(fields, "dtype", _STORED)])
    if kind not in ("FourBit", "EightBit"):
        raise ValueError(f"technique={short_repr(kind)} is unknown")
    required = ("technique", "format", "block_size", "scales", "method")
    fields = checked_json_object_with_keys(record, required, ("compute_dtype", *FLAGS))
    for name, known in (
        ("format", EIGHT_BIT if kind == "EightBit" else {**FORMATS, **IMPORTED}),
        ("scales", {**ENCODINGS, **OFFSETS}),
        ("method", METHODS),
    ):
        _checked_choice(fields, name, known)
    _check_exact_type(fields, "block_size", int, "an integer")
    for name in FLAGS:
        _check_true_or_absent(fields, name)
    compute = _COMPUTED[_checked_choice(fields, "compute_dtype", _COMPUTED)] if "compute_dtype" in fields else None
    flags = ("transposed" in fields, "gathered" in fields)
    form = CodedForm(fields["format"], fields["block_size"], fields["scales"], fields["method"], *flags, compute)
    # Checks the values
    technique_that_stores_form(form)
    return form


def adapter_to_record_dict(adapter: Adapter) -> dict[str, Any]:
    """Return the metadata record of an adapter in one layer."""
    technique = adapter.technique
    record: dict[str, Any] = {"rank": technique.rank, "alpha": technique.alpha, "dropout": technique.dropout}
    return {**record, "rank_stabilized": True} if technique.rank_stabilized else record


def parse_lora_record(record: object) -> LoRA:
    """Parse a record of ``adapter_to_record_dict``.

    Raises:
        ValueError: an invalid record; the message is short, whatever the record holds.
    """
    fields = checked_json_object_with_keys(record, _ADAPTER, ("rank_stabilized",))
    _check_true_or_absent(fields, "rank_stabilized")
    return LoRA(**fields)


def adapter_record_dicts_by_parameter(layer: AdaptedModule) -> dict[str, list[dict[str, Any]]]:
    """Return the metadata records of all adapters of a layer, by the parameters that they change."""
    bank, records = layer.adapters, dict[str, list[dict[str, Any]]]()
    for name in bank.names:
        for parameter, part in bank.adapters_by_parameter(name).items():
            record = {**adapter_to_record_dict(part), "name": name, "active": name in bank.active_or_merged_names}
            records.setdefault(parameter, []).append(record)
    return records


def parse_loras_and_active_flags_by_name(records: object) -> dict[str, tuple[LoRA, bool]]:
    """Parse the records of ``adapter_record_dicts_by_parameter``: by name, a technique and whether it is active.

    Raises:
        ValueError: an invalid record; the message is short, whatever the record holds.
    """
    if not isinstance(records, list) or not records:
        raise ValueError(f"they are {short_repr(records)}, and must be a list of at least one")
    adapters: dict[str, tuple[LoRA, bool]] = {}
    for part in records:
        fields = dict(checked_json_object_with_keys(part, (*_ADAPTER, "name", "active"), ("rank_stabilized",)))
        _check_exact_type(fields, "name", str, "a string")
        _check_exact_type(fields, "active", bool, "true or false")
        if fields["name"] in adapters:
            raise ValueError(f"adapter {short_repr(fields['name'])} is there twice")
        name, active = fields.pop("name"), fields.pop("active")
        adapters[name] = parse_lora_record(fields), active
    return adapters


def check_lowmem_quantization_config(config: Mapping[str, Any]) -> None:
    """Raise unless this version of lowmem reads the fields of a folder's ``quantization_config``.

    Raises:
        TypeError: ``skip`` that is no patterns, or ``train_dense`` that is neither true nor false.
        ValueError: another version, an unknown field, or ``layers`` and ``adapters`` that are no records.
    """
    version = config.get("version", CONFIG_VERSION)
    if type(version) is not int or version != CONFIG_VERSION:
        older = type(version) is int and version < CONFIG_VERSION
        remedy = "make the folder again with this one" if older else "upgrade lowmem"
        raise ValueError(
            f"quantization_config has version={short_repr(version)}, and this lowmem reads {CONFIG_VERSION}: {remedy}"
        )
    unknown = sorted(config.keys() - _CONFIG)
    if unknown:
        raise ValueError(
            f"quantization_config has {short_repr(unknown[0])}, which this lowmem does not know: upgrade it"
        )
    skip, layers, adapters = config.get("skip", []), config.get("layers", []), config.get("adapters")
    if not isinstance(skip, str) and not (isinstance(skip, list) and all(isinstance(item, str) for item in skip)):
        raise TypeError(f"skip={short_repr(skip)} must be glob patterns of paths, as ['lm_head', '*.o_proj']")
    if not (isinstance(layers, list) and all(isinstance(item, Mapping) for item in layers)):
        raise ValueError(f"layers={short_repr(layers)} must be a list of objects")
    if not isinstance(adapters or {}, Mapping):
        raise ValueError(f"adapters={short_repr(adapters)} must be an object")
    if not isinstance(config.get("train_dense", False), bool):
        raise TypeError(f"train_dense={short_repr(config['train_dense'])} must be True or False")


def checked_json_object_with_keys(
    value: object, required_keys: Collection[str], optional_keys: Collection[str] = ()
) -> dict[str, Any]:
    """Return ``value`` if it is an object with all required and no unknown keys.

    Raises:
        ValueError: it is not.
    """
    fields = checked_json_object(value)
    for name in required_keys:
        if name not in fields:
            raise ValueError(f"it has no {name!r}")
    for name in fields:
        if name not in required_keys and name not in optional_keys:
            raise ValueError(f"{short_repr(name)} is unknown")
    return fields


def checked_json_object(value: object) -> dict[str, Any]:
    """Return ``value`` if it is an object.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it is {short_repr(value)}, and must be an object")
    return value


@contextmanager
def value_errors_with_part(part: str) -> Iterator[None]:
    """Turn a ValueError of the block into one that names the part ``part`` of the file, and the remedy."""
    try:
        yield
    except ValueError as reason:
        remedy = "upgrade lowmem, or get the file again from who wrote it"
        raise ValueError(f"{part} is not lowmem's: {reason}; {remedy}") from reason


def _check_exact_type(fields: dict[str, Any], key: str, expected_type: type, expected_text: str) -> None:
    # Not isinstance: True is an int
    if type(fields[key]) is not expected_type:
        raise ValueError(f"{key}={short_repr(fields[key])} must be {expected_text}")


def _check_true_or_absent(fields: dict[str, Any], key: str) -> None:
    # Absent where it does not hold, so that bytes are unique
    if fields.get(key, True) is not True:
        raise ValueError(f"{key}={short_repr(fields[key])} must be true, or absent")


def _checked_choice(fields: dict[str, Any], key: str, choices: Collection[str]) -> str:
    value = fields[key]
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key}={short_repr(value)} is none of {', '.join(choices)}")
    return value
