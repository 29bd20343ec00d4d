"""Weight normalization with a stored direction v: ``w = g v / ||v||``. v is dequantized in chunks of at most 1 MiB,
so that a call makes no second dense weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowmem.nn.stored_tensor import StoredTensor, implements_for_stored, needs_dispatcher
from lowmem.quant.tensor import row_slices_within_scratch


@implements_for_stored("_weight_norm_interface")
def _stored_weight_norm(direction: Any, magnitude: Any, dim: int = 0) -> Any:
    """Return w, and the norms of v over all dimensions but ``dim`` in the shape of g."""
    if not _is_row_chunkable_stored(direction) or isinstance(magnitude, StoredTensor):
        return NotImplemented
    norms = _sum_over_other_dims_in_chunks(direction, dim, lambda _, rows: rows.square()).sqrt().view(magnitude.shape)
    ratio, out = magnitude / norms, torch.empty(direction.shape, dtype=direction.dtype, device=direction.device)
    for part, rows in _iterate_dequantized_chunks(direction):
        torch.mul(rows, ratio[part] if dim == 0 else ratio, out=out[part])
    return out, norms


@implements_for_stored("_weight_norm_interface_backward")
def _stored_weight_norm_backward(grad: Any, direction: Any, magnitude: Any, norms: Any, dim: int) -> Any:
    """Return the gradient of g; v is frozen."""
    if not _is_row_chunkable_stored(direction) or isinstance(magnitude, StoredTensor):
        return NotImplemented
    return None, _sum_over_other_dims_in_chunks(direction, dim, lambda part, rows: grad[part] * rows).view(
        magnitude.shape
    ) / norms


def _is_row_chunkable_stored(direction: Any) -> bool:
    return (
        isinstance(direction, StoredTensor)
        and direction.leading_dim_count == 1
        and not direction.swapped
        and not needs_dispatcher(*direction.parts)
    )


def _iterate_dequantized_chunks(direction: StoredTensor) -> Iterator[tuple[slice, Tensor]]:
    for part in row_slices_within_scratch(
        direction.shape[0], math.prod(direction.tail), direction.dtype.itemsize, device=direction.device
    ):
        yield part, direction.with_parts([stored_part[part] for stored_part in direction.parts]).dequantize()


def _sum_over_other_dims_in_chunks(
    direction: StoredTensor, dim: int, chunk_values: Callable[[slice, Tensor], Tensor]
) -> Tensor:
    """Return the sums of values, made of each chunk of v, over all dimensions but ``dim``."""
    others = [other for other in range(direction.dim()) if other != dim % direction.dim()]
    sums = [chunk_values(part, rows).sum(others) for part, rows in _iterate_dequantized_chunks(direction)]
    return torch.cat(sums) if dim == 0 else torch.stack(sums).sum(0)
