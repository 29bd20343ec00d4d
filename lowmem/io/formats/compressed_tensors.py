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

from lowmem.errors import short_repr
from lowmem.io.formats.code_conversion import (
    LazyIntegerWeight,
    float32_scales_for_smaller_blocks,
    largest_block_size_dividing_rows,
    offsets_for_smaller_blocks,
    packed_4bit_codes_in_int32,
    tensor_bytes_copy,
    unpacked_4bit_codes_from_int32,
    unpacked_codes,
)
from lowmem.io.formats.compressed_tensors_config import (
    FP8,
    INT8,
    SETTINGS,
    build_quantization_config,
    check_format_and_schemes,
    check_some_scheme_fits_layer,
)
from lowmem.io.formats.foreign_format import ExportTarget, ForeignFormat, LayerTensors, LazyForeignTensor
from lowmem.io.formats.mxfp4 import (
    BLOCK,
    E2M1_CODES,
    exponents_and_exact_mask,
    fp4_tensor_from_mxfp4_parts,
    nearest_mxfp4_weight,
)
from lowmem.io.formats.quantized_folder_export import PackedWeight, PackingFormat, export_quantized_folder
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.nn.techniques import FourBit
from lowmem.quant.tensor import QuantizedTensor

_EIGHT_BITS = "it has 8 bits a weight, and 4 are kept: take the dense model, or one in 4 bits"
_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def _first_bytes_of_int32(words: Tensor, count: int) -> Tensor:
    return tensor_bytes_copy(words)[..., :count]


_INTEGERS = {
    4: ("compressed-tensors", unpacked_4bit_codes_from_int32),
    8: (INT8, _first_bytes_of_int32),
}
"""By bits: the kind of integers, and what returns the first numbers of rows of words: uint8 (..., count)."""

_OTHERS = ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")

_GROUPS = (32, 16, 8, 4, 2, 1)
"""Groups of layers that are quantized anew: the first that divides the rows. The kernels of vLLM begin at 32."""
_WITH_ZEROS = ", zero points"
NO_ZEROS = (
    "layers have zero points, as compressed-tensors itself packs them; transformers 5.24 makes parameters of another "
    "shape for them with compressed-tensors 0.20, and refuses every such folder: it is for other programs, as vLLM"
)


def iterate_weights_and_tensor_names(
    checkpoint: SafetensorsCheckpoint, config: Mapping[str, Any]
) -> Iterator[tuple[LazyForeignTensor, set[str]]]:
    """Yield the weight of each layer of compressed-tensors, and the names of its tensors."""
    for name, spec in checkpoint.specs.items():
        layer, _, part = name.rpartition(".")
        is_scaled = part == "weight" and f"{name}_scale" in checkpoint.specs
        if part == "weight_packed":
            read = _packed_weight_or_refused
        elif is_scaled and spec.dtype == torch.int8:
            read = _refused_int8_weight
        elif is_scaled and spec.dtype in _FLOATS:
            read = _refused_fp8_weight
        else:
            continue
        parts = LayerTensors.from_checkpoint(checkpoint, layer, "compressed-tensors", (part, "weight_scale"), _OTHERS)
        yield read(parts, config), parts.tensor_names


def _refused_fp8_weight(layer_tensors: LayerTensors, config: Mapping[str, Any]) -> LazyForeignTensor:
    return layer_tensors.refused_tensor_of_weight(FP8, layer_tensors.specs["weight"].shape, _EIGHT_BITS)


def _packed_weight_or_refused(layer_tensors: LayerTensors, config: Mapping[str, Any]) -> LazyForeignTensor:
    packed, scale = layer_tensors.specs["weight_packed"], layer_tensors.specs["weight_scale"]
    if packed.dtype == torch.int32 and len(packed.shape) == 2 and scale.shape == (1,):
        why = "it has one scale for the tensor, and scales of rows or groups are read: take the dense model"
        return layer_tensors.refused_tensor_of_weight(
            "compressed-tensors", _read_checked_weight_shape(layer_tensors), why
        )
    layer_tensors.raise_parts_error_unless(
        len(packed.shape) >= 2 and len(scale.shape) == len(packed.shape) and 0 not in (*packed.shape, *scale.shape)
    )
    if packed.dtype == torch.uint8:
        return _mxfp4_weight_or_refused(layer_tensors, config)
    layer_tensors.raise_parts_error_unless(packed.dtype == torch.int32 and scale.dtype.is_floating_point)
    shape = _read_checked_weight_shape(layer_tensors)
    columns, groups = shape[-1], scale.shape[-1]
    bits = 8 if packed.shape == (*shape[:-1], -(-columns // 4)) and columns > 4 else 4
    if packed.shape != (*shape[:-1], -(-columns * bits // 32)):
        bits = round(32 * packed.shape[-1] / columns)
        why = f"it has about {bits} bits a weight, and 4 are read: take the dense model, or one in 4 bits"
        return layer_tensors.refused_tensor_of_weight("compressed-tensors", shape, why)
    zeros, order = (layer_tensors.specs.get(part) for part in ("weight_zero_point", "weight_g_idx"))
    zeros_shape = (*shape[:-2], -(-shape[-2] * bits // 32), groups)
    layer_tensors.raise_parts_error_unless(
        scale.shape[:-1] == shape[:-1]
        and columns % groups == 0
        and (zeros is None or (zeros.dtype == torch.int32 and zeros.shape == zeros_shape))
        and (order is None or order.shape == (columns,))
    )
    group = columns // groups
    check_some_scheme_fits_layer(config, layer_tensors.layer, group, shape, zeros is not None)

    kind, unpacked_rows = _INTEGERS[bits]

    def read_zero_points() -> Tensor:
        """Return the zero points, which are packed along the outputs: uint8 (..., out, groups)."""
        if zeros is None:
            return torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device="cpu")
        return unpacked_rows(layer_tensors.read_part("weight_zero_point").mT, shape[-2]).mT

    def read_column_groups() -> Tensor:
        group_indices = layer_tensors.read_part("weight_g_idx").long()
        return torch.where(
            group_indices == -1, torch.arange(columns, dtype=torch.int64, device="cpu") // group, group_indices
        )

    layer = LazyIntegerWeight(
        layer_tensors,
        kind,
        shape,
        group,
        scale.dtype,
        codes=lambda: unpacked_rows(layer_tensors.read_part("weight_packed"), columns),
        scales=lambda: layer_tensors.read_part("weight_scale"),
        zeros=read_zero_points,
        groups=None if order is None else read_column_groups,
    )
    return layer.as_refused_foreign_tensor(_EIGHT_BITS) if kind == INT8 else layer.exact_or_refused_foreign_tensor()


def _mxfp4_weight_or_refused(layer_tensors: LayerTensors, config: Mapping[str, Any]) -> LazyForeignTensor:
    packed, scale = layer_tensors.specs["weight_packed"], layer_tensors.specs["weight_scale"]
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if scale.dtype != torch.uint8:
        why = "its scales are 8-bit floats times a scale of the tensor: take the dense model, or one in MXFP4"
        return layer_tensors.refused_tensor_of_weight("NVFP4", shape, why)
    layer_tensors.raise_parts_error_unless(scale.shape == (*shape[:-1], -(-shape[-1] // BLOCK)))
    check_some_scheme_fits_layer(
        config, layer_tensors.layer, min(BLOCK, shape[-1]), shape, "weight_zero_point" in layer_tensors.specs
    )
    return layer_tensors.foreign_tensor_of_weight(
        "MXFP4",
        shape,
        lambda: fp4_tensor_from_mxfp4_parts(
            layer_tensors.read_part("weight_packed"), layer_tensors.read_part("weight_scale"), shape
        ),
    )


def _refused_int8_weight(layer_tensors: LayerTensors, config: Mapping[str, Any]) -> LazyForeignTensor:
    """Return a layer of "int-quantized": its codes are its weight, with a scale for the tensor, a row or a group."""
    shape, scale = layer_tensors.specs["weight"].shape, layer_tensors.specs["weight_scale"]
    zero, is_whole = layer_tensors.specs.get("weight_zero_point"), scale.shape in ((1,), (1, 1))
    of_rows = scale.shape[:-1] == shape[:-1] and shape[-1] % max(1, *scale.shape[-1:]) == 0
    layer_tensors.raise_parts_error_unless(
        len(shape) >= 2
        and 0 not in (*shape, *scale.shape)
        and scale.dtype.is_floating_point
        and (of_rows or is_whole)
        and (zero is None or (zero.shape == scale.shape and zero.dtype == torch.int8))
    )

    def read_zero_points() -> Tensor:
        if zero is None:
            return torch.zeros(scale.shape, dtype=torch.int8, device="cpu")
        return layer_tensors.read_part("weight_zero_point")

    group = shape[-1] // scale.shape[-1]
    check_some_scheme_fits_layer(config, layer_tensors.layer, group, shape, zero is not None, is_whole)
    if "weight_g_idx" in layer_tensors.specs:
        return layer_tensors.refused_tensor_of_weight(INT8, shape, _EIGHT_BITS)
    return LazyIntegerWeight(
        layer_tensors,
        INT8,
        shape,
        group,
        scale.dtype,
        codes=lambda: layer_tensors.read_part("weight"),
        scales=lambda: layer_tensors.read_part("weight_scale"),
        zeros=read_zero_points,
    ).as_refused_foreign_tensor(_EIGHT_BITS)


def _read_checked_weight_shape(layer_tensors: LayerTensors) -> tuple[int, ...]:
    spec, packed = layer_tensors.specs.get("weight_shape"), layer_tensors.specs["weight_packed"].shape
    layer_tensors.raise_parts_error_unless(
        spec is not None and spec.dtype in (torch.int32, torch.int64) and spec.shape == (len(packed),)
    )
    shape = tuple(layer_tensors.read_part("weight_shape").tolist())
    if shape[:-1] != packed[:-1] or not 0 < shape[-1] <= 32 * packed[-1]:
        raise ValueError(
            f"the layer {short_repr(layer_tensors.layer)} says its shape is {short_repr(shape)}, and its codes are "
            f"{packed}"
        )
    return shape


def pack_exactly(weight: QuantizedTensor, model_dtype: torch.dtype) -> PackedWeight:
    """Return a weight (out, in) as compressed-tensors has it, which decompresses it to the same bits in
    ``model_dtype``.

    transformers casts scales of integers to ``model_dtype``, the model's, and computes values in it.

    Raises:
        ValueError: the weight has other levels, offsets, or scales that the format, or ``model_dtype``, does not
            hold.
    """
    if weight.format == "uint4" and weight.has_offsets:
        return _pack_asymmetric_integers_exactly(weight, model_dtype)
    if weight.format not in ("q4_0", "fp4"):
        raise ValueError(f"its levels are those of {weight.format}, and the format has q4_0 (int4) and fp4 (MXFP4)")
    if weight.has_offsets:
        raise ValueError("its blocks have offsets, and those of symmetric integers have none")
    if weight.format == "fp4":
        return _pack_mxfp4_exactly(weight, model_dtype)
    group = largest_block_size_dividing_rows(weight)
    return _pack_integers(
        unpacked_codes(weight),
        _divide_scales_exactly(float32_scales_for_smaller_blocks(weight, group), 8, model_dtype),
        group,
    )


def packed_and_requantized(
    values: Tensor, model_dtype: torch.dtype, stored: QuantizedTensor | None
) -> tuple[PackedWeight, Tensor | QuantizedTensor]:
    """Return a weight (out, in) with other scales or codes, and what it has become.

    ``Packing.packed_and_requantized`` says what they are.

    Levels of "q4_0" keep their codes, and their scales are rounded to ``model_dtype``; those of "fp4" become MXFP4
    in a model in bfloat16. Others become integers in groups of 32.
    """
    if stored is not None and stored.format == "q4_0" and not stored.has_offsets:
        group = largest_block_size_dividing_rows(stored)
        codes, scales = unpacked_codes(stored), float32_scales_for_smaller_blocks(stored, group) / 8
    elif stored is not None and _can_be_packed_as_mxfp4(stored, model_dtype) and not values.shape[-1] % BLOCK:
        again = nearest_mxfp4_weight(values)
        return _pack_mxfp4_exactly(again, model_dtype), again
    else:
        group = next(size for size in _GROUPS if values.shape[-1] % size == 0)
        codes, scales = None, _least_error_int4_scales(values, group)
    scales = scales.to(model_dtype)
    if not values.is_meta and not bool(scales.isfinite().all()):
        raise ValueError(f"its scales exceed {model_dtype}, which the model computes in (save it in float32 first)")
    wide = scales.float().repeat_interleave(group, -1)
    if codes is None:
        quotients = torch.where(wide == 0, 0.0, values.float() / wide)
        codes = (quotients.round().clamp(-8, 7) + 8).to(torch.uint8)
    return _pack_integers(codes, scales, group), (codes.float() - 8) * wide


def _least_error_int4_scales(values: Tensor, group_size: int) -> Tensor:
    """Return the scales of integers from -8 to 7 with the least squared error: float32 (out, groups)."""
    technique = FourBit("q4_0", max(group_size, 8), "float32")
    rows = (
        values if group_size >= 8 else values.reshape(-1, group_size)
    )  # no block is that short: each group is a row
    stored = technique.skeleton(rows) if values.is_meta else technique.store(rows)
    return (stored.encoding.decode(stored.scales.detach()) / 8).view(values.shape[0], -1)


def _divide_scales_exactly(float32_scales: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    """Return scales divided by a power of two in ``dtype``; a ValueError if ``dtype`` does not hold them."""
    scales = (float32_scales / divisor).to(dtype)
    if not float32_scales.is_meta and not torch.equal(scales.float() * divisor, float32_scales):
        lost = int((scales.float() * divisor != float32_scales).sum())
        raise ValueError(
            f"{lost} of its {float32_scales.numel()} scales are no numbers of {str(dtype).removeprefix('torch.')}, "
            "which the "
            "model computes in (save it in float32 first)"
        )
    return scales


def _pack_asymmetric_integers_exactly(weight: QuantizedTensor, model_dtype: torch.dtype) -> PackedWeight:
    """Pack levels of "uint4" whose offsets are ``-zero * scale``, for whole zeros from 0 to 15."""
    group = largest_block_size_dividing_rows(weight)
    scales = _divide_scales_exactly(float32_scales_for_smaller_blocks(weight, group), 16, model_dtype)
    exact, offsets = scales.double(), offsets_for_smaller_blocks(weight, group).double()
    zeros = torch.where(exact == 0, 8, -offsets / exact).round()
    # A scale times 15 is a number of float32: code * scale + offset then equals (code - zero) * scale.
    fits = (-zeros * exact == offsets) & (zeros >= 0) & (zeros <= 15) & ((15 * exact).float() == 15 * exact)
    if not bool(fits.all()):
        raise ValueError(
            f"{int((~fits).sum())} of its {fits.numel()} offsets are no scale times a whole zero point from 0 to 15"
        )
    return _pack_integers(unpacked_codes(weight), scales, group, zeros.to(torch.uint8))


def _pack_integers(codes: Tensor, scales: Tensor, group_size: int, zero_points: Tensor | None = None) -> PackedWeight:
    rows, columns = codes.shape
    parts = {
        "weight_packed": packed_4bit_codes_in_int32(codes),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64, device="cpu"),
    }
    if zero_points is not None:
        parts["weight_zero_point"] = packed_4bit_codes_in_int32(zero_points.T).T.contiguous()  # (rows / 8, groups)
    kind = f"int4, group_size={group_size}" + ("" if zero_points is None else _WITH_ZEROS)
    return PackedWeight(kind, parts, ("pack-quantized", group_size, zero_points is None))


def _can_be_packed_as_mxfp4(weight: QuantizedTensor, model_dtype: torch.dtype) -> bool:
    """Whether levels are those of MXFP4, and the model computes in bfloat16, to which it is decompressed."""
    return weight.format == "fp4" and not weight.has_offsets and model_dtype == torch.bfloat16


def _pack_mxfp4_exactly(weight: QuantizedTensor, model_dtype: torch.dtype) -> PackedWeight:
    if not _can_be_packed_as_mxfp4(weight, model_dtype):
        raise ValueError(
            f"MXFP4 is decompressed to bfloat16, and the model computes in {str(model_dtype).removeprefix('torch.')} "
            "(save "
            "it in bfloat16 first)"
        )
    size = largest_block_size_dividing_rows(weight)
    if size % BLOCK:
        raise ValueError(f"rows of {weight.shape[-1]} in blocks of {weight.block_size} have no blocks of 32")
    scales, codes = float32_scales_for_smaller_blocks(weight, BLOCK), unpacked_codes(weight)
    exponents, fitting = exponents_and_exact_mask(scales)
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
    return PackedWeight("MXFP4", parts, ("mxfp4-pack-quantized", BLOCK, True))


PACKING = PackingFormat(
    "compressed-tensors",
    pack_exactly,
    packed_and_requantized,
    build_quantization_config,
    conv1d=False,
    keeps_weight=False,
    warning=lambda schemes: None if all(symmetric for _, _, symmetric in schemes) else NO_ZEROS,
)

FORMAT = ForeignFormat(
    "compressed-tensors",
    iterate_weights_and_tensor_names,
    ("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),
    "compressed-tensors",
    SETTINGS,
    check_format_and_schemes,
    target=ExportTarget(partial(export_quantized_folder, PACKING)),
)
