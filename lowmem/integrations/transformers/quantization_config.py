"""How a model is stored, as ``quantization_config`` in the config.json of a Hugging Face folder holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowmem.errors import short_repr
from lowmem.io.metadata_records import (
    CONFIG_VERSION,
    check_lowmem_quantization_config,
    checked_json_object,
    checked_json_object_with_keys,
)
from lowmem.nn.techniques import QUANT_METHOD, Budget, EightBit, FourBit, Half, LoRA
from lowmem.version import install_command

METHOD = QUANT_METHOD
"""The quantization method."""

NOTICE = (
    f"The weights of this folder are stored by lowmem. To load it: {install_command('transformers')}, and import "
    "lowmem.integrations.transformers before from_pretrained. Without, transformers refuses their shapes."
)
_SKIPS = ("skip_modules", "llm_int8_skip_modules", "modules_to_not_convert")  # of other libraries' configs
_KINDS = (Half, EightBit, FourBit, Budget)


@register_quantization_config(METHOD)
class LowmemConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to store a model while ``from_pretrained`` loads it, or how a saved one is stored.

    ``quantization_config=FourBit()`` is short for ``quantization_config=LowmemConfig(FourBit())``.

    Stored weights equal those of ``lowmem.convert(model, technique, skip=skip)``, to the bit. Parameters that the
    folder lacks, such as a new head, stay dense.

    Args:
        technique: ``Half``, ``EightBit``, ``FourBit``, or ``Budget`` without inputs, for which all weights are read
            twice; or its JSON. Adapters come afterwards: ``lowmem.add_adapter``.
        skip: glob patterns of modules' paths to leave dense.
        train_dense: whether ``Trainer`` may train the model without an adapter, which changes what is dense alone,
            such as norms and a new head; otherwise it refuses.
        layers: of a saved model: records of how weights are stored, each with the ``names`` of its weights.
        adapters: of a saved model: the records of its adapters, by path.
        version: of these fields.

    Raises:
        TypeError: a technique of another type, or patterns that are no strings.
        ValueError: fields that this version of lowmem does not know, such as those of a technique, or records that
            are none.
    """

    def __init__(
        self,
        technique: Half | EightBit | FourBit | Budget | Mapping[str, Any] | None = None,
        *,
        skip: str | Iterable[str] = (),
        train_dense: bool = False,
        layers: Iterable[Mapping[str, Any]] = (),
        adapters: Mapping[str, Any] | None = None,
        version: int = CONFIG_VERSION,
        **others: Any,
    ) -> None:
        unknown = sorted(others.keys() - {"quant_method", "notice"})
        if unknown and "quant_method" not in others:
            raise ValueError(_unknown_argument_message(unknown[0], others[unknown[0]]))
        patterns, records = _list_if_iterable(skip), _list_if_iterable(layers)
        others |= {"version": version, "train_dense": train_dense}
        check_lowmem_quantization_config({**others, "skip": patterns, "layers": records, "adapters": adapters})
        if technique is not None and not isinstance(technique, _KINDS):
            technique = _technique_from_json(technique)
        if isinstance(technique, Budget) and technique.inputs is not None:
            raise ValueError(
                "Budget(inputs=) runs the dense model, which is not there while it is loaded: load it first, and "
                "lowmem.convert(model, Budget(...)), then save_pretrained; or leave inputs= out"
            )
        self.quant_method = METHOD
        self.technique = technique
        self.skip: list[str] = patterns
        self.train_dense = train_dense
        self.layers = [dict(record) for record in records]
        self.adapters = dict(adapters or {})
        if technique is None and not self.layers and not self.adapters:
            raise TypeError(
                "technique=None: name Half(), EightBit(), FourBit() or Budget(), as LowmemConfig(FourBit('nf4'))"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return {
            "quant_method": METHOD,
            "version": CONFIG_VERSION,
            "notice": NOTICE,
            **({} if self.technique is None else {"technique": _technique_json_dict(self.technique)}),
            **({"skip": self.skip} if self.skip else {}),
            **({"train_dense": True} if self.train_dense else {}),
            **({"layers": self.layers} if self.layers else {}),
            **({"adapters": self.adapters} if self.adapters else {}),
        }


def _list_if_iterable(value: Any) -> Any:
    """Return the list of an iterable's items, or of a single text; any other value as it is."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else value


def _unknown_argument_message(name: str, value: object) -> str:
    """Return the error of an argument that ``LowmemConfig`` does not have: it says where it belongs."""
    kinds = [kind.__name__ for kind in (FourBit, EightBit, Half, Budget) if name in kind.__dataclass_fields__]
    if kinds:
        what = f"belongs to {' and '.join(kinds)}: write LowmemConfig(lowmem.{kinds[0]}({name}={value!r}))"
    elif name in LoRA.__dataclass_fields__:
        what = f"belongs to LoRA: load the model, then lowmem.add_adapter(model, name, lowmem.LoRA({name}={value!r}))"
    else:
        written = f"lowmem.FourBit(), skip={value!r}" if name in _SKIPS else "lowmem.FourBit()"
        what = f"is no argument of LowmemConfig: write LowmemConfig({written})"
    return f"{name}={short_repr(value)} {what}"


def _technique_json_dict(technique: Any) -> Any:
    """Return the JSON of a technique: its name, and the fields that are not None."""
    fields = {name: value for name, value in vars(technique).items() if value is not None}
    for name, value in fields.items():
        if isinstance(value, torch.dtype):
            fields[name] = str(value).removeprefix("torch.")
        elif isinstance(value, tuple):
            fields[name] = list(value)
    return {"technique": type(technique).__name__, **fields}


def _technique_from_json(record: object) -> Half | EightBit | FourBit | Budget:
    """Return the technique of its JSON; others are a TypeError or a ValueError."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}
    if not isinstance(record, Mapping):
        raise TypeError(
            f"technique={short_repr(record)} must be Half(), EightBit(), FourBit() or Budget(); adapters come "
            "afterwards, "
            "with lowmem.add_adapter, and lowmem.integrations.transformers.from_exact keeps other programs' codes"
        )
    kind = kinds.get(str(checked_json_object(dict(record)).get("technique")))
    if kind is None:
        raise ValueError(f"technique={short_repr(record.get('technique'))} is none of {', '.join(kinds)}")
    fields = checked_json_object_with_keys(dict(record), ("technique",), kind.__dataclass_fields__)
    values = {name: value for name, value in fields.items() if name != "technique"}
    for name in ("dtype", "compute_dtype"):
        if name in values:
            values[name] = getattr(torch, str(values[name]), values[name])
    if isinstance(values.get("format"), list):
        values["format"] = tuple(values["format"])
    try:
        return kind(**values)  # type: ignore[no-any-return]
    except TypeError as reason:
        raise ValueError(f"technique={short_repr(record)} is none of lowmem's: {reason}") from reason
