"""Groups layers of the same role, type and shape: ``layers.0-29.mlp.up_proj`` stands for thirty layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowmem import measure
from lowmem.errors import printable_line
from lowmem.transforms.model_summary import (
    LayerSummary,
    display_name_with_index_ranges,
    path_parts_with_none_for_indices,
    summary,
)


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one type and shape whose paths differ only in indices.

    Attributes:
        name: the path with the indices that occur: ``layers.0-29.mlp.up_proj``.
        type: of the dense modules.
        shape: of the weight of each, or else of the first parameter; () for ``buffers``.
        layers: their number.
        weights: of all of them, each counted once in the model.
        dense_bytes: of all of them in the dense model.
        bytes: of all of them in each variant, adapters included.
        errors: for each variant, ``rms(stored - weight) / rms(weight)`` over all of them; None where none is stored
            otherwise.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    layers: int
    weights: int
    dense_bytes: int
    bytes: Mapping[str, int]
    errors: Mapping[str, float | None]


@dataclass(frozen=True)
class VariantBytesAndErrors:
    """The figures of a variant that ``group_layers`` needs: bytes and errors by path, and total bytes."""

    bytes: Mapping[str, int]
    errors: Mapping[str, float | None]
    total: int

    @classmethod
    def from_model(cls, model: nn.Module) -> VariantBytesAndErrors:
        """Return the figures of a model, which may then be freed."""
        rows = {row.path: row for row in summary(model)}
        errors = {path: row.weight_error for path, row in rows.items()}
        return cls({path: row.bytes for path, row in rows.items()}, errors, measure.theoretical_bytes(model))


def group_layers(dense_model: nn.Module, figures_by_variant: Mapping[str, VariantBytesAndErrors]) -> list[LayerGroup]:
    """Group the layers of a model, in the order of its modules, with the figures ``figures_by_variant`` of its
    variants.

    Buffers of modules without parameters come last, as ``buffers``, so that bytes add up to those of the model.
    """
    members: dict[tuple[object, ...], list[LayerSummary]] = {}
    shapes = {}
    rows = summary(dense_model)
    for row in rows:
        shapes[row.path] = tuple(_weight_or_first_parameter_or_zero(dense_model.get_submodule(row.path)).shape)
        members.setdefault((path_parts_with_none_for_indices(row.path), row.type, shapes[row.path]), []).append(row)
    groups = [
        _make_layer_group(group_rows, shapes[group_rows[0].path], dense_model, figures_by_variant)
        for group_rows in members.values()
    ]
    taken = Counter(group.name for group in groups)
    groups = [
        replace(group, name=f"{group.name} ({' x '.join(map(str, group.shape))})") if taken[group.name] > 1 else group
        for group in groups
    ]
    left = {name: made.total - sum(made.bytes.values()) for name, made in figures_by_variant.items()}
    dense_left = measure.theoretical_bytes(dense_model) - rows.bytes
    if dense_left or any(left.values()):
        groups.append(LayerGroup("buffers", "", (), 0, 0, dense_left, left, dict.fromkeys(left)))
    return groups


def _make_layer_group(
    rows: list[LayerSummary],
    shape: tuple[int, ...],
    dense_model: nn.Module,
    figures_by_variant: Mapping[str, VariantBytesAndErrors],
) -> LayerGroup:
    sizes = {
        row.path: _float_weight_norm_or_zero(_weight_or_first_parameter_or_zero(dense_model.get_submodule(row.path)))
        for row in rows
    }
    return LayerGroup(
        name=display_name_with_index_ranges([row.path for row in rows]),
        type=printable_line(rows[0].type),
        shape=shape,
        layers=len(rows),
        weights=sum(row.weights for row in rows),
        dense_bytes=sum(row.bytes for row in rows),
        bytes={name: sum(made.bytes.get(row.path, 0) for row in rows) for name, made in figures_by_variant.items()},
        errors={
            name: _combined_relative_error_or_none(made.errors, sizes) for name, made in figures_by_variant.items()
        },
    )


def _combined_relative_error_or_none(
    errors_by_path: Mapping[str, float | None], norms_by_path: Mapping[str, float]
) -> float | None:
    known = {path: error for path in norms_by_path if (error := errors_by_path.get(path)) is not None}
    if not known:
        return None
    size = math.hypot(*norms_by_path.values())
    return math.hypot(*(error * norms_by_path[path] for path, error in known.items())) / size if size else 0.0


def _weight_or_first_parameter_or_zero(module: nn.Module) -> Tensor:
    """Return the weight of a dense module, or else its first parameter; without any, a tensor of shape ()."""
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=False) if not is_lazy(p)}
    return parameters.get(
        "weight", next(iter(parameters.values()), torch.zeros((), dtype=torch.float32, device="cpu"))
    )


def _float_weight_norm_or_zero(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) if weight.is_floating_point() else 0.0
