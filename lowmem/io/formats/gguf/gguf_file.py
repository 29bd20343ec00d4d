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

from lowmem.errors import file_error, short_repr
from lowmem.io.filesystem import atomic_file, check_writable, read_errors_with_path, write_errors_with_path
from lowmem.io.formats.gguf.gguf_block_types import BLOCKS

MAGIC = b"GGUF"
VERSION = 3  # that is written
# Bytes, of each tensor, where no field says another
ALIGNMENT = 32

# Bytes; a vocabulary of 256,000 tokens takes 10 MB
MAX_HEADER = 2**28
# Strings, and values of nested arrays, that are stepped over one by one: a second
MAX_ITEMS = 2**22
MAX_TENSORS = 2**17
# Numbers of an array, or bytes of a text, that are kept; longer ones are stepped over
MAX_KEPT = 2**16
# Bytes; ggml takes 64
MAX_NAME = 2**10
# Arrays in arrays
MAX_NESTED = 4
MAX_ALIGNMENT = 2**20

# Bytes of a header that are read at a time
WINDOW = 2**16

GGUFValue: TypeAlias = "bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]"
"""A value of the metadata: bool, uint32, float32, text, or an array of int32, float32 or texts."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Bytes of an entry, with an empty text and of one dimension
_SMALLEST_KEY, _SMALLEST_TENSOR = 13, 32


@dataclass(frozen=True)
class GGUFTensorInfo:
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
    tensors: dict[str, GGUFTensorInfo]
    field_slices: dict[str, slice]
    """Where each key with its type and value lies in the file."""


class _HeaderReader:
    """Reads a header forwards, and no more of it than there may be."""

    def __init__(self, file: BufferedReader, file_size: int) -> None:
        self.file, self.end, self.at, self.items = file, min(file_size, MAX_HEADER), 0, 0
        self.is_cut = file_size < MAX_HEADER
        # Bytes of the file, and where they lie in it
        self.window, self.start = b"", 0

    def read_bytes(self, count: int) -> bytes:
        at = self.at - self.start
        self.skip_bytes(count)
        if at + count > len(self.window):
            self.start = self.at - count
            self.file.seek(self.start)
            self.window, at = self.file.read(max(count, WINDOW)), 0
            if len(self.window) < count:
                raise ValueError("it was cut while it was read")
        return self.window[at : at + count]

    def skip_bytes(self, count: int) -> None:
        if count > self.end - self.at:
            why = f"it ends after {self.end} bytes" if self.is_cut else f"it takes more than {MAX_HEADER} bytes"
            raise ValueError(f"the header wants {count} bytes at {self.at}: {why}")
        self.at += count

    def skip_strings(self, count: int) -> None:
        """Step over texts of an array: a vocabulary has hundreds of thousands."""
        read_bytes, skip_bytes, length = self.read_bytes, self.skip_bytes, int.from_bytes
        for _ in range(count):
            skip_bytes(length(read_bytes(8), "little"))

    def read_number(self, struct_code: str) -> Any:
        return struct.unpack(f"<{struct_code}", self.read_bytes(struct.calcsize(f"<{struct_code}")))[0]

    def read_string_or_skip(self, max_bytes: int) -> str | None:
        """Return a text, or None for a longer one, which is stepped over."""
        length = self.read_number("Q")
        if length > max_bytes:
            self.skip_bytes(length)
            return None
        try:
            return self.read_bytes(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text at {self.at - length} is no UTF-8") from None

    def read_checked_name(self, description: str) -> str:
        text = self.read_string_or_skip(MAX_NAME)
        if not text:
            raise ValueError(
                f"the name of {description} is {'empty' if text == '' else f'longer than {MAX_NAME} bytes'}"
            )
        return text

    def read_value_or_skip(self, value_type: int, depth: int = 0) -> Any:
        """Return a value of a type, or None for what is too long to keep."""
        if value_type in _NUMBERS:
            return self.read_number(_NUMBERS[value_type])
        if value_type == _STRING:
            return self.read_string_or_skip(MAX_KEPT)
        if value_type != _ARRAY:
            raise ValueError(f"a value has the type {value_type}, which is unknown")
        if depth >= MAX_NESTED:
            raise ValueError(f"arrays lie {depth + 1} deep in each other; {MAX_NESTED} is the most")
        inner, count = self.read_number("I"), self.read_number("Q")
        if inner in _NUMBERS:
            nbytes = count * struct.calcsize(f"<{_NUMBERS[inner]}")
            if count > MAX_KEPT:
                self.skip_bytes(nbytes)
                return None
            return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self.read_bytes(nbytes)))
        self.items += count
        if self.items > MAX_ITEMS:
            raise ValueError(f"its arrays have more than {MAX_ITEMS} texts or arrays")
        if inner == _STRING:
            self.skip_strings(count)
        else:
            for _ in range(count):
                self.read_value_or_skip(inner, depth + 1)
        return None


def read_gguf_header(path: Path, file: BufferedReader) -> GGUFHeader:
    """Read and check the header of a file; a FileError if it is cut, contradicts itself, or is of another kind."""
    with read_errors_with_path(path):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            return _parse_gguf_header(_HeaderReader(file, size), size)
        except ValueError as reason:
            raise file_error(path, f"it is no valid GGUF file: {reason}; get it again") from None


def _parse_gguf_header(reader: _HeaderReader, file_size: int) -> GGUFHeader:
    if reader.read_bytes(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.read_number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3)
        what = "is big-endian" if swapped else f"has version {version}"
        raise ValueError(f"it {what}, and lowmem reads versions 2 and 3 in little-endian")
    count, keys = reader.read_number("Q"), reader.read_number("Q")
    for what, number, least in (("tensors", count, _SMALLEST_TENSOR), ("metadata keys", keys, _SMALLEST_KEY)):
        if number > min(reader.end // least, MAX_TENSORS):
            raise ValueError(f"it claims {number} {what}, more than fit")
    metadata: dict[str, Any] = {}
    places: dict[str, slice] = {}
    for _ in range(keys):
        begin = reader.at
        key = reader.read_checked_name("a metadata key")
        if key in metadata:
            raise ValueError(f"its metadata has {short_repr(key)} twice")
        metadata[key] = reader.read_value_or_skip(reader.read_number("I"))
        places[key] = slice(begin, reader.at)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={short_repr(alignment)} must be a power of two up to {MAX_ALIGNMENT}")
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.read_checked_name("a tensor")
        if name in entries:
            raise ValueError(f"it has tensor {short_repr(name)} twice")
        entries[name] = _read_shape_type_and_offset(reader, name)
    start = reader.at + -reader.at % alignment
    tensors = {
        name: _checked_tensor_info(name, entry, start, alignment, file_size) for name, entry in entries.items()
    }
    _check_no_tensors_overlap(tensors.values())
    return GGUFHeader(metadata, tensors, places)


def _read_shape_type_and_offset(reader: _HeaderReader, name: str) -> tuple[tuple[int, ...], int, int]:
    dims = reader.read_number("I")
    if not 1 <= dims <= 4:
        raise ValueError(f"tensor {short_repr(name)} has {dims} dimensions, and 1 to 4 are possible")
    shape = tuple(reader.read_number("Q") for _ in range(dims))[::-1]
    return shape, reader.read_number("I"), reader.read_number("Q")


def _checked_tensor_info(
    name: str,
    shape_type_and_offset: tuple[tuple[int, ...], int, int],
    data_start: int,
    alignment: int,
    file_size: int,
) -> GGUFTensorInfo:
    shape, kind, offset = shape_type_and_offset
    if offset % alignment or data_start + offset > file_size:
        raise ValueError(
            f"tensor {short_repr(name)} lies at {offset}, which is unaligned or beyond the end of the file"
        )
    if 0 in shape:
        raise ValueError(f"tensor {short_repr(name)} has the shape {short_repr(shape)}, which holds nothing")
    block, tensor_info = BLOCKS.get(kind), GGUFTensorInfo(name, shape, kind, data_start + offset)
    if block is not None and shape[-1] % block.size:
        raise ValueError(
            f"tensor {short_repr(name)} has rows of {shape[-1]}, no multiple of {block.size} in {block.name}"
        )
    if tensor_info.nbytes > file_size - tensor_info.begin:
        raise ValueError(
            f"tensor {short_repr(name)} takes {tensor_info.nbytes} bytes at {tensor_info.begin}, and the file has "
            f"{file_size}"
        )
    return tensor_info


def _check_no_tensors_overlap(tensors: Any) -> None:
    end, last = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        if tensor.begin < end:
            raise ValueError(f"tensors {short_repr(last)} and {short_repr(tensor.name)} lie on the same bytes")
        end, last = tensor.begin + (tensor.nbytes or 1), tensor.name


def encode_metadata_field(key: str, value: GGUFValue) -> bytes:
    """Return a field as a file has it: key, type and value; a ValueError if no type holds the value."""
    try:
        return _length_prefixed_utf8(key) + _encoded_type_and_value(value)
    except (struct.error, OverflowError, UnicodeEncodeError) as reason:
        raise ValueError(f"{key}={short_repr(value)} cannot be stored in GGUF: {reason}") from None


def _encoded_type_and_value(value: GGUFValue) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _length_prefixed_utf8(value)
    if not value or isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(
            _length_prefixed_utf8(str(item)) for item in value
        )
    kind, code = (6, "f") if isinstance(value[0], float) else (5, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", _ARRAY, kind, len(value), *value)


def _length_prefixed_utf8(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def write_new_gguf_file(
    path: Path,
    encoded_fields: Mapping[str, bytes],
    tensor_infos: Sequence[GGUFTensorInfo],
    names_and_bytes: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a file atomically from a stream of tensors, each of which is released before the next one is requested.

    Args:
        encoded_fields: by key, as ``encode_metadata_field`` returns them, in the order of the file.
        tensor_infos: in the order of the file.
        names_and_bytes: their names and bytes in the same order: contiguous uint8 tensors.
    """
    check_writable(path)
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensor_infos), len(encoded_fields)), *encoded_fields.values()]
    offset = 0
    for tensor in tensor_infos:
        dims = tensor.shape[::-1]
        header += [
            _length_prefixed_utf8(tensor.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset),
        ]
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    start = b"".join(header)
    with atomic_file(path, overwrite=False) as file:
        with write_errors_with_path(path):
            file.write(start + b"\0" * (-len(start) % ALIGNMENT))
        left = list(tensor_infos)
        for name, content in names_and_bytes:
            if not left or (left[0].name, left[0].nbytes) != (name, content.numel()):
                raise ValueError(f"tensor {short_repr(name)} of {content.numel()} bytes came, and not {left[:1]}")
            del left[0]
            with write_errors_with_path(path):
                file.write(content.numpy().data)
                file.write(b"\0" * (-content.numel() % ALIGNMENT))
            # Before the next one is made
            del content
        if left:
            raise ValueError(f"{len(left)} tensors did not come, the first of them {short_repr(left[0].name)}")
