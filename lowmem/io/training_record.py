"""What ``lowmem fit`` writes beside an adapter: how the base was stored while the adapter trained, maybe the base."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowmem.errors import file_error, short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import open_regular_file, read_errors_with_path
from lowmem.io.model_folder import CONFIG, is_config_or_tokenizer_file, read_json_object, weights_or_index_path
from lowmem.io.shards import INDEX, read_weight_map
from lowmem.nn.techniques import BlockwiseTechnique, Budget, EightBit, FourBit, Half, blockwise_technique
from lowmem.quant.formats import DEFAULT, DEFAULT_BLOCK_SIZE, EIGHT_BIT, FORMATS, IMPORTED

RECORD_FILE = "training.json"
"""The file beside an adapter that says how it was trained."""

KEPT_BASE = "base"
"""The folder beside an adapter with the base as training stored it, which ``--keep-base`` writes."""

StorageTechnique: TypeAlias = Half | EightBit | FourBit | Budget | None
"""How to store a folder's model; None: as it is."""

FILES_KEY = "files"
"""The key of the record with the SHA-256 of the files beside it."""

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


def combined_sha256(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the contents of files."""
    sha256 = hashlib.sha256()
    for file in paths:
        with open_regular_file(file) as opened, read_errors_with_path(file):
            hashlib.file_digest(opened, lambda: sha256)
    return sha256.hexdigest()


def base_files_sha256(base: Path) -> str:
    """Return the SHA-256 of the files that a base is made of."""
    if base.is_file():
        return combined_sha256([base])
    weights = weights_or_index_path(base)
    names = sorted({*read_weight_map(weights).values()}) if weights.name.endswith(INDEX) else [weights.name]
    return combined_sha256([base / name for name in (CONFIG, *names)])


def sha256_by_file(adapter_folder: Path) -> dict[str, str]:
    """Return the SHA-256 of weights, configs and tokenizers of an adapter's folder, and of the base that it keeps."""
    folders = [folder for folder in (adapter_folder, kept_base_or_none(adapter_folder)) if folder is not None]
    return {
        file.relative_to(adapter_folder).as_posix(): combined_sha256([file])
        for folder in folders
        for file in sorted(folder.iterdir())
        if (file.name.endswith(".safetensors") or is_config_or_tokenizer_file(file.name)) and file.name != RECORD_FILE
    }


def check_unchanged_since_training(adapter_folder: Path, base: Path) -> None:
    """Raise a FileError if an adapter's files, or its base, are not those that its record names."""
    path = adapter_folder / RECORD_FILE
    record = read_json_object(path, kind="record") if path.is_file() else {}
    recorded, kept_base = record.get(FILES_KEY), kept_base_or_none(adapter_folder)
    if isinstance(recorded, dict):
        now = sha256_by_file(adapter_folder)
        changed = next((name for name in sorted(recorded | now) if recorded.get(name) != now.get(name)), None)
        if changed is not None:
            raise file_error(adapter_folder / changed, "it was changed after the training: get it again", "export")
    if kept_base is not None and base.resolve() == kept_base.resolve():
        return
    run = record.get("run")
    trained_on = run.get("base") if isinstance(run, dict) else None
    if trained_on is not None and base_files_sha256(base) != trained_on:
        why = f"{str(adapter_folder)!r} was trained on another base, or on other files: name the base with --base"
        raise file_error(base, why, "export")
