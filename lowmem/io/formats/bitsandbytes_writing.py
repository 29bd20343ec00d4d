"""Weights in nf4 and fp4, as bitsandbytes has them and transformers saves them.

``lowmem.io.formats.bitsandbytes`` reads them, and says how they lie.

Scales become float32, one for each block, without double quantization. Blocks of bitsandbytes run over the flattened
weight: they are those of lowmem, or parts of them, wherever a size that bitsandbytes knows divides both the blocks
and the rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.io.formats.exported import Exported
from lowmem.io.formats.packing import Packed, Packing, codes_of, scales_of, uniform_block
from lowmem.io.formats.quantized_folder import write_folder
from lowmem.nn.fourbit import FourBit
from lowmem.quant.formats import get_format
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["BLOCKS", "pack", "write_bitsandbytes"]

BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
"""The block sizes of bitsandbytes."""

_KINDS = {"nf4": "nf4", "bnb_fp4": "fp4"}
_ORDER = {  # the codes of lowmem by those of bitsandbytes
    "nf4": tuple(range(16)),
    "fp4": (7, 9, 14, 15, 12, 13, 10, 11, 8, 6, 1, 0, 3, 2, 5, 4),
}


def pack(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    """Return a weight as bitsandbytes has it, which dequantizes it to the same bits in ``dtype``.

    Args:
        weight: (out, in).
        dtype: to which bitsandbytes dequantizes.

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
    """Return a weight in blocks of ``size``, of which ``shape`` is noted."""
    kind = _KINDS[weight.format]
    order = torch.tensor(_ORDER[kind])
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
            "weight.quant_map": torch.tensor(get_format(weight.format).levels, dtype=torch.float32)[order],
            f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        },
        kind,
    )


def pack_again(
    values: Tensor, dtype: torch.dtype, stored: QuantizedTensor | None = None
) -> tuple[Packed, Tensor | QuantizedTensor]:
    """Return a weight (out, in) quantized to nf4, and what it has become; on the meta device, without values.

    Args:
        values: of the weight.
        dtype: of the model.
        stored: unused: nothing of it can be kept.
    """
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


def write_bitsandbytes(source: Path, out: Path, *, requantize: bool = False, **more: Any) -> list[Exported]:
    """Write a folder that transformers loads with bitsandbytes, from one that lowmem wrote.

    Args:
        source: a folder that lowmem wrote.
        out: where nothing is yet.
        requantize: whether linear layers that bitsandbytes cannot hold as they are become nf4.
        more: as ``write_folder`` has them.

    Raises:
        FileError, ValueError, OSError, ImportError: as ``write_folder``.
    """
    return write_folder(source, out, PACKING, requantize=requantize, **more)
