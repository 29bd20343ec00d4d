"""Views and casts of an adapted weight that are adapted weights again: they keep whole matrices, rows or columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem.nn.low_rank_sum import ADAPTED_FUNCTIONS, implements_adapted, is_adapted

__all__: list[str] = []


@implements_adapted(Tensor.__getitem__)
def _getitem(weight: Any, index: Any) -> Any:
    return weight.indexed(index if isinstance(index, tuple) else (index,)) if is_adapted(weight) else NotImplemented


@implements_adapted(Tensor.T.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
def _t(weight: Any) -> Any:
    return weight.swapped() if len(weight.base.shape) == 2 else NotImplemented


@implements_adapted(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _mt(weight: Any) -> Any:
    return weight.swapped()


@implements_adapted(
    Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims
)
def _transpose(weight: Any, dim0: int, dim1: int) -> Any:
    dims = len(weight.base.shape)
    return weight.swapped() if {dim0 % dims, dim1 % dims} == {dims - 1, dims - 2} else NotImplemented


@implements_adapted(Tensor.permute, torch.permute)
def _permute(weight: Any, *given: Any, dims: Any = None) -> Any:
    dims = given if dims is None else dims
    order = [one % len(weight.base.shape) for one in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    last = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
    return weight.swapped() if order == last else NotImplemented


@implements_adapted(Tensor.unbind, torch.unbind, Tensor.__iter__)
def _unbind(weight: Any, dim: int = 0) -> Any:
    if dim != 0 or len(weight.base.shape) < 3 or weight.is_kernel:
        return NotImplemented
    parts = [weight.indexed((number,)) for number in range(weight.base.shape[0])]
    return tuple(parts)


@implements_adapted(Tensor.select, torch.select)
def _select(weight: Any, dim: int, index: int) -> Any:
    return weight.indexed((*[slice(None)] * (dim % len(weight.base.shape)), index))


@implements_adapted(Tensor.narrow, torch.narrow)
def _narrow(weight: Any, dim: int, start: int, length: int) -> Any:
    return weight.indexed((*[slice(None)] * (dim % len(weight.base.shape)), slice(start, start + length)))


@implements_adapted(Tensor.index_select, torch.index_select)
def _index_select(weight: Any, dim: int, index: Tensor) -> Any:
    return weight.indexed((index,)) if dim == 0 else NotImplemented


@implements_adapted(Tensor.split, torch.split)
def _split(weight: Any, sizes: Any, dim: int = 0) -> Any:
    total = weight.base.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    parts, start = [], 0
    for size in sizes:
        parts.append(_narrow(weight, dim, start, size))
        start += size
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


@implements_adapted(Tensor.chunk, torch.chunk)
def _chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    return _split(weight, -(-weight.base.shape[dim] // chunks), dim)


def _register_casts() -> None:
    """Register casts, which apply to the base only: adapters have a dtype of their own."""

    def register(name: str) -> None:
        def cast(weight: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple(one.base if is_adapted(one) else one for one in args)
            kwargs = {key: one.base if is_adapted(one) else one for key, one in kwargs.items()}
            if not is_adapted(weight):  # x.type_as(adapted weight)
                return getattr(weight, name)(*args, **kwargs)
            base = getattr(weight.base, name)(*args, **kwargs)
            if not base.is_floating_point():
                return NotImplemented
            return weight.remade(base, weight.updates)

        ADAPTED_FUNCTIONS[getattr(Tensor, name)] = cast

    for name in ("to", "float", "half", "bfloat16", "double", "type_as", "contiguous"):
        register(name)


_register_casts()


@implements_adapted(Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
def _detach(weight: Any) -> Any:
    updates = tuple(
        one._replace(left=one.left.detach(), right=one.right.detach(), adapter=None) for one in weight.updates
    )
    return weight.remade(weight.base.detach(), updates)


@implements_adapted(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _requires_grad(weight: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise RuntimeError("a weight with adapters is computed and cannot train: the adapters do")
    return weight
