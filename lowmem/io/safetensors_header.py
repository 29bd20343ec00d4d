"""The header of a safetensors file: names, dtypes, shapes and offsets of its tensors.

A file is the length of the header (8 bytes, little-endian), the header (a JSON object), and the tensors' bytes
(https://github.com/huggingface/safetensors#format)::

    {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the header. The tensors fill the rest of the file without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowmem.errors import file_error, printable_line, short_repr
from lowmem.io.filesystem import open_regular_file, read_errors_with_path

MAX_HEADER = 16 * 2**20
"""Largest header that is read, in bytes; a header has about 100 per tensor."""

# Bytes, of the start of the tensors
ALIGNMENT = 64
MAX_DIMS = 64  # of a tensor in torch

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

# First bytes of files of other kinds, the kind, and the remedy.
OTHERS = (
    (b"PK\x03\x04", "a torch.save file or another zip", "save its state_dict as safetensors"),
    (b"\x80", "a pickle or an old torch.save file", "save its state_dict as safetensors"),
    (b"GGUF", "a GGUF file", "take the model's safetensors files"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file it stands for with git lfs pull"),
)


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and shape of a tensor.

    Raises:
        ValueError: a dtype that safetensors cannot store, or a shape that no tensor can have.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in CODES:
            raise ValueError(f"dtype={self.dtype} cannot be stored; convert the tensor to one of {', '.join(DTYPES)}")
        if len(self.shape) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in self.shape):
            raise ValueError(f"shape={short_repr(self.shape)} must be at most {MAX_DIMS} sizes that are 0 or more")
        # Sizes of 0 are skipped, since torch computes strides from the others.
        if math.prod(max(size, 1) for size in self.shape) * self.dtype.itemsize >= 2**63:
            raise ValueError(f"shape={short_repr(self.shape)} is more than any memory holds; make it smaller")

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> TensorSpec:
        """Return the dtype and shape of ``tensor``."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's spec, and ``begin``, the offset of its first byte from the end of the header."""

    spec: TensorSpec
    begin: int


def specs_and_offsets_in_file_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorEntry]:
    """Return each tensor's offset, in the order of the file.

    Sorted by the largest power of two that divides the bytes of a tensor, largest first, then by name. Each tensor is
    then aligned without gaps, also the bytes of scales, which are read as floats.
    """
    placed = {}
    begin = 0
    for name in sorted(specs, key=lambda name: (-(specs[name].nbytes & -specs[name].nbytes), name)):
        placed[name] = TensorEntry(specs[name], begin)
        begin += specs[name].nbytes
    return placed


def encode_header_with_length(metadata: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the length and header of a file, padded so that the tensors begin at a multiple of ``ALIGNMENT``.

    Raises:
        ValueError: a name is reserved or cannot be stored, or there are too many tensors.
    """
    content: dict[str, object] = {"__metadata__": metadata}
    for name, placed in specs_and_offsets_in_file_order(specs).items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"a tensor cannot be called {short_repr(name)} in a safetensors file; rename it")
        content[name] = {
            "dtype": CODES[placed.spec.dtype],
            "shape": placed.spec.shape,
            "data_offsets": [placed.begin, placed.begin + placed.spec.nbytes],
        }
    try:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as reason:
        raise ValueError(
            f"text={short_repr(reason.object[reason.start :])} is no Unicode; rename the tensor"
        ) from reason
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header takes {len(text)} bytes, more than {MAX_HEADER}; store fewer tensors in a file")
    return len(text).to_bytes(8, "little") + text


def read_header_json(path: Path, file: BufferedReader) -> bytes:
    """Return the JSON text of a file's header.

    Raises:
        FileError: it is no safetensors file, or is truncated; the error names some other kinds of files.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = file.read(32)
    length = int.from_bytes(begin[:8], "little")
    possible = begin[8:9] == b"{" and length <= MAX_HEADER
    if possible and length <= size - 8:
        file.seek(8)
        return file.read(length)
    for magic, kind, remedy in OTHERS:
        if begin.startswith(magic):
            raise file_error(path, f"it is {kind}: lowmem reads safetensors only, and executed nothing; {remedy}")
    if size == 0:
        raise file_error(path, "it is empty; get it again")
    if possible:
        raise file_error(
            path, f"it is damaged: its header takes {length} bytes, and it ends after {size}; get it again"
        )
    raise file_error(path, "it is no safetensors file, or is damaged; name a safetensors file, or get it again")


def check_size_and_read_file(path: Path, max_bytes: int, kind: str) -> bytes:
    """Read a whole file, for which no more memory is allocated than it takes.

    Args:
        path: of the file.
        max_bytes: the most bytes that it may take.
        kind: of files, for the error.

    Raises:
        FileError: it takes more.
        OSError: it is no regular file, or cannot be read.
    """
    with open_regular_file(path) as file, read_errors_with_path(path):
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise file_error(path, f"it takes more than {max_bytes} bytes, which no {kind} does; name another file")
        return file.read(size)


def parse_metadata_and_entries(header_json: bytes, data_size: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Parse a header: the metadata and the tensors, which must fill the ``data_size`` bytes after it exactly.

    Raises:
        ValueError: the header is invalid; the message is short, whatever the header holds.
    """
    content = parse_strict_json(header_json)
    if not isinstance(content, dict):
        _refuse_invalid_value("the header", content)
    metadata = content.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _refuse_invalid_value("the metadata", metadata)
    tensors = {name: _parse_tensor_entry(name, entry) for name, entry in content.items()}
    end = 0
    # The number of bytes sorts empty tensors before the one with the same offset.
    for name, placed in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].spec.nbytes)):
        if placed.begin != end:
            kind = "a gap" if placed.begin > end else "an overlap"
            raise ValueError(f"tensor {short_repr(name)} begins at {placed.begin}, not at {end}: there is {kind}")
        end += placed.spec.nbytes
    if end != data_size:
        raise ValueError(f"the tensors take {end} bytes, and {data_size} are there")
    return metadata, tensors


def parse_strict_json(text: bytes | str) -> Any:
    """Parse strict JSON: no duplicate names, NaN, lone surrogates or very long numbers.

    Raises:
        ValueError: the text is something else.
    """
    try:
        text = (text.encode() if isinstance(text, str) else text).decode()
        content = json.loads(
            text,
            object_pairs_hook=_dict_refusing_duplicate_keys,
            parse_int=_parse_integer_up_to_20_digits,
            parse_float=_parse_finite_json_float,
            parse_constant=_refuse_nan_or_infinity,
        )
        if "\\u" in text:
            # Finds escaped lone surrogates
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except UnicodeError:
        raise ValueError("the JSON is no UTF-8") from None
    except json.JSONDecodeError as reason:
        raise ValueError(f"the JSON is broken at character {reason.pos}: {reason.msg}") from None
    return content


def _parse_tensor_entry(name: str, entry: object) -> TensorEntry:
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        _refuse_invalid_value(f"tensor {short_repr(name)}", entry)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(code, str) and code in DTYPES):
        raise ValueError(
            f"tensor {short_repr(name)} has dtype {short_repr(code)}, which is none of {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list):
        _refuse_invalid_value(f"the shape of tensor {short_repr(name)}", shape)
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)):
        _refuse_invalid_value(f"the place of tensor {short_repr(name)}", offsets)
    try:
        spec = TensorSpec(DTYPES[code], tuple(shape))
    except ValueError as reason:
        raise ValueError(f"tensor {short_repr(name)}: {reason}") from None
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise ValueError(f"tensor {short_repr(name)} has {end - begin} bytes, and its shape takes {spec.nbytes}")
    return TensorEntry(spec, begin)


def _refuse_invalid_value(description: str, value: object) -> NoReturn:
    raise ValueError(f"{description} is {short_repr(value)}")


def _dict_refusing_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("the JSON has a name twice")
    return content


def _parse_integer_up_to_20_digits(digits: str) -> int:
    # Long ones are slow to parse, and Python rejects some
    if len(digits) > 20:
        raise ValueError(f"the JSON has a number of {len(digits)} digits")
    return int(digits)


def _parse_finite_json_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the JSON has a number that is too large: {printable_line(text, 30)}")
    return number


def _refuse_nan_or_infinity(name: str) -> NoReturn:
    raise ValueError(f"the JSON has a {name}")
