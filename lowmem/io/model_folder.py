"""A folder as ``save_pretrained`` of transformers writes it: its weights, and its other files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from lowmem.errors import refusal
from lowmem.io.atomic import open_regular, write_errors
from lowmem.io.shards import INDEX, read_index

__all__ = ["WEIGHTS", "copy_others", "weights_in"]

WEIGHTS = "model.safetensors"

_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)
"""Ends of the names of weights, in any format."""


def weights_in(folder: Path, action: str = "read") -> Path:
    """Return the only file of a folder's weights, or the index of several.

    Args:
        folder: as ``save_pretrained`` writes it.
        action: what errors say cannot be done.

    Raises:
        FileError: it has neither; or both, of which transformers reads the file, and other programs the index.
        OSError: the index cannot be read.
    """
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}{INDEX}"
    if not os.path.lexists(index):
        if not os.path.lexists(whole):
            why = f"it has no {whole.name} and no {index.name}: lowmem reads safetensors only, and executed nothing"
            raise refusal(folder, f"{why}; name a folder of such a model", action)
        return whole
    if os.path.lexists(whole) and whole.name not in read_index(index).values():
        why = f"it has {index.name}, and {whole.name}, too: remove the one that is not the model"
        raise refusal(folder, why, action)
    return index


def copy_others(folder: Path, target: Path, out: Path, leave: Collection[str]) -> None:
    """Copy the files of a folder that are no weights, as those of its tokenizer.

    Args:
        folder: from where; what is in folders inside it stays.
        target: an existing folder.
        out: what errors call the target.
        leave: names of files that are not copied.

    Raises:
        OSError: a file cannot be read or written.
    """
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name in leave or file.name.endswith(_FORMATS):
            continue
        with open_regular(file) as source, write_errors(out), open(target / file.name, "xb") as copy:
            shutil.copyfileobj(source, copy)
