"""compressed-tensors: linear layers of integers ("pack-quantized") and MXFP4 ("mxfp4-pack-quantized"), of 4 bits.

Integers: ``<layer>.weight_packed`` int32 (out, in / 8), the first in the lowest bits, plus 8; ``.weight_scale``
(out, groups); ``.weight_shape``; of asymmetric ones ``.weight_zero_point`` int32 (out / 8, groups), packed along the
outputs. MXFP4: ``.weight_packed`` uint8 (out, in / 2), the first code low; ``.weight_scale``
uint8 (out, in / 32), the exponents.

Integers of 8 bits are refused with their values, since no format here has a level for -128, too: packed likewise,
four in a word, plus 128; or as they are ("int-quantized"), ``.weight`` int8 (out, in). Floats of 8 bits
("float-quantized", ``.weight`` float8) are refused without them.

A layer is written as integers where its levels are those of "q4_0", or of "uint4" with offsets that are zero points
times scales, and as MXFP4 where they are those of "fp4" and all scales are 6 times powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.codes import (
    IntegerLayer,
    as_bytes,
    codes_of,
    offsets_of,
    scales_of,
    uniform_block,
    unpacked,
    words,
)
from lowmem.io.formats.compressed_tensors_config import (
    FP8,
    INT8,
    SETTINGS,
    check_config,
    check_scheme,
    written_config,
)
from lowmem.io.formats.foreign import Foreign, ForeignTensor, Parts, Target
from lowmem.io.formats.mxfp4 import BLOCK, E2M1_CODES, exponents_of, nearest, weight_of
from lowmem.io.formats.quantized_folder import Packed, Packing, write_folder
from lowmem.io.source import Source
from lowmem.nn.techniques import FourBit
from lowmem.quant.tensor import QuantizedTensor

_EIGHT_BITS = "it has 8 bits a weight, and 4 are kept: take the dense model, or one in 4 bits"
_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_OTHERS = ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")

_GROUPS = (32, 16, 8, 4, 2, 1)
"""Groups of layers that are quantized anew: the first that divides the rows. The kernels of vLLM begin at 32."""
_WITH_ZEROS = ", zero points"
NO_ZEROS = (
    "layers have zero points, as compressed-tensors itself packs them; transformers 5.24 makes parameters of another "
    "shape for them with compressed-tensors 0.20, and refuses every such folder: it is for other programs, as vLLM"
)


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield the weight of each layer of compressed-tensors, and the names of its tensors."""
    for name, spec in source.specs.items():
        layer, _, part = name.rpartition(".")
        is_scaled = part == "weight" and f"{name}_scale" in source.specs
        if part == "weight_packed":
            read = _packed
        elif is_scaled and spec.dtype == torch.int8:
            read = _plain_integers
        elif is_scaled and spec.dtype in _FLOATS:
            read = _floats
        else:
            continue
        parts = Parts.of(source, layer, "compressed-tensors", (part, "weight_scale"), _OTHERS)
        yield read(parts, config), parts.names


def _floats(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    return parts.refused(FP8, parts.specs["weight"].shape, _EIGHT_BITS)


def _packed(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    packed, scale = parts.specs["weight_packed"], parts.specs["weight_scale"]
    if packed.dtype == torch.int32 and len(packed.shape) == 2 and scale.shape == (1,):
        why = "it has one scale for the tensor, and scales of rows or groups are read: take the dense model"
        return parts.refused("compressed-tensors", _shape(parts), why)
    parts.check(
        len(packed.shape) >= 2 and len(scale.shape) == len(packed.shape) and 0 not in (*packed.shape, *scale.shape)
    )
    if packed.dtype == torch.uint8:
        return _mxfp4(parts, config)
    parts.check(packed.dtype == torch.int32 and scale.dtype.is_floating_point)
    shape = _shape(parts)
    columns, groups = shape[-1], scale.shape[-1]
    bits = 8 if packed.shape == (*shape[:-1], -(-columns // 4)) and columns > 4 else 4
    if packed.shape != (*shape[:-1], -(-columns * bits // 32)):
        bits = round(32 * packed.shape[-1] / columns)
        why = f"it has about {bits} bits a weight, and 4 are read: take the dense model, or one in 4 bits"
        return parts.refused("compressed-tensors", shape, why)
    zeros, order = (parts.specs.get(part) for part in ("weight_zero_point", "weight_g_idx"))
    zeros_shape = (*shape[:-2], -(-shape[-2] * bits // 32), groups)
    parts.check(
        scale.shape[:-1] == shape[:-1]
        and columns % groups == 0
        and (zeros is None or (zeros.dtype == torch.int32 and zeros.shape == zeros_shape))
        and (order is None or order.shape == (columns,))
    )
    group = columns // groups
    check_scheme(config, parts.layer, group, shape, zeros is not None)

    def numbers(packed: Tensor, count: int) -> Tensor:
        """Return the first ``count`` numbers of each row of words: int32 (..., words) -> uint8 (..., count)."""
        return unpacked(packed, count) if bits == 4 else as_bytes(packed)[..., :count]

    def zero_points() -> Tensor:
        """Return the zero points, which are packed along the outputs: uint8 (..., out, groups)."""
        if zeros is None:
            return torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device="cpu")
        return numbers(parts.read("weight_zero_point").mT, shape[-2]).mT

    def groups_of_columns() -> Tensor:
        given = parts.read("weight_g_idx").long()
        return torch.where(given == -1, torch.arange(columns, dtype=torch.int64, device="cpu") // group, given)

    layer = IntegerLayer(
        parts,
        "compressed-tensors" if bits == 4 else INT8,
        shape,
        group,
        scale.dtype,
        codes=lambda: numbers(parts.read("weight_packed"), columns),
        scales=lambda: parts.read("weight_scale"),
        zeros=zero_points,
        groups=None if order is None else groups_of_columns,
    )
    return layer.tensor() if bits == 4 else layer.refused(_EIGHT_BITS)


def _mxfp4(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    packed, scale = parts.specs["weight_packed"], parts.specs["weight_scale"]
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if scale.dtype != torch.uint8:
        why = "its scales are 8-bit floats times a scale of the tensor: take the dense model, or one in MXFP4"
        return parts.refused("NVFP4", shape, why)
    parts.check(scale.shape == (*shape[:-1], -(-shape[-1] // BLOCK)))
    check_scheme(config, parts.layer, min(BLOCK, shape[-1]), shape, "weight_zero_point" in parts.specs)
    return parts.weight(
        "MXFP4", shape, lambda: weight_of(parts.read("weight_packed"), parts.read("weight_scale"), shape)
    )


def _plain_integers(parts: Parts, config: Mapping[str, Any]) -> ForeignTensor:
    """Return a layer of "int-quantized": its codes are its weight, with a scale for the tensor, a row or a group."""
    shape, scale = parts.specs["weight"].shape, parts.specs["weight_scale"]
    zero, is_whole = parts.specs.get("weight_zero_point"), scale.shape in ((1,), (1, 1))
    of_rows = scale.shape[:-1] == shape[:-1] and shape[-1] % max(1, *scale.shape[-1:]) == 0
    parts.check(
        len(shape) >= 2
        and 0 not in (*shape, *scale.shape)
        and scale.dtype.is_floating_point
        and (of_rows or is_whole)
        and (zero is None or (zero.shape == scale.shape and zero.dtype == torch.int8))
    )

    def zero_points() -> Tensor:
        if zero is None:
            return torch.zeros(scale.shape, dtype=torch.int8, device="cpu")
        return parts.read("weight_zero_point")

    group = shape[-1] // scale.shape[-1]
    check_scheme(config, parts.layer, group, shape, zero is not None, is_whole)
    if "weight_g_idx" in parts.specs:
        return parts.refused(INT8, shape, _EIGHT_BITS)
    return IntegerLayer(
        parts,
        INT8,
        shape,
        group,
        scale.dtype,
        codes=lambda: parts.read("weight"),
        scales=lambda: parts.read("weight_scale"),
        zeros=zero_points,
    ).refused(_EIGHT_BITS)


def _shape(parts: Parts) -> tuple[int, ...]:
    spec, packed = parts.specs.get("weight_shape"), parts.specs["weight_packed"].shape
    parts.check(spec is not None and spec.dtype in (torch.int32, torch.int64) and spec.shape == (len(packed),))
    shape = tuple(parts.read("weight_shape").tolist())
    if shape[:-1] != packed[:-1] or not 0 < shape[-1] <= 32 * packed[-1]:
        raise ValueError(f"the layer {show(parts.layer)} says its shape is {show(shape)}, and its codes are {packed}")
    return shape


def pack(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    """Return a weight (out, in) as compressed-tensors has it, which decompresses it to the same bits in ``dtype``.

    transformers casts scales of integers to ``dtype``, the model's, and computes values in it.

    Raises:
        ValueError: the weight has other levels, offsets, or scales that the format, or ``dtype``, does not hold.
    """
    if weight.format == "uint4" and weight.has_offsets:
        return _asymmetric(weight, dtype)
    if weight.format not in ("q4_0", "fp4"):
        raise ValueError(f"its levels are those of {weight.format}, and the format has q4_0 (int4) and fp4 (MXFP4)")
    if weight.has_offsets:
        raise ValueError("its blocks have offsets, and those of symmetric integers have none")
    if weight.format == "fp4":
        return _packed_mxfp4(weight, dtype)
    group = uniform_block(weight)
    return _packed_integers(codes_of(weight), _held(scales_of(weight, group), 8, dtype), group)


def pack_again(
    values: Tensor, dtype: torch.dtype, stored: QuantizedTensor | None
) -> tuple[Packed, Tensor | QuantizedTensor]:
    """Return a weight (out, in) with other scales or codes, and what it has become, as ``Packing.pack_again`` says.

    Levels of "q4_0" keep their codes, and their scales are rounded to ``dtype``; those of "fp4" become MXFP4 in a
    model in bfloat16. Others become integers in groups of 32.
    """
    if stored is not None and stored.format == "q4_0" and not stored.has_offsets:
        group = uniform_block(stored)
        codes, scales = codes_of(stored), scales_of(stored, group) / 8
    elif stored is not None and _has_mxfp4(stored, dtype) and not values.shape[-1] % BLOCK:
        again = nearest(values)
        return _packed_mxfp4(again, dtype), again
    else:
        group = next(size for size in _GROUPS if values.shape[-1] % size == 0)
        codes, scales = None, _searched_scales(values, group)
    scales = scales.to(dtype)
    if not values.is_meta and not bool(scales.isfinite().all()):
        raise ValueError(f"its scales exceed {dtype}, which the model computes in (save it in float32 first)")
    wide = scales.float().repeat_interleave(group, -1)
    if codes is None:
        quotients = torch.where(wide == 0, 0.0, values.float() / wide)
        codes = (quotients.round().clamp(-8, 7) + 8).to(torch.uint8)
    return _packed_integers(codes, scales, group), (codes.float() - 8) * wide


def _searched_scales(values: Tensor, group: int) -> Tensor:
    """Return the scales of integers from -8 to 7 with the least squared error: float32 (out, groups)."""
    technique = FourBit("q4_0", max(group, 8), "float32")
    rows = values if group >= 8 else values.reshape(-1, group)  # no block is that short: each group is a row
    stored = technique.skeleton(rows) if values.is_meta else technique.store(rows)
    return (stored.encoding.decode(stored.scales.detach()) / 8).view(values.shape[0], -1)


def _held(wide: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    """Return scales divided by a power of two in ``dtype``; a ValueError if ``dtype`` does not hold them."""
    scales = (wide / divisor).to(dtype)
    if not wide.is_meta and not torch.equal(scales.float() * divisor, wide):
        lost = int((scales.float() * divisor != wide).sum())
        raise ValueError(
            f"{lost} of its {wide.numel()} scales are no numbers of {str(dtype).removeprefix('torch.')}, which the "
            "model computes in (save it in float32 first)"
        )
    return scales


def _asymmetric(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    """Pack levels of "uint4" whose offsets are ``-zero * scale``, for whole zeros from 0 to 15."""
    group = uniform_block(weight)
    scales = _held(scales_of(weight, group), 16, dtype)
    exact, offsets = scales.double(), offsets_of(weight, group).double()
    zeros = torch.where(exact == 0, 8, -offsets / exact).round()
    # A scale times 15 is a number of float32: code * scale + offset then equals (code - zero) * scale.
    fits = (-zeros * exact == offsets) & (zeros >= 0) & (zeros <= 15) & ((15 * exact).float() == 15 * exact)
    if not bool(fits.all()):
        raise ValueError(
            f"{int((~fits).sum())} of its {fits.numel()} offsets are no scale times a whole zero point from 0 to 15"
        )
    return _packed_integers(codes_of(weight), scales, group, zeros.to(torch.uint8))


def _packed_integers(codes: Tensor, scales: Tensor, group: int, zeros: Tensor | None = None) -> Packed:
    rows, columns = codes.shape
    parts = {
        "weight_packed": words(codes),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64, device="cpu"),
    }
    if zeros is not None:
        parts["weight_zero_point"] = words(zeros.T).T.contiguous()  # (rows / 8, groups)
    kind = f"int4, group_size={group}" + ("" if zeros is None else _WITH_ZEROS)
    return Packed(kind, parts, ("pack-quantized", group, zeros is None))


def _has_mxfp4(weight: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether levels are those of MXFP4, and the model computes in bfloat16, to which it is decompressed."""
    return weight.format == "fp4" and not weight.has_offsets and dtype == torch.bfloat16


def _packed_mxfp4(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    if not _has_mxfp4(weight, dtype):
        raise ValueError(
            f"MXFP4 is decompressed to bfloat16, and the model computes in {str(dtype).removeprefix('torch.')} (save "
            "it in bfloat16 first)"
        )
    size = uniform_block(weight)
    if size % BLOCK:
        raise ValueError(f"rows of {weight.shape[-1]} in blocks of {weight.block_size} have no blocks of 32")
    scales, codes = scales_of(weight, BLOCK), codes_of(weight)
    exponents, fitting = exponents_of(scales)
    if not weight.packed.is_meta and not bool(fitting.all()):
        raise ValueError(
            f"{int((~fitting).sum())} of its {fitting.numel()} scales are not 6 times a power of two, as those of "
            "MXFP4 are"
        )
    # A block whose scale is 0 has zeros of both signs.
    none = (scales == 0).repeat_interleave(BLOCK, -1)
    codes = torch.where(none, torch.where(codes < 8, 7, 8).to(torch.uint8), codes)
    table = torch.tensor(E2M1_CODES, dtype=torch.uint8, device=codes.device).argsort().to(torch.uint8)
    pairs = table[codes.int()].view(*codes.shape[:-1], -1, 2)
    parts = {
        "weight_packed": (pairs[..., 0] | pairs[..., 1] << 4).contiguous(),
        "weight_scale": exponents.masked_fill(scales == 0, 127).to(torch.uint8),
    }
    return Packed("MXFP4", parts, ("mxfp4-pack-quantized", BLOCK, True))


PACKING = Packing(
    "compressed-tensors",
    pack,
    pack_again,
    written_config,
    conv1d=False,
    keeps_weight=False,
    warning=lambda schemes: None if all(symmetric for _, _, symmetric in schemes) else NO_ZEROS,
)

FORMAT = Foreign(
    "compressed-tensors",
    find,
    ("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),
    "compressed-tensors",
    SETTINGS,
    check_config,
    target=Target(partial(write_folder, PACKING)),
)
