"""A weight with adapters, ``W + sum s B A``, for whoever computes with it: by two thin products, without making it.

Products, gathers and convolutions compute with W as before and add the low-rank product of their input. Views that
keep matrices whole are such weights again. Everything else gets the values, dense and differentiable in A and B.
"""

from __future__ import annotations

import string
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_parameter_registration_hook

from lowmem.nn.adapter import Layout, Update, add_low_rank
from lowmem.nn.grouped import grouped_matmul
from lowmem.nn.stored import StoredTensor
from lowmem.nn.stored_functions import attention

__all__ = ["METADATA", "AdaptedWeight", "LowRankSum", "adapted_weight", "writes_in_place"]

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Function of torch -> its implementation, called with its arguments, which may return NotImplemented."""

_F = TypeVar("_F", bound=Callable[..., Any])
_ELLIPSIS = type(...)
_PYTHON = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def adapted_weight(base: Any, updates: Sequence[Update], layout: Layout, known: Tensor | None = None) -> Any:
    """Return a weight with adapters.

    Args:
        base: the weight without: a Tensor or StoredTensor.
        updates: of the adapters, in the order in which they are added.
        layout: how the weight holds matrices.
        known: the product with the base, where it is known.
    """
    kind = _Traced if torch.compiler.is_compiling() else AdaptedWeight  # Dynamo cannot make a tensor of another class
    return kind(base, tuple(updates), layout, known)


class LowRankSum:
    """``base + sum s left right``, and what can be done with it.

    Attributes:
        base: without adapters.
        updates: their changes, of matrices (*stack, rows, columns); for a kernel B and A.
        holds: its layout as a whole; of kind "linear" in views, too.
        known: the product with the base, where it is known: then it is for one product with the whole weight.
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

    def added_to(self, known: Tensor) -> Any:
        """Return this weight for one product, of which that with the base is known."""
        return adapted_weight(self.base, self.updates, self.holds, known)

    def of_rows(self, x: Tensor, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Return ``function(x, base, *arguments)``."""
        return function(x, self.base, *arguments) if self.known is None else self.known

    def like(self, base: Any, updates: Sequence[Update]) -> Any:
        """Return a weight of other matrices, which come of this one's."""
        layout = Layout(tuple(base.shape), "linear")
        return type(self)(base, tuple(updates), layout)  # type: ignore[call-arg]

    def indexed(self, index: tuple[Any, ...]) -> Any:
        """Return what an index keeps of matrices; NotImplemented where it is not matrices again."""
        dims = len(self.updates[0].left.shape)
        if _ELLIPSIS in map(type, index):
            at = [type(one) for one in index].index(_ELLIPSIS)
            index = (*index[:at], *[slice(None)] * (dims - len(index) + 1), *index[at + 1 :])
        full = (*index, *[slice(None)] * (dims - len(index)))
        stack, (row, column) = full[:-2], full[-2:]
        if len(full) != dims or self.is_kernel or not all(map(_keeps_matrices, stack)):
            return NotImplemented
        if not isinstance(column, slice) or not (isinstance(row, slice) or (not stack and _is_list(row))):
            return NotImplemented
        if sum(not isinstance(one, slice) for one in full) > 1:
            return NotImplemented
        of_rows, of_columns = (*stack, row), (*stack, slice(None), column)
        base = self.base[full] if len(index) > 1 else self.base[index[0]]
        return self.like(
            base,
            [one._replace(left=one.left[of_rows], right=one.right[of_columns]) for one in self.updates],
        )

    def swapped(self) -> Any:
        """Return the weight with its matrices transposed; NotImplemented for a kernel."""
        if self.is_kernel:
            return NotImplemented
        return self.like(
            self.base.transpose(-1, -2),
            [one._replace(left=one.right.mT, right=one.left.mT) for one in self.updates],
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = FUNCTIONS.get(function)
        if own is None and not isinstance(function, _PYTHON):  # an operator that a library has registered
            own = FUNCTIONS.get(str(function).removesuffix(".default"))
        if own is not None:
            result = own(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if function in METADATA:
            return cls.read(function, *args, **kwargs)
        return _on_values(function, args, kwargs)

    @classmethod
    def read(cls, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what needs no values."""
        raise NotImplementedError


class AdaptedWeight(LowRankSum, Tensor):
    """A weight with adapters, as a tensor of its shape, dtype and device."""

    @staticmethod
    def __new__(cls, base: Any, updates: Any, layout: Any, known: Any = None) -> AdaptedWeight:
        """Make a tensor without values of its own."""
        return torch.Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=base.dtype, device=base.device, requires_grad=False
        )

    def __init__(self, base: Any, updates: tuple[Update, ...], layout: Layout, known: Tensor | None = None) -> None:
        self.__dict__.update(base=base, updates=updates, holds=layout, known=known)
        self._is_param = True

    @classmethod
    def read(cls, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what needs no values."""
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _on_values(operator, args, kwargs or {})

    @property
    def unadapted(self) -> Any:
        """The weight without adapters: who shares an adapted weight with another module shares this."""
        return self.base

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AdaptedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, adapters={len(self.updates)})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.values().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().detach().__reduce_ex__(protocol)


class _Traced(LowRankSum):
    """A weight with adapters while torch.compile or torch.export records a graph: no tensor, but used like one."""

    def __init__(self, base: Any, updates: tuple[Update, ...], layout: Layout, known: Tensor | None = None) -> None:
        self.base, self.updates, self.holds, self.known = base, updates, layout, known

    @classmethod
    def read(cls, function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what needs no values: the base has the same shape, dtype and device."""
        return function(weight.base, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return what a tensor has that is not defined here: of the values."""
        if name in ("shape", "dtype", "device", "ndim", "is_cpu", "is_cuda", "is_meta", "requires_grad"):
            return getattr(self.base, name)
        return getattr(self.values(), name)


def _share_base(module: nn.Module, name: str, parameter: Any) -> Any:
    """Register the base of an adapted weight as a parameter in its place: adapters stay with their modules."""
    return parameter.base if isinstance(parameter, AdaptedWeight) else None


register_module_parameter_registration_hook(_share_base)


# The functions


def _implements(*functions: Any) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        FUNCTIONS.update(dict.fromkeys(functions, function))
        return function

    return register


def _is_adapted(value: Any) -> bool:
    return isinstance(value, LowRankSum)


@_implements(functional.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not _is_adapted(weight) or _is_adapted(input) or weight.is_kernel or len(weight.base.shape) != 2:
        return NotImplemented
    out = weight.of_rows(input, functional.linear, bias.values() if _is_adapted(bias) else bias)
    for one in weight.updates:
        out = add_low_rank(out, one.dropped(input), one.right, one.left, one.scaling)
    return out


def _register_products() -> None:
    for function in (torch.matmul, torch.mm, torch.bmm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv):
        FUNCTIONS[function] = partial(_product, function)
    FUNCTIONS[Tensor.__matmul__] = partial(_product, torch.matmul)
    FUNCTIONS[Tensor.__rmatmul__] = lambda b, a: _product(torch.matmul, a, b)
    for adding in (torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm):
        FUNCTIONS[adding] = partial(_added_product, adding)


def _added_product(function: Any, input: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    return _product(lambda a, b: function(input, a, b, beta=beta, alpha=alpha), a, b, alpha)


def _product(function: Callable[[Any, Any], Tensor], a: Any, b: Any, alpha: float = 1) -> Any:
    """Return ``function(a, b)``, the product of an input with a weight, with alpha times the low-rank one."""
    if _is_adapted(a) == _is_adapted(b) or (b if _is_adapted(b) else a).is_kernel:
        return NotImplemented
    if not _is_adapted(b):
        out = a.of_rows(b, lambda x, weight: function(weight, x))
        for one in a.updates:
            narrow = torch.matmul(one.right, one.dropped(b)) * (one.scaling * alpha)
            out = out + torch.matmul(one.left, narrow).to(out.dtype)
        return out
    out = b.of_rows(a, function)
    for one in b.updates:
        if len(b.base.shape) == 2:
            out = add_low_rank(out, one.dropped(a), one.left.mT, one.right.mT, one.scaling * alpha)
        else:
            narrow = torch.matmul(one.dropped(a), one.left) * (one.scaling * alpha)
            out = out + torch.matmul(narrow, one.right).to(out.dtype)
    return out


_register_products()


def _grouped_mm(a: Any, b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not _is_adapted(b) or _is_adapted(a) or len(a.shape) != 2 or len(b.base.shape) != 3 or offs is None:
        return NotImplemented
    out = b.of_rows(a, lambda x, weight: _GROUPED[0](x, weight, offs=offs, bias=bias, out_dtype=out_dtype))
    return _with_groups(out, a, b, offs)


def _grouped_mm_of_transformers(input: Any, weight: Any, offs: Any) -> Any:
    """Compute what transformers does where there is no grouped_mm; of a stored weight it would make a dense one."""
    if not _is_adapted(weight) or len(weight.base.shape) != 3:
        return NotImplemented
    out = torch.ops.transformers.grouped_mm_fallback(input, weight.base, offs)
    return _with_groups(out, input, weight, offs)


def _with_groups(out: Tensor, x: Tensor, weight: Any, offsets: Tensor) -> Tensor:
    for one in weight.updates:
        narrow = grouped_matmul(one.dropped(x), one.left, offsets) * one.scaling
        out = out + grouped_matmul(narrow, one.right, offsets).to(out.dtype)
    return out


_GROUPED = [
    getattr(place, name)
    for place, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(place, name)
]
FUNCTIONS.update(dict.fromkeys(_GROUPED, _grouped_mm))
FUNCTIONS["transformers.grouped_mm_fallback"] = _grouped_mm_of_transformers


@_implements(torch.einsum)
def _einsum(equation: str, *operands: Any) -> Any:
    """Contract an input with a weight: with one of its thin matrices, and then with the other."""
    operands = tuple(operands[0]) if len(operands) == 1 else operands
    text, arrow, out = equation.replace(" ", "").partition("->")
    letters = text.split(",")
    if len(operands) != 2 or len(letters) != 2 or not arrow or sum(map(_is_adapted, operands)) != 1:
        return NotImplemented
    at = 1 if _is_adapted(operands[1]) else 0
    weight, x, of_weight, of_x = operands[at], operands[1 - at], letters[at], letters[1 - at]
    if weight.is_kernel or "." in of_weight or len(set(of_weight)) < len(weight.base.shape):
        return NotImplemented
    if set(of_weight) <= set(of_x):  # nothing to factor: the step between the thin matrices would be the larger
        return NotImplemented
    result = weight.of_rows(x, lambda x, base: torch.einsum(f"{of_x},{of_weight}->{out}", x, base))
    rank = next(one for one in string.ascii_letters if one not in equation)
    stack, row, column = of_weight[:-2], of_weight[-2], of_weight[-1]
    left, right = f"{stack}{row}{rank}", f"{stack}{rank}{column}"
    for one in weight.updates:
        matrices = [(left, one.left), (right, one.right)]
        (first, thin), (second, wide) = matrices if row in of_x else matrices[::-1]
        change = torch.einsum(f"{of_x},{first},{second}->{out}", one.dropped(x) * one.scaling, thin, wide)
        result = result + change.to(result.dtype)
    return result


@_implements(functional.embedding)
def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not _is_adapted(weight) or weight.is_kernel or len(weight.base.shape) != 2:
        return NotImplemented
    rest = padding_idx, max_norm, norm_type, scale_grad_by_freq
    out = functional.embedding(input, weight.base, *rest, sparse)
    for one in weight.updates:
        narrow = functional.embedding(input, one.left, *rest) * one.scaling  # (..., rank)
        out = out + (narrow @ one.right).to(out.dtype)
    return out


@_implements(functional.embedding_bag)
def _embedding_bag(
    input: Tensor,
    weight: Any,
    offsets: Any = None,
    max_norm: Any = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    *rest: Any,
    **named: Any,
) -> Any:
    if not _is_adapted(weight) or mode == "max":
        return NotImplemented

    def bag(table: Any, sparse: bool) -> Tensor:
        return functional.embedding_bag(
            input, table, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, *rest, **named
        )

    out = bag(weight.base, sparse)
    for one in weight.updates:
        out = out + ((bag(one.left.contiguous(), False) * one.scaling) @ one.right).to(out.dtype)
    return out


def _convolve(dims: int) -> None:
    """Register the convolutions of so many dimensions: A convolves to ``rank`` channels, B mixes them."""
    conv: Any = getattr(functional, f"conv{dims}d")
    transposed: Any = getattr(functional, f"conv_transpose{dims}d")
    ones = (1,) * dims

    def of_kernel(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not _is_adapted(weight) or weight.holds.kind != "kernel":
            return NotImplemented
        out = weight.of_rows(input, conv, bias, stride, padding, dilation, groups)
        for one in weight.updates:
            a = one.right.view(-1, *weight.holds.shape[1:])  # (rank, in / groups, *kernel)
            a = a if groups == 1 else a.repeat(groups, *ones, 1)
            narrow = conv(one.dropped(input), a, None, stride, padding, dilation, groups)
            b = one.left.view(*one.left.shape, *ones)
            out = out + conv(narrow * one.scaling, b, groups=groups).to(out.dtype)
        return out

    def of_transposed(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not _is_adapted(weight) or weight.holds.kind != "transposed kernel":
            return NotImplemented
        rest = stride, padding, output_padding, groups, dilation
        out = weight.of_rows(input, transposed, bias, *rest)
        inputs, _, *kernel = weight.holds.shape
        for one in weight.updates:
            a = one.right.view(-1, inputs, *kernel).movedim(0, 1)  # (in, rank, *kernel)
            narrow = transposed(one.dropped(input), a, None, *rest)
            b = one.left.repeat(groups, 1).view(-1, one.left.shape[1], *ones)
            out = out + conv(narrow * one.scaling, b, groups=groups).to(out.dtype)
        return out

    FUNCTIONS[conv], FUNCTIONS[transposed] = of_kernel, of_transposed


for _dims in (1, 2, 3):
    _convolve(_dims)


FUNCTIONS[functional.multi_head_attention_forward] = attention


# Views


@_implements(Tensor.__getitem__)
def _getitem(weight: Any, index: Any) -> Any:
    return weight.indexed(index if isinstance(index, tuple) else (index,)) if _is_adapted(weight) else NotImplemented


@_implements(Tensor.T.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
def _t(weight: Any) -> Any:
    return weight.swapped() if len(weight.base.shape) == 2 else NotImplemented


@_implements(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _mt(weight: Any) -> Any:
    return weight.swapped()


@_implements(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims)
def _transpose(weight: Any, dim0: int, dim1: int) -> Any:
    dims = len(weight.base.shape)
    return weight.swapped() if {dim0 % dims, dim1 % dims} == {dims - 1, dims - 2} else NotImplemented


@_implements(Tensor.permute, torch.permute)
def _permute(weight: Any, *given: Any, dims: Any = None) -> Any:
    dims = given if dims is None else dims
    order = [one % len(weight.base.shape) for one in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    last = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
    return weight.swapped() if order == last else NotImplemented


@_implements(Tensor.unbind, torch.unbind, Tensor.__iter__)
def _unbind(weight: Any, dim: int = 0) -> Any:
    if dim != 0 or len(weight.base.shape) < 3 or weight.is_kernel:
        return NotImplemented
    parts = [weight.indexed((number,)) for number in range(weight.base.shape[0])]
    return tuple(parts)


@_implements(Tensor.select, torch.select)
def _select(weight: Any, dim: int, index: int) -> Any:
    return weight.indexed((*[slice(None)] * (dim % len(weight.base.shape)), index))


@_implements(Tensor.narrow, torch.narrow)
def _narrow(weight: Any, dim: int, start: int, length: int) -> Any:
    return weight.indexed((*[slice(None)] * (dim % len(weight.base.shape)), slice(start, start + length)))


@_implements(Tensor.index_select, torch.index_select)
def _index_select(weight: Any, dim: int, index: Tensor) -> Any:
    return weight.indexed((index,)) if dim == 0 else NotImplemented


@_implements(Tensor.split, torch.split)
def _split(weight: Any, sizes: Any, dim: int = 0) -> Any:
    total = weight.base.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    parts, start = [], 0
    for size in sizes:
        parts.append(_narrow(weight, dim, start, size))
        start += size
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


@_implements(Tensor.chunk, torch.chunk)
def _chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    return _split(weight, -(-weight.base.shape[dim] // chunks), dim)


def _register_casts() -> None:
    """Register functions that change the base alone: adapters have a dtype of their own."""

    def register(name: str) -> None:
        def cast(weight: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple(one.base if _is_adapted(one) else one for one in args)
            kwargs = {key: one.base if _is_adapted(one) else one for key, one in kwargs.items()}
            if not _is_adapted(weight):  # cast to the dtype of one
                return getattr(weight, name)(*args, **kwargs)
            base = getattr(weight.base, name)(*args, **kwargs)
            if not base.is_floating_point():
                return NotImplemented
            return type(weight)(base, weight.updates, weight.holds)

        FUNCTIONS[getattr(Tensor, name)] = cast

    for name in ("to", "float", "half", "bfloat16", "double", "type_as", "contiguous"):
        register(name)


_register_casts()


@_implements(Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
def _detach(weight: Any) -> Any:
    updates = tuple(one._replace(left=one.left.detach(), right=one.right.detach()) for one in weight.updates)
    return type(weight)(weight.base.detach(), updates, weight.holds)


@_implements(Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _requires_grad(weight: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise RuntimeError("a weight with adapters is computed and cannot train: the adapters do")
    return weight


def _register_methods() -> None:
    """Give a weight that stands in a recorded graph the methods of a tensor that keep it one."""

    def register(name: str) -> None:
        function = getattr(Tensor, name)
        setattr(
            _Traced, name, lambda self, *args, **kwargs: self.__torch_function__(function, (), (self, *args), kwargs)
        )

    for name in (
        "__getitem__", "__iter__", "__len__", "__matmul__", "__rmatmul__", "matmul", "mm", "bmm", "mv",
        "t", "transpose", "swapaxes", "swapdims", "permute", "unbind", "select", "narrow", "index_select", "split",
        "chunk", "to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "detach",
        "size", "dim", "numel", "stride", "is_floating_point", "element_size",
    ):  # fmt: skip
        register(name)
    for name in ("T", "mT"):
        setattr(_Traced, name, property(FUNCTIONS[getattr(Tensor, name).__get__]))


_register_methods()

_WRITES = ("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__imatmul__", "__ipow__")

METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "ndim", "itemsize",
            "nbytes", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested",
        )
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.element_size, Tensor.__len__, Tensor.get_device, Tensor.is_contiguous),
}  # fmt: skip
"""Functions that need no values of a tensor."""


def writes_in_place(function: Any) -> bool:
    """Whether a function of torch changes its first argument, by its name."""
    name = getattr(function, "__name__", "").partition(".")[0]
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITES


def _is_list(index: Any) -> bool:
    return (isinstance(index, Tensor) and index.dim() == 1) or isinstance(index, list)


def _keeps_matrices(index: Any) -> bool:
    """Whether an index of a stack's dimension gives whole matrices."""
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) and index.dim() > 1:
        return False  # a mask takes the place of several dimensions
    return isinstance(index, (slice, int, Tensor, list))


def _on_values(function: Any, args: Any, kwargs: Any) -> Any:
    """Call a function with the values of adapted weights; refuse to write to these.

    Raises:
        RuntimeError: it would write.
    """
    known: dict[int, Tensor] = {}

    def dense(one: Any) -> Any:
        if not _is_adapted(one):
            return one
        if id(one) not in known:
            known[id(one)] = one.values()
        return known[id(one)]

    target = args[0] if args else next(iter(kwargs.values()), None)
    if (writes_in_place(function) and _is_adapted(target)) or _is_adapted(kwargs.get("out")):
        name = getattr(function, "__name__", "").partition(".")[0]
        raise RuntimeError(
            f"{name} would write to a weight with adapters, which is computed: write to the layer's own parameter, "
            "or merge the adapters first, lowmem.merge(model)"
        )
    args, kwargs = torch.utils._pytree.tree_map(dense, (args, kwargs))
    return function(*args, **kwargs)
