"""Linear layers of compressed-tensors: integers of 4 bits ("pack-quantized") and MXFP4 ("mxfp4-pack-quantized").

Integers: ``<layer>.weight_packed`` int32 (out, in / 8), the first in the lowest bits, plus 8; ``.weight_scale``
(out, groups); ``.weight_shape``; of asymmetric ones ``.weight_zero_point`` int32 (out / 8, groups), packed along the
outputs. MXFP4: ``.weight_packed`` uint8 (out, in / 2), the first code low; ``.weight_scale``
uint8 (out, in / 32), the exponents.

Integers of 8 bits are refused with their values, since no format here has a level for -128, too: packed likewise,
four in a word, plus 128; or as they are ("int-quantized"), ``.weight`` int8 (out, in). Floats of 8 bits
("float-quantized", ``.weight`` float8) are refused without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import show
from lowmem.io.formats.foreign_tensor import (
    E2M1_CODES,
    ForeignTensor,
    as_bytes,
    gathering,
    integer_refusal,
    integer_values,
    integer_weight,
    nibbles,
    power_scales,
    quantized,
)
from lowmem.io.formats.gptq import unpacked_outputs
from lowmem.io.source import Source
from lowmem.quant.packing import pack
from lowmem.quant.tensor import QuantizedTensor

__all__ = ["FP8", "INT8", "find"]

Found = tuple[ForeignTensor, set[str]]

INT8, FP8 = "compressed-tensors int8", "FP8"
_EIGHT_BITS = "it has 8 bits a weight, and 4 are kept: take the dense model, or one in 4 bits"
_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_OTHERS = ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")


def find(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[ForeignTensor, set[str]]]:
    """Yield the weight of each layer of compressed-tensors, and the names of its tensors.

    Raises:
        ValueError: a layer that lacks a part, or whose parts do not fit.
    """
    for name in source.specs:
        layer, _, part = name.rpartition(".")
        if part == "weight_packed":
            yield _layer(source, layer, config)
        elif part == "weight" and source.specs[name].dtype == torch.int8 and f"{name}_scale" in source.specs:
            yield _plain_integers(source, layer, config)
        elif part == "weight" and source.specs[name].dtype in _FLOATS and f"{name}_scale" in source.specs:
            own = (f"{layer}.{one}".lstrip(".") for one in ("weight", "weight_scale", *_OTHERS))
            parts = source.specs.keys() & own
            nbytes = sum(source.specs[one].nbytes for one in parts)
            yield ForeignTensor.refused(name, source.specs[name].shape, FP8, nbytes, _EIGHT_BITS), parts


def _layer(source: Source, layer: str, config: Mapping[str, Any]) -> tuple[ForeignTensor, set[str]]:
    parts = ("weight_packed", "weight_scale", *_OTHERS)
    names = {part: f"{layer}.{part}".lstrip(".") for part in parts}
    names = {part: name for part, name in names.items() if name in source.specs}
    if "weight_scale" not in names:
        raise ValueError(f"the layer {show(layer)} of compressed-tensors lacks its weight_scale; get it again")
    specs = {part: source.specs[name] for part, name in names.items()}
    packed, scale = specs["weight_packed"], specs["weight_scale"]
    weight, nbytes = f"{layer}.weight".lstrip("."), sum(spec.nbytes for spec in specs.values())
    claimed = set(names.values())

    def refused(kind: str, shape: tuple[int, ...], why: str, values: Any = None) -> Found:
        return ForeignTensor.refused(weight, shape, kind, nbytes, why, values), claimed

    if packed.dtype == torch.int32 and len(packed.shape) == 2 and scale.shape == (1,):
        why = "it has one scale for the tensor, and scales of rows or groups are read: take the dense model"
        return refused("compressed-tensors", _shape(source, names, specs, layer), why)
    if len(packed.shape) < 2 or len(scale.shape) != len(packed.shape) or 0 in (*packed.shape, *scale.shape):
        _misfit(layer, specs)
    if packed.dtype == torch.uint8:
        shape = (*packed.shape[:-1], 2 * packed.shape[-1])
        if scale.dtype != torch.uint8:
            why = "its scales are 8-bit floats times a scale of the tensor: take the dense model, or one in MXFP4"
            return refused("NVFP4", shape, why)
        if scale.shape != (*shape[:-1], -(-shape[-1] // 32)):
            _misfit(layer, specs)
        _check_scheme(config, layer, min(32, shape[-1]), shape, "weight_zero_point" in names)
        return ForeignTensor.of_weight(weight, shape, "MXFP4", nbytes, _mxfp4(source, names, shape)), claimed
    if packed.dtype != torch.int32 or not scale.dtype.is_floating_point:
        _misfit(layer, specs)
    shape = _shape(source, names, specs, layer)
    columns, groups = shape[-1], scale.shape[-1]
    bits = 8 if packed.shape == (*shape[:-1], -(-columns // 4)) and columns > 4 else 4
    if packed.shape != (*shape[:-1], -(-columns * bits // 32)):
        bits = round(32 * packed.shape[-1] / columns)
        why = f"it has about {bits} bits a weight, and 4 are read: take the dense model, or one in 4 bits"
        return refused("compressed-tensors", shape, why)
    if scale.shape[:-1] != shape[:-1] or columns % groups:
        _misfit(layer, specs)
    stored = _Integers(source, names, shape, columns // groups, bits)
    if "weight_zero_point" in names:
        zeros = specs["weight_zero_point"]
        if zeros.dtype != torch.int32 or zeros.shape != (*shape[:-2], -(-shape[-2] * bits // 32), groups):
            _misfit(layer, specs)
    order = None
    if "weight_g_idx" in names:
        groups_of = source.read_tensor(names["weight_g_idx"]).long()
        in_order = torch.arange(columns) // stored.group
        if groups_of.shape != in_order.shape:
            _misfit(layer, specs)
        if not bool(((groups_of == in_order) | (groups_of == -1)).all()):
            try:
                gathering(groups_of, stored.group)
            except ValueError as uneven:
                return refused("compressed-tensors", shape, str(uneven))
            order = stored.order
    _check_scheme(config, layer, stored.group, shape, "weight_zero_point" in names)
    if bits == 8:
        return refused(INT8, shape, _EIGHT_BITS, stored.values)
    reason = integer_refusal(columns, stored.group, scale.dtype, stored.zeros())
    if reason is not None:
        return refused("compressed-tensors", shape, reason, stored.values)
    read = stored.read if order is None else stored.read_gathered
    return ForeignTensor.of_weight(weight, shape, "compressed-tensors", nbytes, read, order=order), claimed


def _plain_integers(source: Source, layer: str, config: Mapping[str, Any]) -> Found:
    """Return a layer of "int-quantized": its codes are its weight, with a scale for the tensor, a row or a group."""
    names = {part: f"{layer}.{part}".lstrip(".") for part in ("weight", "weight_scale", *_OTHERS)}
    names = {part: name for part, name in names.items() if name in source.specs}
    specs = {part: source.specs[name] for part, name in names.items()}
    shape, scale, zero = specs["weight"].shape, specs["weight_scale"], specs.get("weight_zero_point")
    fits = len(shape) >= 2 and 0 not in (*shape, *scale.shape) and scale.dtype.is_floating_point
    of_rows = scale.shape[:-1] == shape[:-1] and shape[-1] % max(1, *scale.shape[-1:]) == 0
    fits = fits and (of_rows or scale.shape in ((1,), (1, 1)))
    if not fits or (zero is not None and (zero.shape != scale.shape or zero.dtype != torch.int8)):
        _misfit(layer, specs)
    _check_scheme(config, layer, shape[-1] // scale.shape[-1], shape, zero is not None, scale.shape in ((1,), (1, 1)))

    def values() -> Tensor:
        scales = source.read_tensor(names["weight_scale"])
        zeros = torch.zeros(scales.shape) if zero is None else source.read_tensor(names["weight_zero_point"])
        of_column = torch.arange(shape[-1]) // (shape[-1] // scales.shape[-1])
        return integer_values(source.read_tensor(names["weight"]), scales, of_column, zeros)

    nbytes, known = sum(spec.nbytes for spec in specs.values()), None if "weight_g_idx" in names else values
    return ForeignTensor.refused(names["weight"], shape, INT8, nbytes, _EIGHT_BITS, known), set(names.values())


def _check_scheme(
    config: Mapping[str, Any], layer: str, group: int, shape: tuple[int, ...], has_zeros: bool, is_whole: bool = False
) -> None:
    """Raise unless one of the schemes of a config can be that of a layer.

    Args:
        config: what config.json says of the quantization.
        layer: its path.
        group: columns that share a scale.
        shape: of its weight.
        has_zeros: whether it has zero points.
        is_whole: whether it has one scale for the tensor.

    Raises:
        ValueError: none has its groups, or none does with so few parts: zero points are missing.
    """
    groups = config.get("config_groups")
    found = [one for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []
    schemes = [one["weights"] for one in found if isinstance(one.get("weights"), dict)]
    wrong = [_wrong_field(weights, group, shape, is_whole) for weights in schemes]
    if wrong and wrong[0] is not None and None not in wrong:
        raise ValueError(
            f"its config.json says {wrong[0]}={show(schemes[0][wrong[0]])}, and {show(layer)} has groups of {group} "
            f"of its {shape[-1]} columns; get both again from one source"
        )
    if schemes and not has_zeros and all(weights.get("symmetric") is False for weights in schemes):
        raise ValueError(f"its config.json says that {show(layer)} has zero points, and it has none; get it again")


def _wrong_field(weights: Mapping[str, Any], group: int, shape: tuple[int, ...], is_whole: bool) -> str | None:
    """Return the field of a scheme that cannot be that of a layer, as ``_check_scheme`` has it; or None."""
    size, strategy, columns = weights.get("group_size"), weights.get("strategy"), shape[-1]
    if size is not None and (type(size) is not int or (columns if size == -1 else min(size, columns)) != group):
        return "group_size"
    fits = {"channel": group == columns and (not is_whole or shape[0] == 1), "group": not is_whole}
    fits |= {"tensor": is_whole or (shape[0] == 1 and group == columns), "block": False, "token": False}
    if strategy is not None and not (isinstance(strategy, str) and fits.get(strategy, True)):
        return "strategy"
    return None if isinstance(weights.get("actorder"), str | bool | None) else "actorder"


def _misfit(layer: str, specs: Mapping[str, Any]) -> None:
    shown = ", ".join(f"{part} {spec.dtype} {spec.shape}" for part, spec in specs.items())
    raise ValueError(f"the parts of the layer {show(layer)} of compressed-tensors do not fit: {shown}; get it again")


def _shape(source: Source, names: Mapping[str, str], specs: Mapping[str, Any], layer: str) -> tuple[int, ...]:
    spec, packed = specs.get("weight_shape"), specs["weight_packed"].shape
    if spec is None or spec.dtype not in (torch.int32, torch.int64) or spec.shape != (len(packed),):
        _misfit(layer, specs)
    shape = tuple(source.read_tensor(names["weight_shape"]).tolist())
    if shape[:-1] != packed[:-1] or not 0 < shape[-1] <= 32 * packed[-1]:
        raise ValueError(f"the layer {show(layer)} says its shape is {show(shape)}, and its codes are {packed}")
    return shape


def _mxfp4(source: Source, names: Mapping[str, str], shape: tuple[int, ...]) -> Callable[[], QuantizedTensor]:
    def read() -> QuantizedTensor:
        scales = power_scales(source.read_tensor(names["weight_scale"]))
        codes = nibbles(source.read_tensor(names["weight_packed"]))
        codes = torch.tensor(E2M1_CODES, dtype=torch.uint8)[codes.int()]
        return quantized(pack(codes, 32), scales, shape, "fp4", 32)

    return read


@dataclass(frozen=True)
class _Integers:
    """The parts of a layer of integers."""

    source: Source
    names: Mapping[str, str]
    shape: tuple[int, ...]
    group: int
    bits: int = 4

    def _unpacked(self, words: Tensor, count: int) -> Tensor:
        """Return the first ``count`` numbers of each row of words: int32 (n, words) -> uint8 (n, count)."""
        return unpacked_outputs(words, count) if self.bits == 4 else as_bytes(words)[:, :count]

    def groups(self) -> Tensor:
        """Return the group of each column."""
        in_order = torch.arange(self.shape[-1]) // self.group
        if "weight_g_idx" not in self.names:
            return in_order
        given = self.source.read_tensor(self.names["weight_g_idx"]).long()
        return torch.where(given == -1, in_order, given)

    def order(self) -> Tensor:
        """Return the columns in the order of their groups: int32 (in,)."""
        return gathering(self.groups(), self.group)

    def codes(self) -> Tensor:
        """Return the codes: uint8 (..., out, in)."""
        words = self.source.read_tensor(self.names["weight_packed"])
        return self._unpacked(words.flatten(0, -2), self.shape[-1]).reshape(self.shape)

    def zeros(self) -> Tensor | None:
        """Return the zero points, which are packed along the outputs: uint8 (..., out, groups); or None."""
        if "weight_zero_point" not in self.names:
            return None
        words = self.source.read_tensor(self.names["weight_zero_point"]).mT  # (..., groups, out / 8)
        codes = self._unpacked(words.flatten(0, -2), self.shape[-2])
        return codes.reshape(*words.shape[:-1], self.shape[-2]).mT

    def scales(self) -> Tensor:
        """Return the scales, (..., out, groups)."""
        return self.source.read_tensor(self.names["weight_scale"])

    def read(self) -> QuantizedTensor:
        """Return the weight."""
        return integer_weight(self.codes(), self.scales(), self.group, self.zeros())

    def read_gathered(self) -> QuantizedTensor:
        """Return the weight, with its columns in the order of their groups."""
        return integer_weight(self.codes()[..., self.order()], self.scales(), self.group, self.zeros())

    def values(self) -> Tensor:
        """Return the weight in float32."""
        scales, zeros = self.scales(), self.zeros()
        if zeros is None:
            zeros = torch.full(scales.shape, 2 ** (self.bits - 1))
        return integer_values(self.codes(), scales, self.groups(), zeros)
