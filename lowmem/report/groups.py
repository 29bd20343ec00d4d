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
from lowmem.errors import printable
from lowmem.transforms.summary import LayerSummary, group_name, role_of, summary


@dataclass(frozen=True)
class Group:
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
class Stored:
    """The figures of a variant that ``group_layers`` needs: bytes and errors by path, and total bytes."""

    bytes: Mapping[str, int]
    errors: Mapping[str, float | None]
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> Stored:
        """Return the figures of a model, which may then be freed."""
        rows = {row.path: row for row in summary(model)}
        errors = {path: row.weight_error for path, row in rows.items()}
        return cls({path: row.bytes for path, row in rows.items()}, errors, measure.theoretical_bytes(model))


def group_layers(dense: nn.Module, stored: Mapping[str, Stored]) -> list[Group]:
    """Group the layers of a model, in the order of its modules, with the figures ``stored`` of its variants.

    Buffers of modules without parameters come last, as ``buffers``, so that bytes add up to those of the model.
    """
    members: dict[tuple[object, ...], list[LayerSummary]] = {}
    shapes = {}
    rows = summary(dense)
    for row in rows:
        shapes[row.path] = tuple(_weight(dense.get_submodule(row.path)).shape)
        members.setdefault((role_of(row.path), row.type, shapes[row.path]), []).append(row)
    groups = [_group(found, shapes[found[0].path], dense, stored) for found in members.values()]
    taken = Counter(group.name for group in groups)
    groups = [
        replace(group, name=f"{group.name} ({' x '.join(map(str, group.shape))})") if taken[group.name] > 1 else group
        for group in groups
    ]
    left = {name: made.total - sum(made.bytes.values()) for name, made in stored.items()}
    dense_left = measure.theoretical_bytes(dense) - rows.bytes
    if dense_left or any(left.values()):
        groups.append(Group("buffers", "", (), 0, 0, dense_left, left, dict.fromkeys(left)))
    return groups


def _group(rows: list[LayerSummary], shape: tuple[int, ...], dense: nn.Module, stored: Mapping[str, Stored]) -> Group:
    sizes = {row.path: _norm(_weight(dense.get_submodule(row.path))) for row in rows}
    return Group(
        name=group_name([row.path for row in rows]),
        type=printable(rows[0].type),
        shape=shape,
        layers=len(rows),
        weights=sum(row.weights for row in rows),
        dense_bytes=sum(row.bytes for row in rows),
        bytes={name: sum(made.bytes.get(row.path, 0) for row in rows) for name, made in stored.items()},
        errors={name: _error(made.errors, sizes) for name, made in stored.items()},
    )


def _error(errors: Mapping[str, float | None], sizes: Mapping[str, float]) -> float | None:
    known = {path: error for path in sizes if (error := errors.get(path)) is not None}
    if not known:
        return None
    size = math.hypot(*sizes.values())
    return math.hypot(*(error * sizes[path] for path, error in known.items())) / size if size else 0.0


def _weight(module: nn.Module) -> Tensor:
    """Return the weight of a dense module, or else its first parameter; without any, a tensor of shape ()."""
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False) if not is_lazy(p)}
    return own.get("weight", next(iter(own.values()), torch.zeros((), dtype=torch.float32, device="cpu")))


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) if weight.is_floating_point() else 0.0
