"""GGUF, the files of llama.cpp and ggml: version 2 and 3, little-endian.

The header is read once, in small pieces: its metadata, and name, shape, type and offset of each tensor. Values are
read from the file in chunks of rows when they are asked for, so that neither the file nor a dequantized copy of it
becomes resident. The layout is that of ``docs/gguf.md`` of ggml.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import refusal, show
from lowmem.io.atomic import open_regular, read_errors
from lowmem.io.formats.foreign_tensor import ForeignTensor, Kept, encoding_of, quantized
from lowmem.io.formats.gguf.blocks import BLOCKS, BlockType
from lowmem.io.formats.gguf.names import Names, names_of
from lowmem.nn.stored import FourBitForm
from lowmem.quant.backend import Weight

__all__ = ["MAGIC", "GGUFHeader", "GGUFTensor", "read_gguf", "read_header"]

MAGIC = b"GGUF"

MAX_HEADER = 2**28  # bytes; a vocabulary of 256,000 tokens takes 10 MB
MAX_ITEMS = 2**22  # strings, and values of nested arrays, that are stepped over one by one: a second
MAX_TENSORS = 2**17
MAX_KEPT = 2**16  # numbers of an array, or bytes of a text, that are kept; longer ones are stepped over
MAX_NAME = 2**10  # bytes; ggml takes 64
MAX_NESTED = 4  # arrays in arrays
MAX_ALIGNMENT = 2**20

WINDOW = 2**16  # bytes of a header that are read at a time
CHUNK_BYTES = 2**20  # of a file, that are decoded at a time

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALLEST_KEY, _SMALLEST_TENSOR = 13, 32  # bytes of an entry, with an empty text and of one dimension


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: ``shape`` has the rows' length last, and ``begin`` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    nbytes: int | None
    """None: the type is unknown, and so is the size."""


@dataclass(frozen=True)
class GGUFHeader:
    """The header: numbers, short texts and short arrays of numbers of the metadata, and the tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
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
    """Read and check the header of a file.

    Raises:
        FileError: it is no GGUF file that lowmem reads, is cut, or contradicts itself.
        OSError: the file cannot be read.
    """
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


def _placed(name: str, entry: tuple[tuple[int, ...], int, int], start: int, alignment: int, size: int) -> GGUFTensor:
    shape, kind, offset = entry
    if offset % alignment or start + offset > size:
        raise ValueError(f"tensor {show(name)} lies at {offset}, which is unaligned or beyond the end of the file")
    if 0 in shape:
        raise ValueError(f"tensor {show(name)} has the shape {show(shape)}, which holds nothing")
    block = BLOCKS.get(kind)
    if block is None:
        return GGUFTensor(name, shape, kind, start + offset, None)
    if shape[-1] % block.size:
        raise ValueError(f"tensor {show(name)} has rows of {shape[-1]}, no multiple of {block.size} in {block.name}")
    nbytes = math.prod(shape) // block.size * block.nbytes
    if nbytes > size - start - offset:
        raise ValueError(f"tensor {show(name)} takes {nbytes} bytes at {start + offset}, and the file has {size}")
    return GGUFTensor(name, shape, kind, start + offset, nbytes)


def _check_apart(tensors: Any) -> None:
    end, last = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        if tensor.begin < end:
            raise ValueError(f"tensors {show(last)} and {show(tensor.name)} lie on the same bytes")
        end, last = tensor.begin + (tensor.nbytes or 1), tensor.name


@dataclass(frozen=True)
class _Values:
    """The values of a tensor, read from the file."""

    path: Path
    file: BufferedReader
    tensor: GGUFTensor
    block: BlockType
    order: Tensor | None
    """The rows of the file in the order of the model; None: as they are."""

    @property
    def columns(self) -> int:
        return self.tensor.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.tensor.shape[:-1])

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of rows and their blocks, uint8 (rows, blocks, bytes)."""
        width = self.columns // self.block.size * self.block.nbytes
        step = max(1, CHUNK_BYTES // width)
        buffer = torch.empty(min(step, self.rows) * width, dtype=torch.uint8)
        for start in range(0, self.rows, step):
            part = slice(start, min(start + step, self.rows))
            raw = buffer[: (part.stop - start) * width]
            with read_errors(self.path):
                self.file.seek(self.tensor.begin + start * width)
                count = self.file.readinto(raw.numpy().data)
            if count != len(raw):
                why = f"it was cut after it was opened, in tensor {show(self.tensor.name)}; get it again"
                raise refusal(self.path, why)
            yield part, raw.view(part.stop - start, -1, self.block.nbytes)

    def kept(self) -> Kept:
        """Return the smallest form that holds the codes, scales and offsets."""
        assert self.block.format
        _, scales, offsets = self.parts(with_codes=False)
        size = self.columns // scales.shape[1]
        return FourBitForm(self.block.format, size, encoding_of(scales, offsets), "imported")

    def parts(self, with_codes: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the packed codes, or nothing, and in float32 the scales and the offsets (rows, blocks), or None."""
        block = self.block
        assert block.packed
        assert block.scales
        packed = torch.empty(self.rows if with_codes else 0, self.columns // 2, dtype=torch.uint8)
        scales, offsets = [], []
        for rows, raw in self.chunks():
            if with_codes:
                packed[rows] = block.packed(raw).flatten(1)
            scales.append(block.scales(raw).flatten(1))
            if block.offsets:
                offsets.append(block.offsets(raw).flatten(1))
        return packed, torch.cat(scales), torch.cat(offsets) if offsets else None

    def read(self) -> Weight:
        """Return the codes and scales as a quantized tensor."""
        assert self.block.format
        lead = self.tensor.shape[:-1]
        parts = [part if part is None or self.order is None else part[self.order] for part in self.parts()]
        packed, scales, offsets = (part if part is None else part.view(*lead, -1) for part in parts)
        assert packed is not None
        assert scales is not None
        size = self.columns // scales.shape[-1]
        return quantized(packed, scales, self.tensor.shape, self.block.format, size, offsets)

    def dense(self) -> Tensor:
        """Return the weights in the dtype that holds them."""
        assert self.block.dense
        out: Tensor | None = None
        for rows, raw in self.chunks():
            values = self.block.dense(raw).flatten(1)
            if out is None:
                out = torch.empty(self.rows, self.columns, dtype=values.dtype)
            out[rows] = values
        assert out is not None
        out = out.view(self.tensor.shape)
        return out if self.order is None else out[self.order]


_DENSE = {"F16": torch.float16, "BF16": torch.bfloat16}


def read_gguf(path: Path) -> tuple[BufferedReader, list[ForeignTensor], list[str]]:
    """Open a file.

    Returns:
        The open file, which the tensors read from; its tensors under the names of the Hugging Face model; and the
        names of those that are left out, since the model computes them itself.

    Raises:
        FileError: it is damaged, or a model whose names lowmem does not know.
        OSError: the file cannot be read.
    """
    file = open_regular(path)
    try:
        header = read_header(path, file)
        try:
            names = names_of(header.metadata)
            tensors, left_out = _tensors(path, file, header, names)
        except ValueError as reason:
            raise refusal(path, str(reason)) from None
    except BaseException:
        file.close()
        raise
    return file, tensors, left_out


def _tensors(
    path: Path, file: BufferedReader, header: GGUFHeader, names: Names
) -> tuple[list[ForeignTensor], list[str]]:
    found: dict[str, ForeignTensor] = {}
    left_out = []
    for tensor in header.tensors.values():
        name = names.model_name(tensor.name)
        if name is None:
            left_out.append(tensor.name)
            continue
        if name in found:
            raise ValueError(f"two of its tensors are {show(name)} in the model; get it again")
        found[name] = _foreign(path, file, tensor, name, names)
    if not found:
        raise ValueError("it holds no tensors; name a model that has some")
    return list(found.values()), left_out


def _foreign(path: Path, file: BufferedReader, tensor: GGUFTensor, name: str, names: Names) -> ForeignTensor:
    block = BLOCKS.get(tensor.type)
    if block is None or block.refusal is not None:
        kind = f"type {tensor.type}" if block is None else block.name
        why = "lowmem does not know this type; take the model's Q4_K_M, Q4_0, Q8_0 or F16 file"
        return ForeignTensor.refused(name, tensor.shape, kind, tensor.nbytes or 0, (block and block.refusal) or why)
    if block.format is not None and len(tensor.shape) == 1:
        why = "a vector has no rows of blocks; take the model's F16 file"
        return ForeignTensor.refused(name, tensor.shape, block.name, tensor.nbytes or 0, why)
    order = names.row_order(tensor.name, tensor.shape[0]) if len(tensor.shape) < 3 else None
    values = _Values(path, file, tensor, block, order)
    if block.format is None:
        dtype = _DENSE.get(block.name, torch.float32)
        return ForeignTensor(name, tensor.shape, block.name, tensor.nbytes or 0, lambda: dtype, values.dense)
    return ForeignTensor(name, tensor.shape, block.name, tensor.nbytes or 0, values.kept, values.read)
