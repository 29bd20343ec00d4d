"""Serializes techniques and adapters to a file's metadata, and parses them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lowmem.errors import show
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapter import Adapter, LoRA
from lowmem.nn.eightbit import EightBit, blockwise
from lowmem.nn.fourbit import FourBit
from lowmem.nn.half import Half
from lowmem.nn.stored import FourBitForm
from lowmem.quant.formats import EIGHT_BIT, FORMATS, IMPORTED
from lowmem.quant.scales import ENCODINGS, OFFSETS
from lowmem.quant.tensor import METHODS

__all__ = [
    "CONFIG_VERSION",
    "FLAGS",
    "adapter_record",
    "adapters_of",
    "adapters_record",
    "check_config",
    "check_keys",
    "check_object",
    "flags_of",
    "form_record",
    "layer_of",
    "lora_of",
    "record_errors",
    "technique_of",
    "technique_record",
]

FLAGS = ("transposed", "gathered")
"""What a record says of a 4-bit weight where it holds, and else not: older readers refuse the keys."""

CONFIG_VERSION = 1  # of the quantization_config of a folder; a newer one is refused
_CONFIG = {"quant_method", "notice", "version", "technique", "skip", "train_dense", "layers", "adapters"}

_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_ADAPTER = ("rank", "alpha", "dropout")
_COMPUTED = {**_STORED, "float32": torch.float32, "float64": torch.float64, "int8": torch.int8}


def technique_record(
    technique: Half | EightBit | FourBit, method: str = "absmax", flags: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the metadata record of how a weight is stored; ``flags`` are those of its ``FourBitForm``."""
    if isinstance(technique, Half):
        return {"technique": "Half", "dtype": str(technique.dtype).removeprefix("torch.")}
    compute = None if technique.compute_dtype is None else str(technique.compute_dtype).removeprefix("torch.")
    return {
        "technique": type(technique).__name__,
        "format": technique.format,
        "block_size": technique.block_size,
        "scales": technique.scales,
        "method": method,
        **({} if compute is None else {"compute_dtype": compute}),
        **dict.fromkeys(flags, True),
    }


def form_record(form: FourBitForm, compute_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the metadata record of a weight that is stored in a form."""
    technique = blockwise(form.format, form.block_size, form.scale_encoding, compute_dtype)
    return technique_record(technique, form.method, form.flags)


def layer_of(name: str) -> str:
    """Return where the record of a parameter is: at the path of the layer whose ``weight`` it is, or at its name."""
    return name.removesuffix("weight").rstrip(".") if name.rpartition(".")[2] == "weight" else name


def technique_of(record: object) -> tuple[Half | EightBit | FourBit, str | None]:
    """Parse a record of ``technique_record``: the technique, and the method of a 4- or 8-bit one (else None).

    Raises:
        ValueError: an invalid record; the message is short, whatever the record holds.
    """
    kind = check_object(record).get("technique")
    if kind == "Half":
        fields = check_keys(record, ("technique", "dtype"))
        return Half(_STORED[_choice(fields, "dtype", _STORED)]), None
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
        if fields.get(name, True) is not True:  # absent where it does not hold, so that bytes are unique
            raise ValueError(f"{name}={show(fields[name])} must be true, or absent")
    compute = _COMPUTED[_choice(fields, "compute_dtype", _COMPUTED)] if "compute_dtype" in fields else None
    return blockwise(fields["format"], fields["block_size"], fields["scales"], compute), fields["method"]


def flags_of(record: Mapping[str, Any]) -> frozenset[str]:
    """Return which of ``FLAGS`` a record has that ``technique_of`` takes."""
    return frozenset(FLAGS) & record.keys()


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
    return _lora(check_keys(record, _ADAPTER, ("rank_stabilized",)))


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
        fields = check_keys(part, (*_ADAPTER, "name", "active"), ("rank_stabilized",))
        _check_type(fields, "name", str, "a string")
        _check_type(fields, "active", bool, "true or false")
        if fields["name"] in found:
            raise ValueError(f"adapter {show(fields['name'])} is there twice")
        found[fields["name"]] = _lora(fields), fields["active"]
    return found


def check_config(record: Mapping[str, Any]) -> None:
    """Raise unless this version of lowmem reads the fields of a folder's ``quantization_config``.

    Raises:
        TypeError: ``skip`` that is no patterns, or ``train_dense`` that is neither true nor false.
        ValueError: another version, an unknown field, or ``layers`` and ``adapters`` that are no records.
    """
    version = record.get("version", CONFIG_VERSION)
    if type(version) is not int or version != CONFIG_VERSION:
        raise ValueError(
            f"quantization_config has version={show(version)}, and this lowmem reads {CONFIG_VERSION}: upgrade lowmem"
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


def _lora(fields: dict[str, Any]) -> LoRA:
    _check_type(fields, "rank", int, "a positive integer")
    for name in ("alpha", "dropout"):
        if type(fields[name]) not in (int, float) and not (name == "alpha" and fields[name] is None):
            raise ValueError(f"{name}={show(fields[name])} must be a number")
    stabilized = fields.get("rank_stabilized", False)
    if "rank_stabilized" in fields and stabilized is not True:  # absent where it is not, so that bytes are unique
        raise ValueError(f"rank_stabilized={show(stabilized)} must be true, or absent")
    return LoRA(fields["rank"], fields["alpha"], fields["dropout"], stabilized)


def _check_type(fields: dict[str, Any], name: str, kind: type, expected: str) -> None:
    if type(fields[name]) is not kind:  # not isinstance: True is an int
        raise ValueError(f"{name}={show(fields[name])} must be {expected}")


def _choice(fields: dict[str, Any], name: str, known: Collection[str]) -> str:
    value = fields[name]
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={show(value)} is none of {', '.join(known)}")
    return value
