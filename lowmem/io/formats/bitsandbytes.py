"""Weights in nf4 and fp4 of bitsandbytes, as transformers saves them.

``<weight>`` holds the codes, two in a byte, the first of them high. Beside it lie ``.absmax``, one float32 scale for
each block of the flattened weight, ``.quant_map``, the levels by code, and ``.quant_state.bitsandbytes__nf4``, JSON
in bytes. Doubly quantized scales are ``nested_quant_map[absmax] * nested_absmax + nested_offset``, with one
``nested_absmax`` for each 256.

Written scales are float32, one for each block, without double quantization. Blocks of bitsandbytes run over the
flattened weight: they are those of lowmem, or parts of them, wherever a size that bitsandbytes knows divides both the
blocks and the rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import short_repr
from lowmem.io.formats.code_conversion import (
    float32_scales_for_smaller_blocks,
    imported_quantized_tensor,
    largest_block_size_dividing_rows,
    largest_dividing_block_size,
    unpacked_codes,
    unpacked_nibbles,
)
from lowmem.io.formats.foreign_format import ExportTarget, ForeignFormat, LazyForeignTensor, exact_match_predicate
from lowmem.io.formats.quantized_folder_export import PackedWeight, PackingFormat, export_quantized_folder
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.io.safetensors_header import parse_strict_json
from lowmem.nn.techniques import FourBit
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack as pack_codes
from lowmem.quant.tensor import QuantizedTensor

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = {"nf4": "nf4", "fp4": "bnb_fp4"}
# Bytes of JSON
MAX_STATE = 2**16

BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
"""The block sizes of bitsandbytes."""

_KINDS = {format: kind for kind, format in _FORMATS.items()}
# The codes of lowmem by those of bitsandbytes
_ORDER = {
    "nf4": tuple(range(16)),
    "fp4": (7, 9, 14, 15, 12, 13, 10, 11, 8, 6, 1, 0, 3, 2, 5, 4),
}


def iterate_weights_and_tensor_names(
    checkpoint: SafetensorsCheckpoint, config: Mapping[str, Any]
) -> Iterator[tuple[LazyForeignTensor, set[str]]]:
    """Yield each weight of a checkpoint that bitsandbytes quantized, and the names of its tensors."""
    for name in checkpoint.specs:
        weight, separator, kind = name.partition(_STATE)
        if separator:
            stored = _QuantizedWeightReader(checkpoint, weight, kind)
            yield stored.exact_or_refused_foreign_tensor(), stored.tensor_names


def _read_checked_quant_state(checkpoint: SafetensorsCheckpoint, weight_name: str, quant_type: str) -> dict[str, Any]:
    spec = checkpoint.specs[weight_name + _STATE + quant_type]
    if quant_type not in _FORMATS:
        raise ValueError(
            f"{short_repr(weight_name)} is stored as {short_repr(quant_type)} by bitsandbytes; {', '.join(_FORMATS)} "
            "are known"
        )
    if spec.dtype != torch.uint8 or spec.nbytes > MAX_STATE:
        raise ValueError(f"the quant_state of {short_repr(weight_name)} is {spec}, no JSON in bytes; get it again")
    state = parse_strict_json(checkpoint.read_tensor(weight_name + _STATE + quant_type).numpy().tobytes())
    shape, size = (state.get(key) if isinstance(state, dict) else None for key in ("shape", "blocksize"))
    sizes = shape if isinstance(shape, list) and shape else [0]
    nested = state.get("nested_blocksize", 256) if isinstance(state, dict) else None
    for number in (*sizes, size, nested):
        if type(number) is not int or not 1 <= number < 2**63:
            raise ValueError(f"the quant_state of {short_repr(weight_name)} is {short_repr(state)}; get it again")
    if type(state.get("nested_offset", 0.0)) not in (int, float):
        raise ValueError(
            f"nested_offset={short_repr(state['nested_offset'])} of {short_repr(weight_name)} must be a number; get "
            "it again"
        )
    return dict(state)


class _QuantizedWeightReader:
    """One weight of a checkpoint, of the shape and in the blocks that its state says; a ValueError if parts lack."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, name: str, quant_type: str) -> None:
        self.checkpoint, self.name, self.kind = checkpoint, name, quant_type
        self.state = _read_checked_quant_state(checkpoint, name, quant_type)
        self.shape, self.block = tuple(self.state["shape"]), self.state["blocksize"]
        self.count, self.is_nested = math.prod(self.shape), "nested_blocksize" in self.state
        parts = ["", ".absmax", ".quant_map", _STATE + quant_type]
        self.tensor_names = {name + part for part in parts + [".nested_absmax", ".nested_quant_map"] * self.is_nested}
        if missing := self.tensor_names - checkpoint.specs.keys():
            raise ValueError(
                f"the weight {short_repr(name)} of bitsandbytes lacks {short_repr(min(missing))}; get it again"
            )
        if checkpoint.specs[name].nbytes != -(-self.count // 2):
            raise ValueError(
                f"{short_repr(name)} takes {checkpoint.specs[name].nbytes} bytes, which do not fit "
                f"{short_repr(self.shape)}"
            )

    def exact_or_refused_foreign_tensor(self) -> LazyForeignTensor:
        label = f"bitsandbytes {self.kind}{' (double)' if self.is_nested else ''}"
        nbytes = sum(self.checkpoint.specs[tensor_name].nbytes for tensor_name in self.tensor_names)
        try:
            size = self.checked_block_size_within_rows()
        except ValueError as reason:
            return LazyForeignTensor.with_refusal(
                self.name, self.shape, label, nbytes, str(reason), self.read_float32_values
            )
        return LazyForeignTensor(self.name, self.shape, label, nbytes, partial(self.read_quantized, size))

    def checked_block_size_within_rows(self) -> int:
        """Return the block size in which single rows have the same scales; a ValueError if there is none."""
        file_block_size, columns = self.block, self.shape[-1]
        common = math.gcd(file_block_size, columns)
        # One block, or whole blocks in each row
        if file_block_size >= self.count or file_block_size == common:
            return largest_dividing_block_size(file_block_size, columns)
        try:
            return largest_dividing_block_size(common, columns)
        except ValueError:
            raise ValueError(
                f"blocks of {file_block_size} run over the ends of rows of {columns}, and have no common divisor "
                "with them that "
                "is an even number from 8 on"
            ) from None

    def read_checked_flat_tensor(self, name_suffix: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return one of the weight's tensors, flattened."""
        spec = self.checkpoint.specs[self.name + name_suffix]
        if spec.dtype != dtype or math.prod(spec.shape) != count:
            hint = "; it was saved after a forward, which changes it: save before" if name_suffix == ".absmax" else ""
            raise ValueError(
                f"{short_repr(self.name + name_suffix)} is {spec}, and {count} of {dtype} are needed{hint}"
            )
        return self.checkpoint.read_tensor(self.name + name_suffix).flatten()

    def read_flat_lowmem_codes(self) -> Tensor:
        """Return lowmem's codes of the flattened weight: uint8 (count,)."""
        raw = self.checkpoint.read_tensor(self.name).flatten().view(torch.uint8)
        # High first
        codes = unpacked_nibbles(raw).view(-1, 2).flip(-1).flatten()[: self.count]
        levels = torch.tensor(get_format(_FORMATS[self.kind]).levels, dtype=torch.float32, device="cpu")
        quant_map = self.read_checked_flat_tensor(".quant_map", torch.float32, 16)
        order = quant_map.argsort(stable=True)
        if not torch.equal(quant_map[order], levels):
            raise ValueError(
                f"{short_repr(self.name)} has other levels than {self.kind} of bitsandbytes: "
                f"{short_repr(quant_map.tolist())}"
            )
        return order.argsort().to(torch.uint8)[codes.int()]

    def read_flat_float32_scales(self) -> Tensor:
        """Return the scale of each block of the flattened weight, in float32."""
        count = -(-self.count // self.block)
        if not self.is_nested:
            return self.read_checked_flat_tensor(".absmax", torch.float32, count)
        steps = self.read_checked_flat_tensor(".absmax", torch.uint8, count)
        size = self.state["nested_blocksize"]
        nested_scales = self.read_checked_flat_tensor(".nested_absmax", torch.float32, -(-count // size))
        table = self.read_checked_flat_tensor(".nested_quant_map", torch.float32, 256)
        numbers = torch.arange(count, dtype=torch.int64, device="cpu")
        # Not repeated: a file may claim any size
        wide = table[steps.int()] * nested_scales[numbers // size]
        return wide + torch.tensor(self.state.get("nested_offset", 0.0), dtype=torch.float32, device="cpu")

    def read_quantized(self, block_size: int) -> QuantizedTensor:
        """Return the weight in blocks of ``block_size``."""
        shape, columns = self.shape, self.shape[-1]
        rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int64, device="cpu")
        starts = rows[:, None] * columns + torch.arange(0, columns, block_size, dtype=torch.int64, device="cpu")
        scales = self.read_flat_float32_scales()[starts // self.block].view(*shape[:-1], -1)
        return imported_quantized_tensor(
            pack_codes(self.read_flat_lowmem_codes().view(shape), block_size),
            scales,
            shape,
            _FORMATS[self.kind],
            block_size,
        )

    def read_float32_values(self) -> Tensor:
        """Return the weight in float32."""
        levels = torch.tensor(get_format(_FORMATS[self.kind]).levels, dtype=torch.float32, device="cpu")
        scales = self.read_flat_float32_scales()[
            torch.arange(self.count, dtype=torch.int64, device="cpu") // self.block
        ]
        return (levels[self.read_flat_lowmem_codes().int()] * scales).view(self.shape)


def pack_exactly(weight: QuantizedTensor, model_dtype: torch.dtype) -> PackedWeight:
    """Return a weight (out, in) as bitsandbytes has it, which dequantizes it to the same bits in ``model_dtype``.

    Raises:
        ValueError: it has other levels, offsets, or blocks that bitsandbytes has not.
    """
    if weight.format not in _KINDS:
        raise ValueError(
            f"its levels are those of {weight.format}, and bitsandbytes has those of {', '.join(_KINDS)}"
        )
    if weight.has_offsets:
        raise ValueError("its blocks have offsets, and those of bitsandbytes have none")
    common = largest_block_size_dividing_rows(weight)
    for size in BLOCKS:
        if common % size == 0:
            return _pack_4bit_in_blocks(weight, size, weight.shape, model_dtype)
    raise ValueError(
        f"rows of {weight.shape[-1]} in blocks of {weight.block_size} have no blocks of {BLOCKS[-1]} to {BLOCKS[0]}"
    )


def _pack_4bit_in_blocks(
    weight: QuantizedTensor, block_size: int, recorded_shape: Sequence[int], model_dtype: torch.dtype
) -> PackedWeight:
    """Return a weight in blocks of ``block_size``, with ``recorded_shape`` noted."""
    kind = _KINDS[weight.format]
    order = torch.tensor(_ORDER[kind], dtype=torch.int64, device="cpu")
    levels = torch.tensor(get_format(weight.format).levels, dtype=torch.float32, device="cpu")
    inverse = order.argsort().to(weight.packed.device, torch.uint8)
    codes = inverse[unpacked_codes(weight).flatten().int()]
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    state = {
        "quant_type": kind,
        "blocksize": block_size,
        "dtype": str(model_dtype).removeprefix("torch."),
        "shape": list(recorded_shape),
    }
    return PackedWeight(
        f"{kind}, blocksize={block_size}",
        {
            "weight": pairs[:, :1] << 4 | pairs[:, 1:],  # the first code high
            "weight.absmax": float32_scales_for_smaller_blocks(weight, block_size).flatten(),
            "weight.quant_map": levels[order],
            f"weight{_STATE}{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu"),
        },
        kind,
    )


def packed_nf4_and_requantized_weight(
    values: Tensor, model_dtype: torch.dtype, stored: QuantizedTensor | None = None
) -> tuple[PackedWeight, Tensor | QuantizedTensor]:
    """Return a weight (out, in) quantized to nf4, and what it has become; nothing of ``stored`` can be kept."""
    columns = values.shape[-1]
    size = next((size for size in (64, 32) if columns % size == 0), 0)
    if size:
        again = _quantized_to_nf4(values, size)
        return pack_exactly(again, model_dtype), again
    # Over the ends of rows, as bitsandbytes itself does it
    flat = _quantized_to_nf4(values.reshape(1, -1), 64)
    packed = _pack_4bit_in_blocks(flat, 64, values.shape, model_dtype)
    return packed, values if values.is_meta else flat.dequantize().view(values.shape)


def _quantized_to_nf4(values: Tensor, block_size: int) -> QuantizedTensor:
    technique = FourBit("nf4", block_size, "float32")
    return technique.skeleton(values) if values.is_meta else technique.store(values)


def _build_4bit_config_of_majority_type(
    quant_type_by_path: Mapping[str, Any], dense_paths: Collection[str], model_dtype: torch.dtype
) -> dict[str, Any]:
    kinds = list(quant_type_by_path.values())
    name = str(model_dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4" if kinds.count("fp4") > kinds.count("nf4") else "nf4",
        "bnb_4bit_compute_dtype": name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": [_skip_path_or_exact_pattern(path, quant_type_by_path) for path in dense_paths],
    }


def _skip_path_or_exact_pattern(path: str, packed_paths: Collection[str]) -> str:
    """Return a pattern of transformers for one dense layer. A name alone takes others that begin or end with it."""
    alike = re.compile(rf"{path}(\.|$)") if re.fullmatch(r"[\w.]+", path) else None
    if alike is None or any(alike.match(other) or other.endswith(path) for other in packed_paths):
        return f"^{re.escape(path)}$"
    return path


PACKING = PackingFormat(
    "bitsandbytes",
    pack_exactly,
    packed_nf4_and_requantized_weight,
    _build_4bit_config_of_majority_type,
    conv1d=True,
    keeps_weight=True,
)

FORMAT = ForeignFormat(
    "bitsandbytes",
    iterate_weights_and_tensor_names,
    ("absmax", "quant_map", "SCB"),
    "bitsandbytes",
    {"load_in_4bit": exact_match_predicate(True), "load_in_8bit": exact_match_predicate(False, None)},
    target=ExportTarget(partial(export_quantized_folder, PACKING)),
)
