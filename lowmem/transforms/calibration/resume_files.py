"""Files of what a calibration has finished, so that it can go on after it was ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowmem.errors import error_type_and_first_line, file_error, unwritable_file_error
from lowmem.version import __version__


def calibration_digest(model: nn.Module, batches: Iterable[Any], settings: str) -> str:
    """Return what names a calibration: a digest of the model's numbers, its inputs and how it is done."""
    hasher = _text_and_tensors_hasher(
        f"{__version__} {settings}", chain(model.named_parameters(), model.named_buffers())
    )
    for batch in batches:
        leaves, structure = pytree.tree_flatten(dict(batch) if hasattr(batch, "keys") else batch)
        hasher.update(repr(structure).encode())
        for leaf in leaves:
            hasher.update(_tensor_as_uint8_array(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return str(hasher.hexdigest())


def _tensor_as_uint8_array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _text_and_tensors_hasher(text: str, named_tensors: Iterable[tuple[str, Tensor]]) -> Any:
    hasher = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in named_tensors:
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(_tensor_as_uint8_array(tensor))
    return hasher


def _unit_content_digest(unit_index: int, tensors: Mapping[str, Tensor], record: str) -> str:
    """Return a digest of what the file of a unit holds."""
    return str(_text_and_tensors_hasher(f"{unit_index} {record}", sorted(tensors.items())).hexdigest())


class FinishedUnitFiles:
    """A folder with a file for each unit that is finished; a file is whole, or it is not there.

    Args:
        folder: made where it is not there yet.
        digest: of the calibration; files of another one are refused.

    Raises:
        OSError: the folder cannot be made; the error names it and the remedy.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        if folder.is_file():
            raise NotADirectoryError(f"resume={str(folder)!r} is a file: name a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise unwritable_file_error(folder, reason) from reason
        self._folder, self._digest = folder, digest

    def save_unit(self, unit_index: int, tensors: dict[str, Tensor], record: Any) -> None:
        """Write the file of a unit, with a record that JSON can hold; an OSError names the folder and the remedy."""
        from safetensors.torch import save

        path = self._unit_path(unit_index)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        metadata = {"digest": self._digest, "record": json.dumps(record)}
        metadata["content"] = _unit_content_digest(unit_index, tensors, metadata["record"])
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as reason:
            raise unwritable_file_error(self._folder, reason) from reason
        finally:
            partial.unlink(missing_ok=True)

    def load_unit_or_none(self, unit_index: int) -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors and the record of a unit; None: it is not finished.

        Raises:
            FileError: the file is damaged, or of another calibration.
        """
        from safetensors import SafetensorError, safe_open

        path = self._unit_path(unit_index)
        if not path.exists():
            return None
        # A pipe, which would never end
        if not path.is_file():
            raise file_error(path, "it is no regular file: remove it, and the unit is done again")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        except SafetensorError as reason:
            raise file_error(
                path, f"it is damaged ({error_type_and_first_line(reason)}): remove it, and the unit is done again"
            ) from None
        if metadata.get("digest") != self._digest:
            raise file_error(
                path, "it is of another model, other batches or settings: name another folder for resume=", "resume"
            )
        record = metadata.get("record", "")
        if metadata.get("content") != _unit_content_digest(unit_index, tensors, record):
            raise file_error(path, "it is damaged (its digest differs): remove it, and the unit is done again")
        return tensors, json.loads(record)

    def _unit_path(self, unit_index: int) -> Path:
        return self._folder / f"unit-{unit_index:05}.safetensors"
