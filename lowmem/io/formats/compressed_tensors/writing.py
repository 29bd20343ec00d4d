"""Linear layers as compressed-tensors has them: integers ("pack-quantized") and MXFP4 ("mxfp4-pack-quantized").

``reading`` says how they lie. A layer becomes integers where its levels are those of "q4_0", or of "uint4" with
offsets that are zero points times scales, and MXFP4 where they are those of "fp4" and all scales are 6 times powers
of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.io.formats.exported import Exported
from lowmem.io.formats.foreign_tensor import E2M1_CODES, power_scales
from lowmem.io.formats.packing import Packed, Packing, codes_of, offsets_of, scales_of, uniform_block
from lowmem.io.formats.quantized_folder import write_folder
from lowmem.nn.fourbit import FourBit
from lowmem.quant.formats import get_format
from lowmem.quant.packing import pack as pack_codes
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["pack", "pack_again", "write_compressed_tensors"]

_GROUPS = (32, 16, 8, 4, 2, 1)
"""Groups of layers that are quantized anew: the first that divides the rows. The kernels of vLLM begin at 32."""
_MXFP4_BLOCK = 32
_MXFP4_BIAS = 2  # of the exponent of a scale 6 * 2 ** (e - 127) over e
_MANTISSA = 2**23
_WITH_ZEROS = ", zero points"
NO_ZEROS = (
    "layers have zero points, as compressed-tensors itself packs them; transformers 5.24 makes parameters of another "
    "shape for them with compressed-tensors 0.20, and refuses every such folder: it is for other programs, as vLLM"
)


def pack(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    """Return a weight as compressed-tensors has it, which decompresses it to the same bits in ``dtype``.

    Args:
        weight: (out, in).
        dtype: of the model. transformers casts scales of integers to it, and computes values in it.

    Raises:
        ValueError: it has other levels, offsets, or scales that the format, or ``dtype``, does not hold.
    """
    if weight.format == "uint4" and weight.has_offsets:
        return _asymmetric(weight, dtype)
    if weight.format not in ("q4_0", "fp4"):
        raise ValueError(f"its levels are those of {weight.format}, and the format has q4_0 (int4) and fp4 (MXFP4)")
    if weight.has_offsets:
        raise ValueError("its blocks have offsets, and those of symmetric integers have none")
    return _integers(weight, dtype) if weight.format == "q4_0" else _mxfp4(weight, dtype)


def pack_again(
    values: Tensor, dtype: torch.dtype, stored: QuantizedTensor | None
) -> tuple[Packed, Tensor | QuantizedTensor]:
    """Return a weight (out, in) with other scales or codes, and what it has become; without values on meta.

    Levels of "q4_0" keep their codes, and their scales are rounded to ``dtype``; those of "fp4" become MXFP4 in a
    model in bfloat16. Others become integers in groups of 32.

    Args:
        values: of the weight.
        dtype: of the model.
        stored: the weight as it is stored; None: it is transposed there.

    Raises:
        ValueError: a scale that ``dtype`` cannot hold.
    """
    if stored is not None and stored.format == "q4_0" and not stored.has_offsets:
        group = uniform_block(stored)
        codes, scales = codes_of(stored), scales_of(stored, group) / 8
    elif stored is not None and _has_mxfp4(stored, dtype) and not values.shape[-1] % _MXFP4_BLOCK:
        again = _nearest_mxfp4(values)
        return _mxfp4(again, dtype), again
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


def _nearest_mxfp4(values: Tensor) -> QuantizedTensor:
    """Return a weight in "fp4" with scales of MXFP4, of the two next powers of two those with the least error.

    OCP Microscaling Formats v1.0, section 6.3, takes the smaller one always.
    """
    shape = values.shape
    form = get_format("fp4")
    blocks = values.float().view(*shape[:-1], -1, _MXFP4_BLOCK)
    if values.is_meta:
        return QuantizedTensor.empty(shape, "fp4", _MXFP4_BLOCK, "float32", "imported", device="meta")
    largest = blocks.abs().amax(-1, keepdim=True)
    lower = (torch.frexp(largest).exponent - 1 - 2 + 127).clamp(0, 251)  # its largest weight, 6, or more
    levels, bounds = (torch.tensor(one, dtype=torch.float32) for one in (form.levels, form.boundaries))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for exponents in (lower, lower + 1):
        scales = power_scales(exponents)
        codes = torch.bucketize(blocks / scales, bounds).to(torch.uint8)
        lost = (blocks - levels[codes.int()] * scales).double().square().sum(-1, keepdim=True)
        if best is None:
            best = codes, scales, lost
        else:
            better = lost < best[2]
            best = torch.where(better, codes, best[0]), torch.where(better, scales, best[1]), lost
    assert best is not None
    packed = pack_codes(best[0].view(shape), _MXFP4_BLOCK)
    return QuantizedTensor(packed, best[1].squeeze(-1), shape, "fp4", _MXFP4_BLOCK, "float32", "imported")


def _integers(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    group = uniform_block(weight)
    return _packed_integers(codes_of(weight), _held(scales_of(weight, group), 8, dtype), group)


def _held(wide: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    """Return scales divided by a power of two in ``dtype``.

    Raises:
        ValueError: it does not hold them.
    """
    scales = (wide / divisor).to(dtype)
    if not wide.is_meta and not torch.equal(scales.float() * divisor, wide):
        lost = int((scales.float() * divisor != wide).sum())
        raise ValueError(
            f"{lost} of its {wide.numel()} scales are no numbers of {str(dtype).removeprefix('torch.')}, which the "
            "model computes in (save it in float32 first)"
        )
    return scales


def _asymmetric(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    """Pack levels of "uint4" whose offsets are ``-zero * scale``, for whole zeros from 0 to 15.

    A scale times 15 has to be a number of float32: ``code * scale + offset`` then equals ``(code - zero) * scale``.
    """
    group = uniform_block(weight)
    scales = _held(scales_of(weight, group), 16, dtype)
    exact, offsets = scales.double(), offsets_of(weight, group).double()
    zeros = torch.where(exact == 0, 8, -offsets / exact).round()
    fits = (-zeros * exact == offsets) & (zeros >= 0) & (zeros <= 15) & ((15 * exact).float() == 15 * exact)
    if not bool(fits.all()):
        raise ValueError(
            f"{int((~fits).sum())} of its {fits.numel()} offsets are no scale times a whole zero point from 0 to 15"
        )
    return _packed_integers(codes_of(weight), scales, group, zeros.to(torch.uint8))


def _packed_integers(codes: Tensor, scales: Tensor, group: int, zeros: Tensor | None = None) -> Packed:
    rows, columns = codes.shape
    parts = {
        "weight_packed": _words(codes),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if zeros is not None:
        parts["weight_zero_point"] = _words(zeros.T).T.contiguous()  # (rows / 8, groups)
    kind = f"int4, group_size={group}" + ("" if zeros is None else _WITH_ZEROS)
    return Packed(kind, parts, ("pack-quantized", group, zeros is None))


def _words(codes: Tensor) -> Tensor:
    """Return codes with eight in a word, the first of them lowest: uint8 (n, m) -> int32 (n, m / 8)."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(codes.shape[0], -1, 4, 2)
    pairs = (padded[..., 0] | padded[..., 1] << 4).contiguous()  # (n, words, 4 bytes)
    return pairs.view(torch.int32).squeeze(-1)


def _has_mxfp4(weight: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether levels are those of MXFP4, and the model computes in bfloat16, to which it is decompressed."""
    return weight.format == "fp4" and not weight.has_offsets and dtype == torch.bfloat16


def _mxfp4(weight: QuantizedTensor, dtype: torch.dtype) -> Packed:
    if not _has_mxfp4(weight, dtype):
        raise ValueError(
            f"MXFP4 is decompressed to bfloat16, and the model computes in {str(dtype).removeprefix('torch.')} (save "
            "it in bfloat16 first)"
        )
    size = uniform_block(weight)
    if size % _MXFP4_BLOCK:
        raise ValueError(f"rows of {weight.shape[-1]} in blocks of {weight.block_size} have no blocks of 32")
    scales = scales_of(weight, _MXFP4_BLOCK)
    codes = codes_of(weight)
    bits = scales.view(torch.int32)
    exponents = (bits >> 23) - _MXFP4_BIAS
    empty = scales == 0
    if not weight.packed.is_meta:
        fitting = (bits % _MANTISSA == 1 << 22) & (exponents >= 0) | empty
        if not bool(fitting.all()):
            raise ValueError(
                f"{int((~fitting).sum())} of its {fitting.numel()} scales are not 6 times a power of two, as those "
                "of MXFP4 are"
            )
    exponents = torch.where(empty, 127, exponents)
    # A block whose scale is 0 has zeros of both signs.
    none = empty.repeat_interleave(_MXFP4_BLOCK, -1)
    codes = torch.where(none, torch.where(codes < 8, 7, 8).to(torch.uint8), codes)
    table = torch.tensor(E2M1_CODES, dtype=torch.uint8, device=codes.device).argsort().to(torch.uint8)
    pairs = table[codes.int()].view(*codes.shape[:-1], -1, 2)
    parts = {
        "weight_packed": (pairs[..., 0] | pairs[..., 1] << 4).contiguous(),
        "weight_scale": exponents.to(torch.uint8),
    }
    return Packed("MXFP4", parts, ("mxfp4-pack-quantized", _MXFP4_BLOCK, True))


def _config(schemes: Mapping[str, Any], dense: Collection[str], dtype: torch.dtype) -> dict[str, Any]:
    names: dict[Any, list[str]] = {}
    for path, scheme in schemes.items():
        names.setdefault(scheme, []).append(path)
    formats = {format for format, _, _ in names}
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(names) == 1 else names[format, size, symmetric],
            "weights": _weights(format, size, symmetric),
            "input_activations": None,
            "output_activations": None,
            "format": format,
        }
        for number, (format, size, symmetric) in enumerate(sorted(names))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(format: str, size: int, symmetric: bool) -> dict[str, Any]:
    floats = format == "mxfp4-pack-quantized"
    return {
        "num_bits": 4,
        "type": "float" if floats else "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
        **({"scale_dtype": "torch.uint8"} if floats else {}),
    }


PACKING = Packing("compressed-tensors", pack, pack_again, _config, conv1d=False, keeps_weight=False)


def write_compressed_tensors(source: Path, out: Path, *, requantize: bool = False, **more: Any) -> list[Exported]:
    """Write a folder that transformers loads with compressed-tensors, from one that lowmem wrote.

    Args:
        source: a folder that lowmem wrote.
        out: where nothing is yet.
        requantize: whether linear layers that it cannot hold as they are become int4, or MXFP4 (``pack_again``).
        more: as ``write_folder`` has them.

    Raises:
        FileError, ValueError, OSError, ImportError: as ``write_folder``.

    Warns:
        UserWarning: layers have zero points, with which transformers loads no folder.
    """
    rows = write_folder(source, out, PACKING, requantize=requantize, **more)
    if any(row.kind.endswith(_WITH_ZEROS) for row in rows):
        warnings.warn(NO_ZEROS, UserWarning, stacklevel=2)
    return rows
