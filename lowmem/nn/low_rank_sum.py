"""The base class of adapted weights, ``W + sum s B A``, and the table of torch functions that are implemented for
them, with the views. All others get the sum as a dense tensor, differentiable in A and B."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem.kernels.torch_versions import leave_to_eager
from lowmem.nn.adapter import Layout, Update
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.nn.torch_functions import METADATA, name_of, registers_in, written_by

REFUSAL = (
    "a weight with adapters, which is computed: write to the layer's own parameter, or merge the adapters first, "
    "lowmem.merge(model)"
)
"""End of the error message for writes to an adapted weight."""


ADAPTED_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Torch function -> its implementation, called with the same arguments; NotImplemented: use the dense sum."""

_FIRST = ("input", "tensor")  # names of first arguments, which callers may pass by keyword
_ELLIPSIS = type(...)
_PYTHON = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


implements_adapted = partial(registers_in, ADAPTED_FUNCTIONS)


class LowRankSum:
    """``base + sum s left right``.

    Attributes:
        base: the weight without adapters.
        updates: the adapters' changes, of matrices (*stack, rows, columns); of a kernel, ``left`` is B and ``right``
            A.
        holds: the parameter's layout; views have a layout of kind "linear".
        known: the result of the next product with the base, if it is known already; None for all other weights.
    """

    base: Any
    updates: tuple[Update, ...]
    holds: Layout
    known: Tensor | None

    @property
    def is_kernel(self) -> bool:
        """Whether it is the kernel of a convolution."""
        return "kernel" in self.holds.kind

    def values(self) -> Tensor:
        """Return the weight as a dense tensor, differentiable in the adapters."""
        base = self.base
        total: Tensor = base.dequantize() if isinstance(base, StoredTensor) else base
        for update in self.updates:
            change = self.holds.weight(update.values()) if self.is_kernel else update.values()
            total = total + change.to(total.dtype)
        return total

    def of_rows(self, x: Tensor, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Return ``function(x, base, *arguments)``, or ``known`` if that is set."""
        return function(x, self.base, *arguments) if self.known is None else self.known

    def like(self, base: Any, updates: Sequence[Update]) -> Any:
        """Return an adapted weight over views of this one's base and updates."""
        return self.remade(base, updates, Layout(tuple(base.shape), "linear"))

    def remade(
        self, base: Any, updates: Sequence[Update], layout: Layout | None = None, known: Tensor | None = None
    ) -> Any:
        """Return a weight with another base and other updates; layout None: this weight's."""
        raise NotImplementedError

    def indexed(self, index: tuple[Any, ...]) -> Any:
        """Return ``weight[index]`` as an adapted weight; NotImplemented if its elements do not form matrices."""
        dims = len(self.base.shape)
        kinds = [type(one) for one in index]
        if _ELLIPSIS in kinds:
            at = kinds.index(_ELLIPSIS)
            index = (*index[:at], *[slice(None)] * (dims - len(index) + 1), *index[at + 1 :])
        if self.is_kernel:
            return self._rows_of_kernel(index)
        full = (*index, *[slice(None)] * (dims - len(index)))
        stack, matrix = full[:-2], full[-2:]
        if len(full) != dims or len(matrix) < 2 or not all(map(_keeps_matrices, stack)):
            return NotImplemented
        row, column = matrix
        of_rows, of_columns = (*stack, row), (*stack, slice(None), column)
        if column == slice(None) and all(type(one) is int for one in of_rows):  # a row, to which a write is an error
            base = self.base[index]
            return self.like(base, [one.view(one.left[of_rows], one.right[of_columns]) for one in self.updates])
        if not isinstance(column, slice) or not (isinstance(row, slice) or (not stack and _is_list(row))):
            return NotImplemented
        if sum(not isinstance(one, slice) for one in full) > 1:
            return NotImplemented
        if len(index) == 1 and dims == 3 and (number := _whole_number(index[0])) is not None:
            return self.like(self.base[number], [one.of_matrix(number) for one in self.updates])
        base = self.base[full] if len(index) > 1 else self.base[index[0]]
        return self.like(
            base,
            [one.view(one.left[of_rows], one.right[of_columns]) for one in self.updates],
        )

    def _rows_of_kernel(self, index: tuple[Any, ...]) -> Any:
        """Return rows of a kernel, to which a write is an error; NotImplemented for any other index."""
        if self.holds.kind != "kernel" or len(index) != 1 or type(index[0]) not in (int, slice):
            return NotImplemented
        base = self.base[index[0]]
        updates = [one.view(one.left[index[0]], one.right) for one in self.updates]
        return self.remade(base, updates, Layout(tuple(base.shape), "kernel rows"))

    def swapped(self) -> Any:
        """Return the weight with its matrices transposed; NotImplemented for a kernel."""
        if self.is_kernel:
            return NotImplemented
        return self.like(
            self.base.transpose(-1, -2),
            [one.view(one.right.mT, one.left.mT) for one in self.updates],
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = ADAPTED_FUNCTIONS.get(function)
        if own is None and not isinstance(
            function, _PYTHON
        ):  # a custom operator, registered in ADAPTED_FUNCTIONS by name
            own = ADAPTED_FUNCTIONS.get(str(function).removesuffix(".default"))
        if own is not None and "out" not in kwargs:
            result = own(*args, **kwargs) if args else _call_by_name(own, kwargs)
            if result is not NotImplemented:
                return result
        if function in METADATA:
            return cls.read(function, *args, **kwargs)
        return on_values(function, args, kwargs)

    @classmethod
    def read(cls, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function that needs no values, such as ``size``."""
        raise NotImplementedError


# a graph of its own, after a graph break, could lose a write to what this returns
leave_to_eager(LowRankSum.__torch_function__.__func__)  # type: ignore[attr-defined]


def is_adapted(value: Any) -> bool:
    """Whether a value is a weight with adapters."""
    return isinstance(value, LowRankSum)


def _call_by_name(function: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Call an implementation whose first argument the caller has passed by keyword."""
    first = [name for name in _FIRST if name in kwargs]
    rest = {name: value for name, value in kwargs.items() if name not in first}
    return function(*[kwargs[name] for name in first], **rest)


def _whole_number(index: Any) -> int | None:
    """Return the index of one matrix of a stack as an int; None if it is none, or a tensor that is being traced."""
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        return None if torch.compiler.is_compiling() else int(index)
    return index if type(index) is int else None


def _is_list(index: Any) -> bool:
    return (isinstance(index, Tensor) and index.dim() == 1) or isinstance(index, list)


def _keeps_matrices(index: Any) -> bool:
    """Whether an index of one of the stack's dimensions selects whole matrices."""
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) and index.dim() > 1:
        return False  # a mask over several dimensions
    return isinstance(index, (slice, int, Tensor, list))


def on_values(function: Any, args: Any, kwargs: Any) -> Any:
    """Call a function with the dense sums of adapted weights."""
    if any(map(is_adapted, written_by(function, args, kwargs))):
        raise RuntimeError(f"{name_of(function)} would write to {REFUSAL}")
    known: list[tuple[Any, Tensor]] = []

    def dense(one: Any) -> Any:
        if not is_adapted(one):
            return one
        for weight, values in known:
            if weight is one:
                return values
        known.append((one, one.values()))
        return known[-1][1]

    args, kwargs = torch.utils._pytree.tree_map(dense, (args, kwargs))
    return function(*args, **kwargs)


# Views and casts that are adapted weights again: they keep whole matrices, rows or columns.


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
    parts = [weight.indexed((number,)) for number in range(weight.base.shape[0])] if dim == 0 else [NotImplemented]
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


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
