"""Linear layers of GPTQ (AutoGPTQ, GPTQModel) and of AWQ, packed for its "gemm" kernel.

``<layer>.scales`` is float16 (groups, out); a weight is ``scale * (code - zero)``. ``.qweight`` and ``.qzeros`` hold
eight numbers in a word:

* GPTQ: ``.qweight`` int32 (in / 8, out) eight inputs, the first in the lowest bits; ``.qzeros`` int32
  (groups, out / 8) eight outputs. ``.g_idx`` (in,) is the group of each input: with ``desc_act`` the inputs of a
  group lie apart, and are read side by side, in the order ``argsort(g_idx)``. Version 1 stores ``zero - 1``.
* AWQ: ``.qweight`` int32 (in, out / 8) eight outputs: bits 4i to 4i + 3 are output ``_ORDER[i]`` of the eight.
  ``.qzeros`` (groups, out / 8) is packed alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import short_repr
from lowmem.io.formats.code_conversion import LazyIntegerWeight, unpacked_4bit_codes_from_int32
from lowmem.io.formats.foreign_format import ForeignFormat, LayerTensors, LazyForeignTensor, exact_match_predicate
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales")
_BITS = 4  # of the codes that are read


def _iterate_weights_and_tensor_names(
    read_layer: Callable[[LayerTensors, Mapping[str, Any]], LazyForeignTensor],
    format_name: str,
    outputs_per_word: int,
    checkpoint: SafetensorsCheckpoint,
    config: Mapping[str, Any],
) -> Iterator[tuple[LazyForeignTensor, set[str]]]:
    """Yield the weight of each layer with ``outputs_per_word`` outputs for each word of a row, and the names of its
    tensors."""
    for key, words in checkpoint.specs.items():
        layer, _, part = key.rpartition(".")
        scales = checkpoint.specs.get(f"{layer}.scales".lstrip("."))
        if part != "qweight" or scales is None or len(words.shape) != 2 or len(scales.shape) != 2:
            continue
        if scales.shape[1] == outputs_per_word * words.shape[1]:
            parts = LayerTensors.from_checkpoint(
                checkpoint, layer, format_name, _PARTS, ("g_idx",) if outputs_per_word == 1 else ()
            )
            yield read_layer(parts, config), parts.tensor_names


def _check_tensor_dtypes_and_shapes(
    layer_tensors: LayerTensors, in_features: int, zeros_shape: tuple[int, int], has_fitting_shapes: bool
) -> None:
    """Raise a ValueError unless the parts of a layer fit; ``zeros_shape`` is the shape of its zero points."""
    specs = layer_tensors.specs
    groups, outputs = specs["scales"].shape
    layer_tensors.raise_parts_error_unless(
        has_fitting_shapes
        and 0 < groups <= in_features
        and outputs > 0
        and all(specs[part].dtype == torch.int32 for part in ("qweight", "qzeros"))
        and specs["scales"].dtype.is_floating_point
        and specs["qzeros"].shape == zeros_shape
    )


def _check_group_size_if_configured(
    config: Mapping[str, Any], layer_path: str, in_features: int, group_count: int, needs_whole_groups: bool
) -> None:
    """Raise a ValueError unless the ``group_size`` of a config is a layer's; ``needs_whole_groups``: all groups are
    whole."""
    size = config.get("group_size")
    if size is None or (size == -1 and group_count == 1):
        return
    fits = type(size) is int and size > 0 and -(-in_features // size) == group_count
    if not fits or (needs_whole_groups and in_features % min(size, in_features)):
        raise ValueError(
            f"its config.json says group_size={short_repr(size)}, and {short_repr(layer_path)} has {group_count} "
            f"groups of {in_features} inputs"
            "; get both again from one source"
        )


def _gptq_weight_or_refused(layer_tensors: LayerTensors, config: Mapping[str, Any]) -> LazyForeignTensor:
    specs, layer = layer_tensors.specs, layer_tensors.layer
    (words, outputs), (groups, _) = specs["qweight"].shape, specs["scales"].shape
    order = specs.get("g_idx")
    inputs = 8 * words if order is None else math.prod(order.shape)
    bits = config.get("bits", 32 * words / inputs if inputs else 0)
    if bits != _BITS:
        why = f"it has {short_repr(bits)} bits a weight, and 4 are read: take the dense model, or one in 4 bits"
        return layer_tensors.refused_tensor_of_weight("GPTQ", (outputs, inputs), why)
    is_order = order is None or (order.shape == (inputs,) and order.dtype in (torch.int32, torch.int64))
    _check_tensor_dtypes_and_shapes(
        layer_tensors, inputs, (groups, -(-outputs // 8)), inputs == 8 * words and is_order
    )
    _check_group_size_if_configured(config, layer, inputs, groups, needs_whole_groups=order is None)
    # The last group may be shorter
    group = config.get("group_size")
    if group is None and order is not None:
        group = int((layer_tensors.read_part("g_idx") == 0).sum())
    # -1: all inputs
    group = -(-inputs // groups) if group in (None, -1) else int(group)
    if group < 1 or -(-inputs // group) != groups:
        raise ValueError(
            f"the layer {short_repr(layer)} of GPTQ has {groups} groups of {group} of {inputs} inputs; get it again, "
            "with "
            "its config.json"
        )
    return LazyIntegerWeight(
        layer_tensors,
        "GPTQ",
        (outputs, inputs),
        min(group, inputs),
        specs["scales"].dtype,
        codes=lambda: unpacked_4bit_codes_from_int32(layer_tensors.read_part("qweight").T, inputs),
        scales=lambda: layer_tensors.read_part("scales").T,
        zeros=lambda: _read_gptq_zeros_of_either_version(layer_tensors, outputs, config).T,
        groups=None if order is None else lambda: layer_tensors.read_part("g_idx"),
    ).exact_or_refused_foreign_tensor()


def _read_gptq_zeros_of_either_version(
    layer_tensors: LayerTensors, out_features: int, config: Mapping[str, Any]
) -> Tensor:
    """Return the zero point of each group and output, int32 (groups, out)."""
    stored = unpacked_4bit_codes_from_int32(layer_tensors.read_part("qzeros"), out_features).int()
    kind = config.get("checkpoint_format")
    # Symmetric ones tell the version
    if kind is None:
        kind = "gptq_v2" if bool((stored == 8).all()) else "gptq"
        if not config and kind == "gptq" and not bool((stored == 7).all()):
            raise ValueError(
                f"the zero points {short_repr(layer_tensors.tensor_name('qzeros'))} of GPTQ are of version 1 or 2, "
                "and no config.json "
                "beside the file tells; put the one of its folder there"
            )
    # 0 was stored as -1
    return stored if kind == "gptq_v2" else stored + 1 & 15


def _awq_weight_or_refused(layer_tensors: LayerTensors, config: Mapping[str, Any]) -> LazyForeignTensor:
    (inputs, words), (groups, outputs) = layer_tensors.specs["qweight"].shape, layer_tensors.specs["scales"].shape
    _check_tensor_dtypes_and_shapes(layer_tensors, inputs, (groups, words), groups > 0 and inputs % groups == 0)
    _check_group_size_if_configured(config, layer_tensors.layer, inputs, groups, needs_whole_groups=True)

    def read_unpacked_reordered_transposed(tensor_suffix: str) -> Tensor:
        """Return codes or zero points: uint8 (out, inputs or groups)."""
        eights = unpacked_4bit_codes_from_int32(layer_tensors.read_part(tensor_suffix), outputs).unflatten(
            -1, (-1, 8)
        )
        sorted_outputs: Tensor = eights[..., torch.tensor(_ORDER, dtype=torch.int64, device="cpu").argsort()]
        return sorted_outputs.flatten(-2).T.contiguous()

    return LazyIntegerWeight(
        layer_tensors,
        "AWQ",
        (outputs, inputs),
        inputs // groups,
        layer_tensors.specs["scales"].dtype,
        codes=lambda: read_unpacked_reordered_transposed("qweight"),
        scales=lambda: layer_tensors.read_part("scales").T,
        zeros=lambda: read_unpacked_reordered_transposed("qzeros"),
    ).exact_or_refused_foreign_tensor()


GPTQ = ForeignFormat(
    "gptq",
    partial(_iterate_weights_and_tensor_names, _gptq_weight_or_refused, "GPTQ", 1),  # a row packs inputs
    _PARTS[:2],
    "gptq",
    {"checkpoint_format": exact_match_predicate("gptq", "gptq_v2", None)},
)
AWQ = ForeignFormat(
    "awq",
    partial(_iterate_weights_and_tensor_names, _awq_weight_or_refused, "AWQ", 8),
    _PARTS[:2],
    "awq",
    {"bits": exact_match_predicate(4), "version": lambda value: isinstance(value, str) and value.lower() == "gemm"},
)
