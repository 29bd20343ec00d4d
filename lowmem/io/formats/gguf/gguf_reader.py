"""Reads the weights of GGUF files in chunks of rows: neither a file nor a dequantized copy becomes resident."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import short_repr, value_errors_as_file_errors
from lowmem.io.filesystem import open_regular_file, read_exactly_into
from lowmem.io.formats.code_conversion import imported_quantized_tensor, smallest_exact_scale_encoding
from lowmem.io.formats.foreign_format import LazyForeignTensor, StorageForm
from lowmem.io.formats.gguf.gguf_block_types import BLOCKS, GGUFBlockType
from lowmem.io.formats.gguf.gguf_file import GGUFHeader, GGUFTensorInfo, read_gguf_header
from lowmem.io.formats.gguf.gguf_tensor_names import GGUFTransformersNameMap, tensor_name_map_from_metadata
from lowmem.nn.forms import CodedForm
from lowmem.quant.backend import Weight
from lowmem.quant.formats import get_format

CHUNK_BYTES = 2**20  # of a file, that are decoded at a time


@dataclass(frozen=True)
class _GGUFTensorReader:
    """The values of a tensor of a file."""

    path: Path
    file: BufferedReader
    tensor: GGUFTensorInfo
    block: GGUFBlockType
    order: Tensor | None
    """The rows of the file in the order of the model; None: as they are."""
    shift: float = 0.0
    """What dense values of the file are more than those of the model."""

    @property
    def columns(self) -> int:
        return self.tensor.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.tensor.shape[:-1])

    def iterate_row_slices_and_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of rows and their blocks, uint8 (rows, blocks, bytes)."""
        width = self.columns // self.block.size * self.block.nbytes
        step = max(1, CHUNK_BYTES // width)
        buffer = torch.empty(min(step, self.rows) * width, dtype=torch.uint8, device="cpu")
        for start in range(0, self.rows, step):
            part = slice(start, min(start + step, self.rows))
            raw = buffer[: (part.stop - start) * width]
            begin, name = self.tensor.begin + start * width, short_repr(self.tensor.name)
            read_exactly_into(self.path, self.file, begin, raw.numpy().data, f", in tensor {name}")
            yield part, raw.view(part.stop - start, -1, self.block.nbytes)

    def read_smallest_storage_form(self) -> StorageForm:
        """Return the smallest form that holds the codes, scales and offsets."""
        assert self.block.format
        _, scales, offsets = self.read_codes_scales_and_offsets(with_codes=False)
        size = self.columns // scales.shape[1]
        return CodedForm(self.block.format, size, smallest_exact_scale_encoding(scales, offsets), "imported")

    def read_codes_scales_and_offsets(self, with_codes: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the packed codes, or nothing, and in float32 the scales and the offsets (rows, blocks), or None."""
        block = self.block
        assert block.packed
        assert block.format
        width = get_format(block.format).width.row_bytes(self.columns)
        packed = torch.empty(self.rows if with_codes else 0, width, dtype=torch.uint8, device="cpu")
        scales, offsets = [], []
        for rows, raw in self.iterate_row_slices_and_blocks():
            if with_codes:
                packed[rows] = block.packed(raw).flatten(1)
            scales.append(block.decoded_block_scales(raw).flatten(1))
            if block.offsets:
                offsets.append(block.offsets(raw).flatten(1))
        return packed, torch.cat(scales), torch.cat(offsets) if offsets else None

    def read_quantized(self) -> Weight:
        """Return the codes and scales as a quantized tensor."""
        assert self.block.format
        lead = self.tensor.shape[:-1]
        parts = [
            part if part is None or self.order is None else part[self.order]
            for part in self.read_codes_scales_and_offsets()
        ]
        packed, scales, offsets = (part if part is None else part.view(*lead, -1) for part in parts)
        assert packed is not None
        assert scales is not None
        size = self.columns // scales.shape[-1]
        return imported_quantized_tensor(packed, scales, self.tensor.shape, self.block.format, size, offsets)

    def read_dense(self) -> Tensor:
        """Return the weights in the dtype that holds them."""
        assert self.block.dense
        out = torch.empty(self.rows, self.columns, dtype=self.block.dtype, device="cpu")
        for rows, raw in self.iterate_row_slices_and_blocks():
            out[rows] = self.block.dense(raw).flatten(1)
        out = out.view(self.tensor.shape)
        # In float32, in which one less and one more are exact
        out = out.float() - self.shift if self.shift else out
        return out if self.order is None else out[self.order]


def open_gguf_and_list_tensors(path: Path) -> tuple[BufferedReader, list[LazyForeignTensor], list[str]]:
    """Open a file, as ``Foreign.open`` says; tensors that the model computes itself are left out."""
    file = open_regular_file(path)
    try:
        header = read_gguf_header(path, file)
        with value_errors_as_file_errors(path):
            tensors, left_out = _foreign_tensors_and_left_out_names(
                path, file, header, tensor_name_map_from_metadata(header.metadata)
            )
    except BaseException:
        file.close()
        raise
    return file, tensors, left_out


def _foreign_tensors_and_left_out_names(
    path: Path, file: BufferedReader, header: GGUFHeader, names: GGUFTransformersNameMap
) -> tuple[list[LazyForeignTensor], list[str]]:
    foreign_tensors: dict[str, LazyForeignTensor] = {}
    left_out = []
    for tensor in header.tensors.values():
        name = names.transformers_name_or_none(tensor.name)
        if name is None:
            left_out.append(tensor.name)
            continue
        if name in foreign_tensors:
            raise ValueError(f"two of its tensors are {short_repr(name)} in the model; get it again")
        foreign_tensors[name] = _exact_or_refused_gguf_tensor(path, file, tensor, name, names)
    if not foreign_tensors:
        raise ValueError("it holds no tensors; name a model that has some")
    return list(foreign_tensors.values()), left_out


def _exact_or_refused_gguf_tensor(
    path: Path, file: BufferedReader, tensor_info: GGUFTensorInfo, model_name: str, names: GGUFTransformersNameMap
) -> LazyForeignTensor:
    block = BLOCKS.get(tensor_info.type)
    if block is None or block.refusal is not None:
        kind = f"type {tensor_info.type}" if block is None else block.name
        why = "lowmem does not know this type; take the model's Q4_K_M, Q4_0, Q8_0 or F16 file"
        return LazyForeignTensor.with_refusal(
            model_name, tensor_info.shape, kind, tensor_info.nbytes, (block and block.refusal) or why
        )
    has_rows = len(tensor_info.shape) > 1
    if block.dense is None and not has_rows:
        why = "a vector has no rows of blocks; take the model's F16 file"
        return LazyForeignTensor.with_refusal(model_name, tensor_info.shape, block.name, tensor_info.nbytes, why)
    order = (
        names.file_rows_in_model_order_or_none(tensor_info.name, tensor_info.shape[0])
        if len(tensor_info.shape) < 3
        else None
    )
    shift = names.value_shift(tensor_info.name)
    values = _GGUFTensorReader(path, file, tensor_info, block, order, shift)
    if block.format is None or not has_rows:
        dtype = torch.float32 if shift else block.dtype
        return LazyForeignTensor(
            model_name, tensor_info.shape, block.name, tensor_info.nbytes, values.read_dense, lambda: dtype
        )
    return LazyForeignTensor(
        model_name,
        tensor_info.shape,
        block.name,
        tensor_info.nbytes,
        values.read_quantized,
        values.read_smallest_storage_form,
    )
