"""Launches of the kernels: their arguments, and the shape of a tile, which one table says."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.kernels.triton import quantization as of_rows
from lowmem.kernels.triton import small_batch as few_inputs
from lowmem.quant.formats import Format, get_format
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.quant.tensor import QuantizedTensor, float32_table


class CodeTile(NamedTuple):
    """Codes that a program reads at a time.

    Attributes:
        nbytes: of all of its rows.
        of_row: bytes of a row, at most.
        group: bytes that a thread loads at once, at most.
        warps: of the program; a thread has ``nbytes / (32 warps)`` bytes.
    """

    nbytes: int
    of_row: int
    group: int
    warps: int

    def shape_constants(self, row_bytes: int, block_bytes: int) -> dict[str, int]:
        """Return ROWS, GROUPS and GROUP of a tile. A block's bytes are whole groups.

        Tiles of smaller groups have half of the bytes, since each scale and address takes a register.
        """
        group = min(self.group, block_bytes & -block_bytes)
        nbytes = self.nbytes if group == self.group else self.nbytes // 2
        of_row = min(self.of_row, _next_power_of_two(max(row_bytes, group)))
        return {"ROWS": max(1, nbytes // of_row), "GROUPS": of_row // group, "GROUP": group}


# By the kernel and the most inputs, chosen by registers and by the loads that are under way at a time; no GPU has
# measured them.
TILES = {
    ("dequantize", 0): CodeTile(2048, 512, 16, 4),
    ("quantize", 0): CodeTile(512, 2048, 1, 4),
    ("few", 1): CodeTile(2048, 512, 16, 4),
    ("few in float32", 1): CodeTile(1024, 256, 8, 4),  # the other one spills four registers on sm_80
    ("few", 2): CodeTile(1024, 256, 8, 4),
    ("few", 4): CodeTile(1024, 256, 8, 4),
    ("few", 8): CodeTile(1024, 256, 8, 4),
}


class KernelLaunch(NamedTuple):
    """A kernel with its arguments; calling it starts the kernel on the device of its tensors."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int

    def __call__(self) -> None:
        """Start the kernel; it runs after what its device's stream holds."""
        device = self.arguments["packed"].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self()
            return
        self.kernel[(self.programs,)](**self.arguments, num_warps=self.warps, **OPTIONS)


# Products and sums are not fused behind the kernels' back, or dequantized bits would not be those of plain torch.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}


def dequantize_launch(
    weight: QuantizedTensor, out: Tensor, levels: tuple[float, ...] | None = None, start: int = 0
) -> KernelLaunch:
    """Dequantize columns of a matrix to ``out``, contiguous (rows, columns): those from ``start``, which begins a
    block; ``levels`` replace the format's."""
    columns, block = out.shape[1], start // weight.block_size
    plan, stored = _weight_kernel_arguments("dequantize", 0, weight, columns, start, levels)
    blocks = -(-weight.shape[1] // weight.block_size)
    out_arguments = {
        "out": out,
        "out_stride": columns,
        "behind": blocks if plan.offsets else blocks - block,  # offsets lie as far behind each scale
        "rows": out.shape[0],
        "OFFSETS": plan.offsets,
    }
    programs = -(-out.shape[0] // plan.constants["ROWS"]) * plan.tiles
    return KernelLaunch(of_rows.dequantize, programs, stored | out_arguments, plan.warps)


def small_batch_product_launch(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, out: Tensor) -> KernelLaunch:
    """Multiply up to eight inputs (batch, columns) by a matrix without offsets, into contiguous (batch, out)."""
    inputs = _next_power_of_two(x.shape[0])
    kernel = "few in float32" if inputs == 1 and x.dtype is torch.float32 else "few"
    plan, stored = _weight_kernel_arguments(kernel, inputs, weight, weight.shape[1])
    x = _with_contiguous_rows(x)
    input_arguments = {
        "x": x,
        "bias": out if bias is None else bias.contiguous(),  # not read without BIAS
        "out": out,
        "out_features": weight.shape[0],
        "x_stride": x.stride(0),
        "inputs": x.shape[0],
        "BIAS": bias is not None,
        "INPUTS": inputs,
    }
    programs = -(-weight.shape[0] // plan.constants["ROWS"])
    return KernelLaunch(few_inputs.few, programs, stored | input_arguments, plan.warps)


def quantize_launch(
    weight: Tensor, scales: Tensor, form: Format, block_size: int, packed: Tensor, used: Tensor
) -> KernelLaunch:
    """Write the nearest codes of float32 (rows, columns), for float32 scales (rows, blocks), and which blocks of
    ``used``, uint8 (rows, blocks), have other codes than the zero code."""
    tile, width = TILES["quantize", 0], _next_power_of_two(block_size * form.bits // 8)
    blocks = max(1, tile.nbytes // width)
    arguments = {
        "weight": weight.contiguous(),
        "scales": scales.contiguous(),
        "boundaries": float32_table((*form.boundaries, math.inf), weight.device),
        "packed": packed,
        "used": used,
        "count": scales.numel(),
        "columns": weight.shape[1],
        "blocks": scales.shape[1],
        "packed_stride": packed.stride(0),
        "BLOCK": block_size,
        "BITS": form.bits,
        "ZERO": form.zero_code,
        "BLOCKS": blocks,
        "WIDTH": width,
    }
    warps = tile.warps * max(1, width // tile.of_row)
    return KernelLaunch(of_rows.quantize, math.ceil(scales.numel() / blocks), arguments, warps)


class _Plan(NamedTuple):
    """What launches with a weight of one format and width share.

    Attributes:
        levels: of the format.
        offsets: whether offsets lie behind a row's scales.
        warps: of a program.
        tiles: of a row.
        constants: arguments that are numbers.
    """

    levels: tuple[float, ...]
    offsets: bool
    warps: int
    tiles: int
    constants: dict[str, int]


@lru_cache(maxsize=1024)
def _plan(kernel: str, inputs: int, form: Format, block_size: int, scales: str, columns: int) -> _Plan:
    """Return what a launch needs to know of its weight; a product asks for it each time."""
    encoding, tile = get_scale_encoding(scales, form.signed, form.ggml_divisor), TILES[kernel, inputs]
    row_bytes = form.width.row_bytes(columns)
    shape = tile.shape_constants(row_bytes, block_size * form.bits // 8)
    constants = {
        "columns": columns,
        "row_bytes": row_bytes,
        "BLOCK": block_size,
        "BITS": form.bits,
        "STEPS": (127 if encoding.signed else 255) if encoding.extra_per_row else 0,
        "WHOLE": columns % block_size == 0,
    }
    tiles = math.ceil(row_bytes / (shape["GROUPS"] * shape["GROUP"]))
    return _Plan(form.levels, encoding.offsets, tile.warps, tiles, constants | shape)


def _weight_kernel_arguments(
    kernel: str,
    inputs: int,
    weight: QuantizedTensor,
    columns: int,
    start: int = 0,
    levels: tuple[float, ...] | None = None,
) -> tuple[_Plan, dict[str, Any]]:
    """Return the plan, and the arguments of columns of a stored matrix from ``start``, which begins a block."""
    plan = _plan(kernel, inputs, get_format(weight.format), weight.block_size, weight.scale_encoding, columns)
    packed, scales = _with_contiguous_rows(weight.packed), _with_contiguous_rows(weight.scales)
    if start:
        packed = packed[:, start * plan.constants["BITS"] // 8 :]
        scales = scales[:, start // weight.block_size :]
    return plan, {
        "packed": packed,
        "scales": scales,
        "levels": float32_table(levels or plan.levels, packed.device),
        "packed_stride": packed.stride(0),
        "scales_stride": scales.stride(0),
        **plan.constants,
    }


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    """Return a matrix whose rows' numbers lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _next_power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
