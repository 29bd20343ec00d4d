"""What ``lowmem fit`` writes beside an adapter: how the base was stored while the adapter trained, maybe the base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowmem.errors import short_repr, value_errors_as_file_errors
from lowmem.io.model_folder import CONFIG, read_json_object
from lowmem.nn.techniques import BlockwiseTechnique, Budget, EightBit, FourBit, Half, blockwise_technique
from lowmem.quant.formats import DEFAULT, DEFAULT_BLOCK_SIZE, EIGHT_BIT, FORMATS, IMPORTED

RECORD_FILE = "training.json"
"""The file beside an adapter that says how it was trained."""

KEPT_BASE = "base"
"""The folder beside an adapter with the base as training stored it, which ``--keep-base`` writes."""

StorageTechnique: TypeAlias = Half | EightBit | FourBit | Budget | None
"""How to store a folder's model; None: as it is."""

AS_IT_IS = "as it is"
_HALF = ("bfloat16", "float16")


def technique_format_name(technique: StorageTechnique) -> str:
    """Return the name of a technique in a record."""
    if isinstance(technique, Half):
        return str(technique.dtype).removeprefix("torch.")
    if isinstance(technique, Budget):
        return f"{technique.bits:g} bits"
    return str(technique.format) if isinstance(technique, BlockwiseTechnique) else technique or AS_IT_IS


def kept_base_or_none(adapter_folder: Path) -> Path | None:
    """Return the folder of the base that is kept beside an adapter; None: there is none, or an adapter called so."""
    folder = adapter_folder / KEPT_BASE
    return folder if (folder / CONFIG).is_file() else None


def read_training_technique_or_none(adapter_folder: Path) -> StorageTechnique:
    """Return how the base of an adapter was stored while the adapter trained; None: as it is, or not said.

    Raises:
        FileError: the record is damaged, or names what this version does not know.
        OSError: the record cannot be read.
    """
    path = adapter_folder / RECORD_FILE
    if not path.exists():
        return None
    record = read_json_object(path, kind="record")
    run = record.get("run")
    with value_errors_as_file_errors(path):
        if not isinstance(run, dict):
            raise ValueError(f"run={short_repr(run)} must be an object; get the adapter again")
        # Before there was a key of it, other blocks of the default format were not told apart
        default = DEFAULT_BLOCK_SIZE if run.get("format") == DEFAULT else None
        return _technique_from_record(
            run.get("format"), record.get("block_size", default), run.get("embeddings") or "8bit"
        )


def _technique_from_record(format_name: object, block_size: Any, embeddings: Any) -> StorageTechnique:
    if format_name == AS_IT_IS:
        return None
    if format_name in _HALF:
        return Half(getattr(torch, str(format_name)))
    if isinstance(format_name, str) and (bits := re.fullmatch(r"(\d+(?:\.\d+)?) bits", format_name)):
        return Budget(float(bits[1]))
    if format_name not in (*FORMATS, *IMPORTED, *EIGHT_BIT):
        raise ValueError(f"format={short_repr(format_name)} is none of this version's: upgrade lowmem")
    return blockwise_technique(str(format_name), block_size, embeddings=embeddings)
