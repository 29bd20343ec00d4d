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

from lowmem.errors import show
from lowmem.io.formats.codes import codes_of, fitting_blocks, nibbles, quantized, scales_of, uniform_block
from lowmem.io.formats.foreign import Foreign, ForeignTensor, Target, one_of
from lowmem.io.formats.quantized_folder import Packed, Packing, write_folder
from lowmem.io.safetensors import parse_json
from lowmem.io.source import Source
from lowmem.nn.techniques import FourBit
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack as pack_codes
from lowmem.quant.tensor import QuantizedTensor

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = {"nf4": "nf4", "fp4": "bnb_fp4"}
MAX_STATE = 2**16  # bytes of JSON

BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
"""The block sizes of bitsandbytes."""

_KINDS = {format: kind for kind, format in _FORMATS.items()}
_ORDER = {  # the codes of lowmem by those of bitsandbytes
    "nf4": tuple(range(16)),
    "fp4": (7, 9, 14, 15, 12, 13, 10, 11, 8, 6, 1, 0, 3, 2, 5, 4),
}


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield each weight of a checkpoint that bitsandbytes quantized, and the names of its tensors."""
    for name in source.specs:
        weight, found, kind = name.partition(_STATE)
        if found:
            stored = _Stored(source, weight, kind)
            yield stored.weight(), stored.names


def _state(source: Source, name: str, kind: str) -> dict[str, Any]:
    spec = source.specs[name + _STATE + kind]
    if kind not in _FORMATS:
        raise ValueError(f"{show(name)} is stored as {show(kind)} by bitsandbytes; {', '.join(_FORMATS)} are known")
    if spec.dtype != torch.uint8 or spec.nbytes > MAX_STATE:
        raise ValueError(f"the quant_state of {show(name)} is {spec}, no JSON in bytes; get it again")
    state = parse_json(source.read_tensor(name + _STATE + kind).numpy().tobytes())
    shape, size = (state.get(key) if isinstance(state, dict) else None for key in ("shape", "blocksize"))
    sizes = shape if isinstance(shape, list) and shape else [0]
    nested = state.get("nested_blocksize", 256) if isinstance(state, dict) else None
    for number in (*sizes, size, nested):
        if type(number) is not int or not 1 <= number < 2**63:
            raise ValueError(f"the quant_state of {show(name)} is {show(state)}; get it again")
    if type(state.get("nested_offset", 0.0)) not in (int, float):
        raise ValueError(
            f"nested_offset={show(state['nested_offset'])} of {show(name)} must be a number; get it again"
        )
    return dict(state)


class _Stored:
    """One weight of a checkpoint, of the shape and in the blocks that its state says; a ValueError if parts lack."""

    def __init__(self, source: Source, name: str, kind: str) -> None:
        self.source, self.name, self.kind = source, name, kind
        self.state = _state(source, name, kind)
        self.shape, self.block = tuple(self.state["shape"]), self.state["blocksize"]
        self.count, self.is_nested = math.prod(self.shape), "nested_blocksize" in self.state
        parts = ["", ".absmax", ".quant_map", _STATE + kind]
        self.names = {name + part for part in parts + [".nested_absmax", ".nested_quant_map"] * self.is_nested}
        if missing := self.names - source.specs.keys():
            raise ValueError(f"the weight {show(name)} of bitsandbytes lacks {show(min(missing))}; get it again")
        if source.specs[name].nbytes != -(-self.count // 2):
            raise ValueError(
                f"{show(name)} takes {source.specs[name].nbytes} bytes, which do not fit {show(self.shape)}"
            )

    def weight(self) -> ForeignTensor:
        label = f"bitsandbytes {self.kind}{' (double)' if self.is_nested else ''}"
        nbytes = sum(self.source.specs[one].nbytes for one in self.names)
        try:
            size = self.block_size()
        except ValueError as reason:
            return ForeignTensor.refused(self.name, self.shape, label, nbytes, str(reason), self.values)
        return ForeignTensor(self.name, self.shape, label, nbytes, partial(self.read, size))

    def block_size(self) -> int:
        """Return the block size in which single rows have the same scales; a ValueError if there is none."""
        own, columns = self.block, self.shape[-1]
        common = math.gcd(own, columns)
        if own >= self.count or own == common:  # one block, or whole blocks in each row
            return fitting_blocks(own, columns)
        try:
            return fitting_blocks(common, columns)
        except ValueError:
            raise ValueError(
                f"blocks of {own} run over the ends of rows of {columns}, and have no common divisor with them that "
                "is an even number from 8 on"
            ) from None

    def tensor(self, part: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return one of the weight's tensors, flattened."""
        spec = self.source.specs[self.name + part]
        if spec.dtype != dtype or math.prod(spec.shape) != count:
            hint = "; it was saved after a forward, which changes it: save before" if part == ".absmax" else ""
            raise ValueError(f"{show(self.name + part)} is {spec}, and {count} of {dtype} are needed{hint}")
        return self.source.read_tensor(self.name + part).flatten()

    def codes(self) -> Tensor:
        """Return lowmem's codes of the flattened weight: uint8 (count,)."""
        raw = self.source.read_tensor(self.name).flatten().view(torch.uint8)
        codes = nibbles(raw).view(-1, 2).flip(-1).flatten()[: self.count]  # high first
        levels = torch.tensor(get_format(_FORMATS[self.kind]).levels, dtype=torch.float32, device="cpu")
        given = self.tensor(".quant_map", torch.float32, 16)
        order = given.argsort(stable=True)
        if not torch.equal(given[order], levels):
            raise ValueError(
                f"{show(self.name)} has other levels than {self.kind} of bitsandbytes: {show(given.tolist())}"
            )
        return order.argsort().to(torch.uint8)[codes.int()]

    def scales(self) -> Tensor:
        """Return the scale of each block of the flattened weight, in float32."""
        count = -(-self.count // self.block)
        if not self.is_nested:
            return self.tensor(".absmax", torch.float32, count)
        steps = self.tensor(".absmax", torch.uint8, count)
        size = self.state["nested_blocksize"]
        own = self.tensor(".nested_absmax", torch.float32, -(-count // size))
        table = self.tensor(".nested_quant_map", torch.float32, 256)
        numbers = torch.arange(count, dtype=torch.int64, device="cpu")
        wide = table[steps.int()] * own[numbers // size]  # not repeated: a file may claim any size
        return wide + torch.tensor(self.state.get("nested_offset", 0.0), dtype=torch.float32, device="cpu")

    def read(self, size: int) -> QuantizedTensor:
        """Return the weight in blocks of ``size``."""
        shape, columns = self.shape, self.shape[-1]
        rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int64, device="cpu")
        starts = rows[:, None] * columns + torch.arange(0, columns, size, dtype=torch.int64, device="cpu")
        scales = self.scales()[starts // self.block].view(*shape[:-1], -1)
        return quantized(pack_codes(self.codes().view(shape), size), scales, shape, _FORMATS[self.kind], size)

    def values(self) -> Tensor:
        """Return the weight in float32."""
        levels = torch.tensor(get_format(_FORMATS[self.kind]).levels, dtype=torch.float32, device="cpu")
        scales = self.scales()[torch.arange(self.count, dtype=torch.int64, device="cpu") // self.block]
        return (levels[self.codes().int()] * scales).view(self.shape)


def pack(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    """Return a weight (out, in) as bitsandbytes has it, which dequantizes it to the same bits in ``dtype``.

    Raises:
        ValueError: it has other levels, offsets, or blocks that bitsandbytes has not.
    """
    if weight.format not in _KINDS:
        raise ValueError(
            f"its levels are those of {weight.format}, and bitsandbytes has those of {', '.join(_KINDS)}"
        )
    if weight.has_offsets:
        raise ValueError("its blocks have offsets, and those of bitsandbytes have none")
    common = uniform_block(weight)
    for size in BLOCKS:
        if common % size == 0:
            return _packed(weight, size, weight.shape, dtype)
    raise ValueError(
        f"rows of {weight.shape[-1]} in blocks of {weight.block_size} have no blocks of {BLOCKS[-1]} to {BLOCKS[0]}"
    )


def _packed(weight: QuantizedTensor, size: int, shape: Sequence[int], dtype: torch.dtype) -> Packed:
    """Return a weight in blocks of ``size``, with ``shape`` noted."""
    kind = _KINDS[weight.format]
    order = torch.tensor(_ORDER[kind], dtype=torch.int64, device="cpu")
    levels = torch.tensor(get_format(weight.format).levels, dtype=torch.float32, device="cpu")
    inverse = order.argsort().to(weight.packed.device, torch.uint8)
    codes = inverse[codes_of(weight).flatten().int()]
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    state = {
        "quant_type": kind,
        "blocksize": size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    return Packed(
        f"{kind}, blocksize={size}",
        {
            "weight": pairs[:, :1] << 4 | pairs[:, 1:],  # the first code high
            "weight.absmax": scales_of(weight, size).flatten(),
            "weight.quant_map": levels[order],
            f"weight{_STATE}{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu"),
        },
        kind,
    )


def pack_again(
    values: Tensor, dtype: torch.dtype, stored: QuantizedTensor | None = None
) -> tuple[Packed, Tensor | QuantizedTensor]:
    """Return a weight (out, in) quantized to nf4, and what it has become; nothing of ``stored`` can be kept."""
    columns = values.shape[-1]
    size = next((size for size in (64, 32) if columns % size == 0), 0)
    if size:
        again = _stored(values, size)
        return pack(again, dtype), again
    flat = _stored(values.reshape(1, -1), 64)  # over the ends of rows, as bitsandbytes itself does it
    packed = _packed(flat, 64, values.shape, dtype)
    return packed, values if values.is_meta else flat.dequantize().view(values.shape)


def _stored(values: Tensor, size: int) -> QuantizedTensor:
    technique = FourBit("nf4", size, "float32")
    return technique.skeleton(values) if values.is_meta else technique.store(values)


def _config(schemes: Mapping[str, Any], dense: Collection[str], dtype: torch.dtype) -> dict[str, Any]:
    kinds = list(schemes.values())
    name = str(dtype).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4" if kinds.count("fp4") > kinds.count("nf4") else "nf4",
        "bnb_4bit_compute_dtype": name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": [_pattern(path, schemes) for path in dense],
    }


def _pattern(path: str, packed: Collection[str]) -> str:
    """Return a pattern of transformers for one dense layer. A name alone takes others that begin or end with it."""
    alike = re.compile(rf"{path}(\.|$)") if re.fullmatch(r"[\w.]+", path) else None
    if alike is None or any(alike.match(other) or other.endswith(path) for other in packed):
        return f"^{re.escape(path)}$"
    return path


PACKING = Packing("bitsandbytes", pack, pack_again, _config, conv1d=True, keeps_weight=True)

FORMAT = Foreign(
    "bitsandbytes",
    find,
    ("absmax", "quant_map", "SCB"),
    "bitsandbytes",
    {"load_in_4bit": one_of(True), "load_in_8bit": one_of(False, None)},
    target=Target(partial(write_folder, PACKING)),
)
