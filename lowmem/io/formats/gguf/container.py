"""The container of GGUF, version 3, little-endian: fields, where tensors lie, and the tensors, written in one pass.

The layout is that of ``docs/gguf.md`` of ggml. The bytes depend on the fields and tensors alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.atomic import atomic_file, check_writable, write_errors
from lowmem.io.formats.gguf.blocks import BLOCKS
from lowmem.io.formats.gguf.reading import MAGIC

__all__ = ["ALIGNMENT", "Field", "Placed", "encode_field", "write_file"]

VERSION = 3
ALIGNMENT = 32  # bytes, of each tensor: what readers take where no field says another

Field: TypeAlias = "bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]"
"""A value of the metadata: bool, uint32, float32, text, or an array of int32, float32 or texts."""

_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Placed:
    """A tensor of the file: ``shape`` has the rows' length last, ``type`` is a key of ``BLOCKS``."""

    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes."""
        block = BLOCKS[self.type]
        return torch.Size(self.shape).numel() // block.size * block.nbytes


def encode_field(key: str, value: Field) -> bytes:
    """Return a field as the file has it: key, type and value.

    An empty array is one of texts.

    Raises:
        ValueError: a number that its type does not hold, or a text that is no Unicode.
    """
    try:
        return _text(key) + _value(value)
    except (struct.error, OverflowError, UnicodeEncodeError) as reason:
        raise ValueError(f"{key}={show(value)} cannot be stored in GGUF: {reason}") from None


def _value(value: Field) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if not value or isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_text(str(one)) for one in value)
    kind, code = (6, "f") if isinstance(value[0], float) else (5, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", _ARRAY, kind, len(value), *value)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def write_file(
    path: Path, fields: Mapping[str, bytes], tensors: Sequence[Placed], values: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file atomically from a stream of tensors, each of which is released before the next one is requested.

    Args:
        path: where nothing is yet.
        fields: by key, as ``encode_field`` returns them, in the order of the file.
        tensors: in the order of the file.
        values: their names and bytes in the same order: contiguous uint8 tensors.

    Raises:
        ValueError: another tensor than the next one came, or another number of bytes.
        FileExistsError: something is at ``path``, or was created meanwhile.
        OSError: the file cannot be written.
    """
    check_writable(path)
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields)), *fields.values()]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        header += [_text(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset)]
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    start = b"".join(header)
    with atomic_file(path, overwrite=False) as file:
        with write_errors(path):
            file.write(start + b"\0" * (-len(start) % ALIGNMENT))
        left = list(tensors)
        for name, content in values:
            if not left or (left[0].name, left[0].nbytes) != (name, content.numel()):
                raise ValueError(f"tensor {show(name)} of {content.numel()} bytes came, and not {left[:1]}")
            del left[0]
            with write_errors(path):
                file.write(content.numpy().data)
                file.write(b"\0" * (-content.numel() % ALIGNMENT))
            del content  # before the next one is made
        if left:
            raise ValueError(f"{len(left)} tensors did not come, the first of them {show(left[0].name)}")
