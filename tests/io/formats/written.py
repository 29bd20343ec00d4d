"""Writes files of other programs as their formats say, whatever the programs would refuse."""

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lowmem.errors import FileError
from lowmem.io.formats.gguf.gguf_file import GGUFHeader, read_gguf_header
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.formats.quantized_folder_export import PackedWeight
from lowmem.quant.tensor import QuantizedTensor


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> bytes:
    """Return the type and the bytes of a metadata value; ``bytes`` stand for both as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    items = [typed(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def gguf(
    metadata: dict[str, Any],
    tensors: Sequence[tuple[str, Sequence[int], int, int]] = (),
    data: bytes = b"",
    version: int = 3,
) -> bytes:
    """Return a file of tensors (name, shape with the row's length last, type, offset)."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(text(key) + typed(value) for key, value in metadata.items())
    for name, shape, kind, offset in tensors:
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", kind, offset)
    return header + b"\0" * (-len(header) % 32) + data


def header_of(path: Path) -> GGUFHeader:
    with open(path, "rb") as file:
        return read_gguf_header(path, file)


QWEN = {"general.architecture": "qwen2"}
LLAMA = {"general.architecture": "llama", "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}


def words(codes: torch.Tensor) -> torch.Tensor:
    """Pack eight 4-bit numbers of the last dimension into an int32, the first in the lowest bits."""
    eight = codes.long().unflatten(-1, (-1, 8))
    packed = sum(eight[..., place] << 4 * place for place in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


@contextmanager
def opened(folder: Path, parts: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Iterator[Any]:
    """Write a folder of these tensors and this ``quantization_config``, and open it."""
    save_file(parts, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({} if config is None else {"quantization_config": config}))
    with open_foreign_checkpoint(folder) as file:
        yield file


def read_all(path: Path) -> str | None:
    """Read a file or folder and all of its weights, none larger than its files allow; return its error, if any."""
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    try:
        with open_foreign_checkpoint(path) as file:
            for tensor in file.tensors.values():
                assert tensor.nbytes <= size
                if tensor.refusal is None:
                    weight = tensor.read()
                    assert weight.nbytes <= 16 * size
                elif tensor.values is not None:
                    assert tensor.values().nbytes <= 16 * size
    except FileError as error:
        shown = str(error)
    else:
        return None
    assert shown.isprintable()
    assert len(shown) < 1000
    return shown


def as_read(packed: PackedWeight, path: Path) -> QuantizedTensor:
    """Return what lowmem's reader makes of a packed layer."""
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in packed.parts.items()}, path)
    with open_foreign_checkpoint(path) as file:
        assert list(file.tensors) == ["layer.weight"]
        weight = file.tensors["layer.weight"].read()
    assert isinstance(weight, QuantizedTensor)
    return weight


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@st.composite
def sizes(draw, multiple: int, most: int = 6):
    """Draw the columns and the block size of a weight whose blocks are whole multiples of ``multiple``, or rows."""
    columns = multiple * draw(st.integers(1, most))
    block = multiple * draw(st.integers(1, 2 * most))
    return columns, block
