"""Weight normalization with a stored direction v: ``w = g v / ||v||``. v is dequantized in chunks of at most 1 MiB,
so that a call makes no second dense weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowmem.nn.stored_tensor import StoredTensor, implements, is_recorded
from lowmem.quant.tensor import row_chunks


@implements("_weight_norm_interface")
def _weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    """Return w, and the norms of v over all dimensions but ``dim`` in the shape of g."""
    if not _is_rows(v) or isinstance(g, StoredTensor):
        return NotImplemented
    norms = _summed(v, dim, lambda _, rows: rows.square()).sqrt().view(g.shape)
    ratio, out = g / norms, torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for part, rows in _chunks(v):
        torch.mul(rows, ratio[part] if dim == 0 else ratio, out=out[part])
    return out, norms


@implements("_weight_norm_interface_backward")
def _weight_norm_backward(grad: Any, v: Any, g: Any, norms: Any, dim: int) -> Any:
    """Return the gradient of g; v is frozen."""
    if not _is_rows(v) or isinstance(g, StoredTensor):
        return NotImplemented
    return None, _summed(v, dim, lambda part, rows: grad[part] * rows).view(g.shape) / norms


def _is_rows(v: Any) -> bool:
    return isinstance(v, StoredTensor) and v.lead == 1 and not v.swapped and not is_recorded(*v.parts)


def _chunks(v: StoredTensor) -> Iterator[tuple[slice, Tensor]]:
    for part in row_chunks(v.shape[0], math.prod(v.tail), v.dtype.itemsize, device=v.device):
        yield part, v.like([one[part] for one in v.parts]).dequantize()


def _summed(v: StoredTensor, dim: int, values: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """Return the sums of values, made of each chunk of v, over all dimensions but ``dim``."""
    others = [other for other in range(v.dim()) if other != dim % v.dim()]
    sums = [values(part, rows).sum(others) for part, rows in _chunks(v)]
    return torch.cat(sums) if dim == 0 else torch.stack(sums).sum(0)
