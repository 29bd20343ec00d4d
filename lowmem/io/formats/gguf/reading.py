"""Reads the weights of GGUF files in chunks of rows: neither a file nor a dequantized copy becomes resident."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import refusing, show
from lowmem.io.atomic import open_regular, read_into
from lowmem.io.formats.codes import encoding_of, quantized
from lowmem.io.formats.foreign import ForeignTensor, Kept
from lowmem.io.formats.gguf.blocks import BLOCKS, BlockType
from lowmem.io.formats.gguf.container import GGUFHeader, Placed, read_header
from lowmem.io.formats.gguf.names import Names, names_of
from lowmem.nn.forms import CodedForm
from lowmem.quant.backend import Weight
from lowmem.quant.formats import get_format
from lowmem.quant.packing import code_bytes

CHUNK_BYTES = 2**20  # of a file, that are decoded at a time


@dataclass(frozen=True)
class _Values:
    """The values of a tensor of a file."""

    path: Path
    file: BufferedReader
    tensor: Placed
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
        buffer = torch.empty(min(step, self.rows) * width, dtype=torch.uint8, device="cpu")
        for start in range(0, self.rows, step):
            part = slice(start, min(start + step, self.rows))
            raw = buffer[: (part.stop - start) * width]
            begin, name = self.tensor.begin + start * width, show(self.tensor.name)
            read_into(self.path, self.file, begin, raw.numpy().data, f", in tensor {name}")
            yield part, raw.view(part.stop - start, -1, self.block.nbytes)

    def kept(self) -> Kept:
        """Return the smallest form that holds the codes, scales and offsets."""
        assert self.block.format
        _, scales, offsets = self.parts(with_codes=False)
        size = self.columns // scales.shape[1]
        return CodedForm(self.block.format, size, encoding_of(scales, offsets), "imported")

    def parts(self, with_codes: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the packed codes, or nothing, and in float32 the scales and the offsets (rows, blocks), or None."""
        block = self.block
        assert block.packed
        assert block.format
        width = code_bytes(self.columns, get_format(block.format).bits)
        packed = torch.empty(self.rows if with_codes else 0, width, dtype=torch.uint8, device="cpu")
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
        out = torch.empty(self.rows, self.columns, dtype=self.block.dtype, device="cpu")
        for rows, raw in self.chunks():
            out[rows] = self.block.dense(raw).flatten(1)
        out = out.view(self.tensor.shape)
        return out if self.order is None else out[self.order]


def read_gguf(path: Path) -> tuple[BufferedReader, list[ForeignTensor], list[str]]:
    """Open a file, as ``Foreign.open`` says; tensors that the model computes itself are left out."""
    file = open_regular(path)
    try:
        header = read_header(path, file)
        with refusing(path):
            tensors, left_out = _tensors(path, file, header, names_of(header.metadata))
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


def _foreign(path: Path, file: BufferedReader, tensor: Placed, name: str, names: Names) -> ForeignTensor:
    block = BLOCKS.get(tensor.type)
    if block is None or block.refusal is not None:
        kind = f"type {tensor.type}" if block is None else block.name
        why = "lowmem does not know this type; take the model's Q4_K_M, Q4_0, Q8_0 or F16 file"
        return ForeignTensor.refused(name, tensor.shape, kind, tensor.nbytes, (block and block.refusal) or why)
    has_rows = len(tensor.shape) > 1
    if block.dense is None and not has_rows:
        why = "a vector has no rows of blocks; take the model's F16 file"
        return ForeignTensor.refused(name, tensor.shape, block.name, tensor.nbytes, why)
    order = names.row_order(tensor.name, tensor.shape[0]) if len(tensor.shape) < 3 else None
    values = _Values(path, file, tensor, block, order)
    if block.format is None or not has_rows:
        return ForeignTensor(name, tensor.shape, block.name, tensor.nbytes, values.dense, lambda: block.dtype)
    return ForeignTensor(name, tensor.shape, block.name, tensor.nbytes, values.read, values.kept)
