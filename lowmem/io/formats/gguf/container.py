"""The container of GGUF (``docs/gguf.md`` of ggml), versions 2 and 3, little-endian: fields, places, and tensors."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from lowmem.errors import refusal, show
from lowmem.io.atomic import atomic_file, check_writable, read_errors, write_errors
from lowmem.io.formats.gguf.blocks import BLOCKS

MAGIC = b"GGUF"
VERSION = 3  # that is written
ALIGNMENT = 32  # bytes, of each tensor, where no field says another

MAX_HEADER = 2**28  # bytes; a vocabulary of 256,000 tokens takes 10 MB
MAX_ITEMS = 2**22  # strings, and values of nested arrays, that are stepped over one by one: a second
MAX_TENSORS = 2**17
MAX_KEPT = 2**16  # numbers of an array, or bytes of a text, that are kept; longer ones are stepped over
MAX_NAME = 2**10  # bytes; ggml takes 64
MAX_NESTED = 4  # arrays in arrays
MAX_ALIGNMENT = 2**20

WINDOW = 2**16  # bytes of a header that are read at a time

Field: TypeAlias = "bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]"
"""A value of the metadata: bool, uint32, float32, text, or an array of int32, float32 or texts."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALLEST_KEY, _SMALLEST_TENSOR = 13, 32  # bytes of an entry, with an empty text and of one dimension


@dataclass(frozen=True)
class Placed:
    """A tensor of a file: ``shape`` has the rows' length last, and ``begin`` counts from the start of a file."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes; 0: ``type`` is no key of ``BLOCKS``."""
        block = BLOCKS.get(self.type)
        return 0 if block is None else math.prod(self.shape) // block.size * block.nbytes


@dataclass(frozen=True)
class GGUFHeader:
    """Numbers, short texts and short arrays of numbers of the metadata, and the tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, Placed]
    places: dict[str, slice]
    """Where each key with its type and value lies in the file."""


class _Cursor:
    """Reads a header forwards, and no more of it than there may be."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self.file, self.end, self.at, self.items = file, min(size, MAX_HEADER), 0, 0
        self.is_cut = size < MAX_HEADER
        self.window, self.start = b"", 0  # bytes of the file, and where they lie in it

    def take(self, count: int) -> bytes:
        at = self.at - self.start
        self.skip(count)
        if at + count > len(self.window):
            self.start = self.at - count
            self.file.seek(self.start)
            self.window, at = self.file.read(max(count, WINDOW)), 0
            if len(self.window) < count:
                raise ValueError("it was cut while it was read")
        return self.window[at : at + count]

    def skip(self, count: int) -> None:
        if count > self.end - self.at:
            why = f"it ends after {self.end} bytes" if self.is_cut else f"it takes more than {MAX_HEADER} bytes"
            raise ValueError(f"the header wants {count} bytes at {self.at}: {why}")
        self.at += count

    def skip_texts(self, count: int) -> None:
        """Step over texts of an array: a vocabulary has hundreds of thousands."""
        take, skip, length = self.take, self.skip, int.from_bytes
        for _ in range(count):
            skip(length(take(8), "little"))

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, limit: int) -> str | None:
        """Return a text, or None for a longer one, which is stepped over."""
        length = self.number("Q")
        if length > limit:
            self.skip(length)
            return None
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text at {self.at - length} is no UTF-8") from None

    def name(self, what: str) -> str:
        text = self.text(MAX_NAME)
        if not text:
            raise ValueError(f"the name of {what} is {'empty' if text == '' else f'longer than {MAX_NAME} bytes'}")
        return text

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return a value of a type, or None for what is too long to keep."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text(MAX_KEPT)
        if kind != _ARRAY:
            raise ValueError(f"a value has the type {kind}, which is unknown")
        if depth >= MAX_NESTED:
            raise ValueError(f"arrays lie {depth + 1} deep in each other; {MAX_NESTED} is the most")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            nbytes = count * struct.calcsize(f"<{_NUMBERS[inner]}")
            if count > MAX_KEPT:
                self.skip(nbytes)
                return None
            return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self.take(nbytes)))
        self.items += count
        if self.items > MAX_ITEMS:
            raise ValueError(f"its arrays have more than {MAX_ITEMS} texts or arrays")
        if inner == _STRING:
            self.skip_texts(count)
        else:
            for _ in range(count):
                self.value(inner, depth + 1)
        return None


def read_header(path: Path, file: BufferedReader) -> GGUFHeader:
    """Read and check the header of a file; a FileError if it is cut, contradicts itself, or is of another kind."""
    with read_errors(path):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            return _header(_Cursor(file, size), size)
        except ValueError as reason:
            raise refusal(path, f"it is no valid GGUF file: {reason}; get it again") from None


def _header(cursor: _Cursor, size: int) -> GGUFHeader:
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3)
        what = "is big-endian" if swapped else f"has version {version}"
        raise ValueError(f"it {what}, and lowmem reads versions 2 and 3 in little-endian")
    count, keys = cursor.number("Q"), cursor.number("Q")
    for what, number, least in (("tensors", count, _SMALLEST_TENSOR), ("metadata keys", keys, _SMALLEST_KEY)):
        if number > min(cursor.end // least, MAX_TENSORS):
            raise ValueError(f"it claims {number} {what}, more than fit")
    metadata: dict[str, Any] = {}
    places: dict[str, slice] = {}
    for _ in range(keys):
        begin = cursor.at
        key = cursor.name("a metadata key")
        if key in metadata:
            raise ValueError(f"its metadata has {show(key)} twice")
        metadata[key] = cursor.value(cursor.number("I"))
        places[key] = slice(begin, cursor.at)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={show(alignment)} must be a power of two up to {MAX_ALIGNMENT}")
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.name("a tensor")
        if name in entries:
            raise ValueError(f"it has tensor {show(name)} twice")
        entries[name] = _entry(cursor, name)
    start = cursor.at + -cursor.at % alignment
    tensors = {name: _placed(name, entry, start, alignment, size) for name, entry in entries.items()}
    _check_apart(tensors.values())
    return GGUFHeader(metadata, tensors, places)


def _entry(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    dims = cursor.number("I")
    if not 1 <= dims <= 4:
        raise ValueError(f"tensor {show(name)} has {dims} dimensions, and 1 to 4 are possible")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    return shape, cursor.number("I"), cursor.number("Q")


def _placed(name: str, entry: tuple[tuple[int, ...], int, int], start: int, alignment: int, size: int) -> Placed:
    shape, kind, offset = entry
    if offset % alignment or start + offset > size:
        raise ValueError(f"tensor {show(name)} lies at {offset}, which is unaligned or beyond the end of the file")
    if 0 in shape:
        raise ValueError(f"tensor {show(name)} has the shape {show(shape)}, which holds nothing")
    block, found = BLOCKS.get(kind), Placed(name, shape, kind, start + offset)
    if block is not None and shape[-1] % block.size:
        raise ValueError(f"tensor {show(name)} has rows of {shape[-1]}, no multiple of {block.size} in {block.name}")
    if found.nbytes > size - found.begin:
        raise ValueError(f"tensor {show(name)} takes {found.nbytes} bytes at {found.begin}, and the file has {size}")
    return found


def _check_apart(tensors: Any) -> None:
    end, last = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        if tensor.begin < end:
            raise ValueError(f"tensors {show(last)} and {show(tensor.name)} lie on the same bytes")
        end, last = tensor.begin + (tensor.nbytes or 1), tensor.name


def encode_field(key: str, value: Field) -> bytes:
    """Return a field as a file has it: key, type and value; a ValueError if no type holds the value."""
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
        fields: by key, as ``encode_field`` returns them, in the order of the file.
        tensors: in the order of the file.
        values: their names and bytes in the same order: contiguous uint8 tensors.
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
