"""Serializes forms of weights and adapters to a file's metadata, and parses them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lowmem.errors import show
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter
from lowmem.nn.forms import CodedForm, Form, HalfForm
from lowmem.nn.techniques import EightBit, FourBit, Half, LoRA, blockwise
from lowmem.quant.formats import EIGHT_BIT, FORMATS, IMPORTED
from lowmem.quant.scales import ENCODINGS, OFFSETS
from lowmem.quant.tensor import METHODS

FLAGS = ("transposed", "gathered")
"""What a record says of a 4-bit weight where it holds, and else not: older readers refuse the keys."""

CONFIG_VERSION = 2
"""Of a folder: of its ``quantization_config`` and the names of its tensors. It is raised with each change of them."""

_CONFIG = {"quant_method", "notice", "version", "technique", "skip", "train_dense", "layers", "adapters"}

_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_ADAPTER = ("rank", "alpha", "dropout")
_COMPUTED = {**_STORED, "float32": torch.float32, "float64": torch.float64, "int8": torch.int8}


def technique_of(form: Form) -> Half | EightBit | FourBit:
    """Return the technique that stores a weight in a form.

    Raises:
        ValueError: no technique has such a form.
    """
    if isinstance(form, HalfForm):
        return Half(form.dtype)
    return blockwise(form.format, form.block_size, form.scale_encoding, form.compute_dtype)


def form_record(form: Form) -> dict[str, Any]:
    """Return the metadata record of a weight that is stored in a form."""
    kind = type(technique_of(form)).__name__
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
        **dict.fromkeys(form.flags, True),
    }


def layer_of(name: str) -> str:
    """Return where the record of a parameter is: at the path of the layer whose ``weight`` it is, or at its name."""
    return name.removesuffix("weight").rstrip(".") if name.rpartition(".")[2] == "weight" else name


def form_of(record: object) -> Form:
    """Parse a record of ``form_record``.

    Raises:
        ValueError: an invalid record; the message is short, whatever the record holds.
    """
    kind = check_object(record).get("technique")
    if kind == "Half":
        fields = check_keys(record, ("technique", "dtype"))
        return HalfForm(_STORED[_choice(fields, "dtype", _STORED)])
    if kind not in ("FourBit", "EightBit"):
        raise ValueError(f"technique={show(kind)} is unknown")
    required = ("technique", "format", "block_size", "scales", "method")
    fields = check_keys(record, required, ("compute_dtype", *FLAGS))
    for name, known in (
        ("format", EIGHT_BIT if kind == "EightBit" else {**FORMATS, **IMPORTED}),
        ("scales", {**ENCODINGS, **OFFSETS}),
        ("method", METHODS),
    ):
        _choice(fields, name, known)
    _check_type(fields, "block_size", int, "an integer")
    for name in FLAGS:
        _check_flag(fields, name)
    compute = _COMPUTED[_choice(fields, "compute_dtype", _COMPUTED)] if "compute_dtype" in fields else None
    flags = ("transposed" in fields, "gathered" in fields)
    form = CodedForm(fields["format"], fields["block_size"], fields["scales"], fields["method"], *flags, compute)
    technique_of(form)  # checks the values
    return form


def adapter_record(adapter: Adapter) -> dict[str, Any]:
    """Return the metadata record of an adapter in one layer."""
    technique = adapter.technique
    record: dict[str, Any] = {"rank": technique.rank, "alpha": technique.alpha, "dropout": technique.dropout}
    return {**record, "rank_stabilized": True} if technique.rank_stabilized else record


def lora_of(record: object) -> LoRA:
    """Parse a record of ``adapter_record``.

    Raises:
        ValueError: an invalid record; the message is short, whatever the record holds.
    """
    fields = check_keys(record, _ADAPTER, ("rank_stabilized",))
    _check_flag(fields, "rank_stabilized")
    return LoRA(**fields)


def adapters_record(layer: AdaptedModule) -> dict[str, list[dict[str, Any]]]:
    """Return the metadata records of all adapters of a layer, by the parameters that they change."""
    bank, found = layer.adapters, dict[str, list[dict[str, Any]]]()
    for name in bank.names:
        for parameter, part in bank.parts(name).items():
            record = {**adapter_record(part), "name": name, "active": name in bank.in_use}
            found.setdefault(parameter, []).append(record)
    return found


def adapters_of(record: object) -> dict[str, tuple[LoRA, bool]]:
    """Parse the records of ``adapters_record``: by name, each adapter's technique and whether it is active.

    Raises:
        ValueError: an invalid record; the message is short, whatever the record holds.
    """
    if not isinstance(record, list) or not record:
        raise ValueError(f"they are {show(record)}, and must be a list of at least one")
    found: dict[str, tuple[LoRA, bool]] = {}
    for part in record:
        fields = dict(check_keys(part, (*_ADAPTER, "name", "active"), ("rank_stabilized",)))
        _check_type(fields, "name", str, "a string")
        _check_type(fields, "active", bool, "true or false")
        if fields["name"] in found:
            raise ValueError(f"adapter {show(fields['name'])} is there twice")
        name, active = fields.pop("name"), fields.pop("active")
        found[name] = lora_of(fields), active
    return found


def check_config(record: Mapping[str, Any]) -> None:
    """Raise unless this version of lowmem reads the fields of a folder's ``quantization_config``.

    Raises:
        TypeError: ``skip`` that is no patterns, or ``train_dense`` that is neither true nor false.
        ValueError: another version, an unknown field, or ``layers`` and ``adapters`` that are no records.
    """
    version = record.get("version", CONFIG_VERSION)
    if type(version) is not int or version != CONFIG_VERSION:
        older = type(version) is int and version < CONFIG_VERSION
        remedy = "make the folder again with this one" if older else "upgrade lowmem"
        raise ValueError(
            f"quantization_config has version={show(version)}, and this lowmem reads {CONFIG_VERSION}: {remedy}"
        )
    unknown = sorted(record.keys() - _CONFIG)
    if unknown:
        raise ValueError(f"quantization_config has {show(unknown[0])}, which this lowmem does not know: upgrade it")
    skip, layers, adapters = record.get("skip", []), record.get("layers", []), record.get("adapters")
    if not isinstance(skip, str) and not (isinstance(skip, list) and all(isinstance(one, str) for one in skip)):
        raise TypeError(f"skip={show(skip)} must be glob patterns of paths, as ['lm_head', '*.o_proj']")
    if not (isinstance(layers, list) and all(isinstance(one, Mapping) for one in layers)):
        raise ValueError(f"layers={show(layers)} must be a list of objects")
    if not isinstance(adapters or {}, Mapping):
        raise ValueError(f"adapters={show(adapters)} must be an object")
    if not isinstance(record.get("train_dense", False), bool):
        raise TypeError(f"train_dense={show(record['train_dense'])} must be True or False")


def check_keys(record: object, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """Return ``record`` if it is an object with all required and no unknown keys.

    Raises:
        ValueError: it is not.
    """
    fields = check_object(record)
    for name in required:
        if name not in fields:
            raise ValueError(f"it has no {name!r}")
    for name in fields:
        if name not in required and name not in optional:
            raise ValueError(f"{show(name)} is unknown")
    return fields


def check_object(record: object) -> dict[str, Any]:
    """Return ``record`` if it is an object.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is {show(record)}, and must be an object")
    return record


@contextmanager
def record_errors(what: str) -> Iterator[None]:
    """Turn a ValueError of the block into one that names the part ``what`` of the file, and the remedy."""
    try:
        yield
    except ValueError as reason:
        remedy = "upgrade lowmem, or get the file again from who wrote it"
        raise ValueError(f"{what} is not lowmem's: {reason}; {remedy}") from reason


def _check_type(fields: dict[str, Any], name: str, kind: type, expected: str) -> None:
    if type(fields[name]) is not kind:  # not isinstance: True is an int
        raise ValueError(f"{name}={show(fields[name])} must be {expected}")


def _check_flag(fields: dict[str, Any], name: str) -> None:
    if fields.get(name, True) is not True:  # absent where it does not hold, so that bytes are unique
        raise ValueError(f"{name}={show(fields[name])} must be true, or absent")


def _choice(fields: dict[str, Any], name: str, known: Collection[str]) -> str:
    value = fields[name]
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={show(value)} is none of {', '.join(known)}")
    return value
