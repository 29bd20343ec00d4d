"""Experts in MXFP4, as gpt-oss has them.

Of a parameter ``<name>``, ``<name>_blocks`` (..., out, in / 32, 16) holds the codes, two in a byte, the first of them
low, and ``<name>_scales`` (..., out, in / 32) the exponents. The parameter is the transpose: (..., in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lowmem.errors import show
from lowmem.io.formats.foreign_tensor import E2M1_CODES, ForeignTensor, nibbles, power_scales, quantized
from lowmem.io.source import Source
from lowmem.quant.packing import pack
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["find"]

_BLOCK = 32


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield each parameter of a checkpoint that is stored so, and the names of its tensors.

    Raises:
        ValueError: blocks without scales, or of other shapes or dtypes.
    """
    for blocks, spec in source.specs.items():
        name = blocks.removesuffix("_blocks")
        scales = source.specs.get(f"{name}_scales")
        if name == blocks or spec.dtype != torch.uint8 or scales is None:
            continue
        if len(spec.shape) < 3 or spec.shape[-1] != _BLOCK // 2 or 0 in spec.shape or scales.shape != spec.shape[:-1]:
            raise ValueError(f"{show(blocks)} is {spec}, and {show(name + '_scales')} {scales}: they do not fit")
        if scales.dtype != torch.uint8:
            raise ValueError(f"{show(name + '_scales')} is {scales.dtype}, and exponents are bytes; get it again")
        shape = (*spec.shape[:-2], spec.shape[-2] * _BLOCK)
        read = _reader(source, name, shape)
        weight = ForeignTensor.of_weight(name, shape, "MXFP4", spec.nbytes + scales.nbytes, read, transposed=True)
        yield weight, {blocks, f"{name}_scales"}


def _reader(source: Source, name: str, shape: tuple[int, ...]) -> Any:
    def read() -> QuantizedTensor:
        scales = power_scales(source.read_tensor(f"{name}_scales"))
        raw = source.read_tensor(f"{name}_blocks").flatten(-2)  # (..., out, in / 2)
        codes = torch.tensor(E2M1_CODES, dtype=torch.uint8)[nibbles(raw).int()]
        return quantized(pack(codes, _BLOCK), scales, shape, "fp4", _BLOCK)

    return read
