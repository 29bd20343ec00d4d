"""What a file says of how a layer is stored, and of an adapter: there and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowmem.fourbit import FourBit
from lowmem.half import Half
from lowmem.lora import Adapter, LoRA

__all__ = ["adapter_record", "lora_of", "technique_of", "technique_record"]

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_COMPUTED = {**_DTYPES, "int8": torch.int8}  # dtypes that products are taken in


def technique_record(technique: Half | FourBit, method: str = "absmax") -> dict[str, Any]:
    """Return what a file says of how a weight is stored."""
    if isinstance(technique, Half):
        return {"technique": "Half", "dtype": str(technique.dtype).removeprefix("torch.")}
    compute = None if technique.compute_dtype is None else str(technique.compute_dtype).removeprefix("torch.")
    return {
        "technique": "FourBit",
        "format": technique.format,
        "block_size": technique.block_size,
        "scales": technique.scales,
        "method": method,
        **({} if compute is None else {"compute_dtype": compute}),
    }


def adapter_record(adapter: Adapter) -> dict[str, Any]:
    """Return what a file says of one layer's part of an adapter."""
    technique = adapter.technique
    return {"rank": technique.rank, "alpha": technique.alpha, "dropout": technique.dropout}


def lora_of(record: Mapping[str, Any]) -> LoRA:
    """Undo ``adapter_record``."""
    return LoRA(record["rank"], record["alpha"], record["dropout"])


def technique_of(record: Mapping[str, Any]) -> tuple[Half | FourBit, str | None]:
    """Undo ``technique_record``: the technique, and the method of a 4-bit one.

    Raises:
        ValueError, LookupError: no such record.
    """
    if record["technique"] == "Half":
        return Half(_DTYPES[record["dtype"]]), None
    if record["technique"] != "FourBit":
        raise ValueError(f"its technique {record['technique']!r} is unknown: upgrade lowmem")
    compute = record.get("compute_dtype")
    technique = FourBit(
        record["format"], record["block_size"], record["scales"], None if compute is None else _COMPUTED[compute]
    )
    return technique, record["method"]
