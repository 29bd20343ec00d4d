"""The operators that take stored weights without dequantizing them whole: products, gathers, convolutions and views.

They run below autograd, which saves the stored weight itself; their gradients are computed by operators of this
table, too. Weights are frozen: no operator returns the gradient of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from lowmem import kernels
from lowmem.kernels import ops
from lowmem.nn.frozen_conv import Geometry, convolution, convolution_adjoint
from lowmem.nn.stored import OPERATORS, HalfForm, StoredTensor, dequantized_call, is_recorded, refuse_gradient
from lowmem.quant.backend import backend_of

__all__ = ["compute_dtype"]

aten = torch.ops.aten
_F = TypeVar("_F", bound=Callable[..., Any])


def _implements(*names: str) -> Callable[[_F], _F]:
    """Register an implementation for aten operators ``name.overload``, as far as this version of torch has them."""

    def register(function: _F) -> _F:
        for name in names:
            packet, _, overload = name.partition(".")
            found = getattr(getattr(aten, packet, None), overload or "default", None)
            if found is not None:
                OPERATORS[found] = function
        return function

    return register


def compute_dtype(x: Tensor, weight: StoredTensor) -> torch.dtype:
    """Return the dtype of a product: of codes, the form's ``compute_dtype`` or x's dtype; of 16 bits, the wider
    dtype.

    The wider one is float32 for a float32 x, else ``torch.promote_types`` of x and the weight.
    """
    form = weight.form
    if not isinstance(form, HalfForm):
        return form.compute_dtype or x.dtype
    return x.dtype if x.dtype is torch.float32 else torch.promote_types(x.dtype, form.dtype)


def _product(x: Tensor, weight: StoredTensor, transposed: bool) -> Tensor:
    """Return ``x @ W.T``, or ``x @ W`` if ``transposed``, in x's dtype; W is the matrix as its parts hold it."""
    refuse_gradient(weight)
    if is_recorded(x, *weight.parts):
        recorded = weight.recorded
        return ops.product.record(x, recorded, compute_dtype(x, weight), transposed).to(x.dtype)
    stored = weight.stored
    dtype = compute_dtype(x, weight)
    return (kernels.input_grad if transposed else kernels.linear)(x, stored, dtype).to(x.dtype)


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.lead == 1 and len(weight.tail) == 1


def _is_stack(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.lead == 2 and len(weight.tail) == 1


def _is_input(x: Any) -> bool:
    return not isinstance(x, StoredTensor) and x.is_floating_point()


# Products


@_implements("mm")
def _mm(a: Any, b: Any) -> Any:
    if _is_matrix(b) and _is_input(a):
        return _product(a, b, not b.swapped)
    if _is_matrix(a) and _is_input(b):
        return _product(b.t(), a, a.swapped).t()
    return NotImplemented


@_implements("addmm")
def _addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _mm(a, b)
    if product is NotImplemented:
        return NotImplemented
    return _added(bias, product, beta, alpha)


def _added(bias: Any, product: Tensor, beta: float, alpha: float) -> Tensor:
    """Return ``beta bias + alpha product``; as in torch's operators, beta = 0 ignores the bias, even if it is NaN."""
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    dense = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return product + (dense if beta == 1 else dense * beta).to(product.dtype)


@_implements("linear")  # arrives undecomposed in inference mode only
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not (_is_matrix(weight) and not weight.swapped and _is_input(x)):
        return NotImplemented
    product = _product(x.reshape(-1, x.shape[-1]), weight, False).view(*x.shape[:-1], weight.shape[0])
    return product if bias is None else _added(bias, product, 1, 1)


@_implements("mv")
def _mv(a: Any, vector: Any) -> Any:
    return (
        _product(vector.unsqueeze(0), a, a.swapped).squeeze(0)
        if _is_matrix(a) and _is_input(vector)
        else NotImplemented
    )


@_implements("bmm")
def _bmm(a: Any, b: Any) -> Any:
    if _is_stack(b) and _is_input(a):
        weight, x, transposed = b, a, not b.swapped
    elif _is_stack(a) and _is_input(b):
        weight, x, transposed = a, b.transpose(1, 2), a.swapped
    else:
        return NotImplemented
    count, rows = x.shape[:2]
    if count > 1 and all(part.stride(0) == 0 for part in weight.parts):  # a single matrix that was expanded
        matrix = weight.like([part[0] for part in weight.parts])
        out = _product(x.reshape(count * rows, x.shape[2]), matrix, transposed).view(count, rows, -1)
        return out if weight is b else out.transpose(1, 2)
    offsets = torch.arange(1, count + 1, device=x.device, dtype=torch.int32) * rows
    out = _grouped(x.reshape(count * rows, x.shape[2]), weight, offsets, transposed).view(count, rows, -1)
    return out if weight is b else out.transpose(1, 2)


@_implements("baddbmm")
def _baddbmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _bmm(a, b)
    return NotImplemented if product is NotImplemented else _added(bias, product, beta, alpha)


@_implements("_grouped_mm")
def _grouped_mm(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not (_is_stack(weight) and _is_input(x) and x.dim() == 2 and offs is not None):
        return NotImplemented
    out = _grouped(x, weight, offs, not weight.swapped)
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


def _grouped(x: Tensor, weight: StoredTensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Multiply rows ``offsets[e - 1]`` to ``offsets[e]`` of x by matrix e of a stack, for each e."""
    refuse_gradient(weight)
    recorded = is_recorded(x, offsets, *weight.parts)
    matrix, count = weight.recorded if recorded else weight.matrix, weight.parts[0].shape[0]
    arguments = (x, matrix, compute_dtype(x, weight), transposed, count, offsets)
    out = (
        ops.grouped_product.record(*arguments) if recorded else ops.grouped_product.compute(backend_of(x), *arguments)
    )
    return out.to(x.dtype)


# Gathers


@_implements("embedding")
def _embedding(weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    if not _is_matrix(weight) or weight.swapped:
        return NotImplemented
    refuse_gradient(weight)
    return weight.like([functional.embedding(indices, part) for part in weight.parts]).dequantize()


@_implements("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    if not _is_matrix(weight) or weight.swapped:
        return NotImplemented
    padding = padding_idx
    if is_recorded(indices, *weight.parts):  # torch.unique would have a data-dependent shape
        rows = _embedding(weight, indices)
        numbers = torch.arange(indices.shape[0], device=indices.device)
        if padding >= 0:  # one more row in front stands for the padding
            rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
            numbers, padding = torch.where(indices == padding, 0, numbers + 1), 0
    else:
        distinct, numbers = torch.unique(indices, return_inverse=True)
        rows = _embedding(weight, distinct)
        if padding >= 0:
            at = (distinct == padding).nonzero()
            padding = int(at[0]) if len(at) else -1
    rest = scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding
    return aten._embedding_bag_forward_only.default(rows, numbers.to(indices.dtype), offsets, *rest)


# Convolutions


def _geometry(weight: StoredTensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
    """Return the geometry of a convolution; for a transposed one, that of the convolution whose adjoint it is."""
    out_channels, channels, *kernel = weight.shape
    dims = len(kernel)
    strides, paddings, dilations = (
        tuple(one) * dims if len(one) == 1 else tuple(one) for one in (stride, padding, dilation)
    )
    return Geometry(channels * groups, out_channels, groups, tuple(kernel), strides, paddings, dilations)


@_implements("convolution", "convolution_overrideable")
def _convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if not (_is_kernel(weight) and _is_input(x)):
        return NotImplemented
    refuse_gradient(weight)
    geometry = _geometry(weight, stride, padding, dilation, groups)
    stored = weight.recorded if is_recorded(x, *weight.parts) else weight.stored
    dtype = compute_dtype(x, weight)
    if transposed:
        size = geometry.transposed_size(x.shape[2:], output_padding)
        out = convolution_adjoint(x, stored, geometry, dtype, size)
    else:
        out = convolution(x, stored, geometry, dtype)
    if bias is None:
        return out
    dense = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return out + dense.to(out.dtype).view(-1, *[1] * len(geometry.kernel))


@_implements("convolution_backward", "convolution_backward_overrideable")
def _convolution_backward(
    grad: Any,
    x: Any,
    weight: Any,
    *rest: Any,
) -> Any:
    *_sizes, stride, padding, dilation, transposed, _output_padding, groups, mask = rest
    if not (_is_kernel(weight) and _is_input(grad)) or mask[1]:
        return NotImplemented
    geometry = _geometry(weight, stride, padding, dilation, groups)
    stored = weight.recorded if is_recorded(grad, *weight.parts) else weight.stored
    dtype = compute_dtype(grad, weight)
    of_input = of_bias = None
    if mask[0] and transposed:
        of_input = convolution(grad, stored, geometry, dtype)
    elif mask[0]:
        of_input = convolution_adjoint(grad, stored, geometry, dtype, x.shape[2:])
    if len(mask) > 2 and mask[2]:
        of_bias = grad.sum([0, *range(2, grad.dim())])
    return (of_input, None, of_bias)[: len(mask)]


def _is_kernel(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.lead == 1 and 2 <= len(weight.tail) <= 4 and not weight.swapped


# Copies, and views that keep whole rows


@_implements("detach")
def _detach(weight: StoredTensor) -> StoredTensor:
    """Return a view without gradient; parts that require none stay the same parameters."""
    return weight.like([part.detach() if part.requires_grad else part for part in weight.parts])


@_implements("alias", "lift_fresh")
def _alias(weight: StoredTensor) -> StoredTensor:
    return weight.like(weight.parts)


@_implements("clone")
def _clone(weight: StoredTensor, *, memory_format: Any = None) -> StoredTensor:
    return weight.like([part.clone() for part in weight.parts])


@_implements("_to_copy")
def _to_copy(weight: StoredTensor, *, dtype: torch.dtype | None = None, device: Any = None, **named: Any) -> Any:
    """Move the parts to a device; a cast changes only the dtype of the stored tensor, and not the parts."""
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    parts: Sequence[Tensor] = weight.parts
    if device is not None:
        parts = [
            aten._to_copy.default(part, device=device, non_blocking=named.get("non_blocking", False))
            for part in parts
        ]
    return weight.like(parts, dtype=dtype)


@_implements("t")
def _t(weight: StoredTensor) -> Any:
    return _transpose(weight, 0, 1) if weight.dim() == 2 else NotImplemented


@_implements("transpose.int")
def _transpose(weight: StoredTensor, first: int, second: int) -> Any:
    dims = weight.dim()
    first, second = first % dims, second % dims
    if first == second:
        return _alias(weight)
    if {first, second} == {dims - 1, dims - 2} and len(weight.tail) == 1:
        return weight.like(weight.parts, swapped=not weight.swapped)
    return NotImplemented


@_implements("permute")
def _permute(weight: StoredTensor, dims: Sequence[int]) -> Any:
    count = weight.dim()
    order = [dim % count for dim in dims]
    if order == list(range(count)):
        return _alias(weight)
    if order == [*range(count - 2), count - 1, count - 2]:
        return _transpose(weight, -1, -2)
    return NotImplemented


def _leading(weight: StoredTensor, dim: int) -> int | None:
    """Return a leading dimension as a number from 0; None if it is inside rows, or one of two transposed ones."""
    dim = dim % weight.dim()
    return dim if dim < weight.lead and not (weight.swapped and dim >= weight.dim() - 2) else None


def _of_rows(weight: StoredTensor, dim: int, function: Any, *before: Any) -> Any:
    """Apply a function to all parts if ``dim`` is a leading dimension; else NotImplemented."""
    leading = _leading(weight, dim)
    return NotImplemented if leading is None else weight.like([function(part, *before) for part in weight.parts])


@_implements("select.int")
def _select(weight: StoredTensor, dim: int, index: int) -> Any:
    return _of_rows(weight, dim, lambda part: part.select(dim % weight.dim(), index))


@_implements("slice.Tensor")
def _slice(weight: StoredTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    size = weight.shape[dim]
    if (start is None or start == 0) and (end is None or end >= size) and step == 1:
        return _alias(weight)
    return _of_rows(weight, dim, lambda part: aten.slice.Tensor(part, dim % weight.dim(), start, end, step))


def _split_rows(weight: StoredTensor, dim: int, function: Callable[[Tensor, int], Sequence[Tensor]]) -> Any:
    leading = _leading(weight, dim)
    if leading is None:
        return NotImplemented
    every = (function(part, leading) for part in weight.parts)
    return [weight.like(parts) for parts in zip(*every, strict=True)]


@_implements("split.Tensor")
def _split(weight: StoredTensor, size: int, dim: int = 0) -> Any:
    return _split_rows(weight, dim, lambda part, leading: part.split(size, leading))


@_implements("split_with_sizes")
def _split_with_sizes(weight: StoredTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    return _split_rows(weight, dim, lambda part, leading: part.split(sizes, leading))


@_implements("unbind.int")
def _unbind(weight: StoredTensor, dim: int = 0) -> Any:
    return _split_rows(weight, dim, lambda part, leading: part.unbind(leading))


@_implements("index_select")
def _index_select(weight: StoredTensor, dim: int, index: Tensor) -> Any:
    return _of_rows(weight, dim, lambda part: part.index_select(dim % weight.dim(), index))


@_implements("index.Tensor")
def _index(weight: StoredTensor, indices: Sequence[Tensor | None]) -> Any:
    if len(indices) != 1 or indices[0] is None or _leading(weight, 0) is None or isinstance(indices[0], StoredTensor):
        return NotImplemented
    if indices[0].dtype in (torch.bool, torch.uint8) and indices[0].dim() > 1:
        return NotImplemented
    return weight.like([aten.index.Tensor(part, indices) for part in weight.parts])


@_implements("expand")
def _expand(weight: StoredTensor, size: Sequence[int], **_: Any) -> Any:
    added, inside = len(size) - weight.dim(), 2 if weight.swapped else len(weight.tail)
    wanted = [weight.shape[number - added] if one == -1 else one for number, one in enumerate(size)]
    if wanted[len(wanted) - inside :] != list(weight.shape[weight.dim() - inside :]):
        return NotImplemented
    rows = [*wanted[:-2], wanted[-1]] if weight.swapped else wanted[: len(wanted) - inside]
    return weight.like([part.expand(*rows, part.shape[-1]) for part in weight.parts])


@_implements("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(weight: StoredTensor, size: Sequence[int], *_: Any) -> Any:
    wanted = list(size)
    if -1 in wanted:
        rest = math.prod(one for one in wanted if one != -1)
        wanted[wanted.index(-1)] = weight.numel() // rest if rest else 0
    if not weight.swapped:
        return _with_shape(weight, wanted)
    # torch views clones as if they were contiguous, but the clone of a transposed weight is transposed: dequantize.
    same = wanted == list(weight.shape)
    return _alias(weight) if same else dequantized_call(aten.reshape.default, (weight, wanted), {})


def _with_shape(weight: StoredTensor, shape: Sequence[int]) -> Any:
    """Return a view of another shape if either the leading dimensions or those of a row are unchanged."""
    shape, parts, lead = list(shape), weight.parts, list(weight.parts[0].shape[:-1])
    if shape[: len(lead)] == lead and len(shape) > len(lead) and math.prod(shape[len(lead) :]) == weight.columns:
        return weight.like(parts, tail=shape[len(lead) :])
    kept = len(weight.tail)
    rows, tail = shape[: len(shape) - kept], shape[len(shape) - kept :]
    if tail == list(weight.tail) and math.prod(rows) == math.prod(lead):
        return weight.like([part.reshape(*rows, part.shape[-1]) for part in parts])
    return NotImplemented


@_implements("squeeze.dim")
def _squeeze(weight: StoredTensor, dim: int) -> Any:
    shape = list(weight.shape)
    if shape[dim] != 1:
        return _alias(weight)
    del shape[dim % len(shape)]
    return NotImplemented if weight.swapped else _with_shape(weight, shape)


@_implements("unsqueeze")
def _unsqueeze(weight: StoredTensor, dim: int) -> Any:
    shape = list(weight.shape)
    dim = dim % (len(shape) + 1)
    if weight.swapped:
        return weight.like([part.unsqueeze(dim) for part in weight.parts]) if dim < len(shape) - 1 else NotImplemented
    shape.insert(dim, 1)
    return _with_shape(weight, shape)


@_implements("as_strided")
def _as_strided(weight: StoredTensor, size: Sequence[int], stride: Sequence[int], offset: Any = None) -> Any:
    same = (tuple(size), tuple(stride)) == (tuple(weight.shape), tuple(weight.stride())) and not offset
    return _alias(weight) if same else NotImplemented


@_implements("copy_")
def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy a stored tensor into one of the same form and shape; any other write to a stored tensor is an error."""
    if not isinstance(target, StoredTensor):
        return NotImplemented
    described = (target.form, target.tail, target.swapped, target.shape)
    if isinstance(source, StoredTensor) and (source.form, source.tail, source.swapped, source.shape) == described:
        for into, part in zip(target.parts, source.parts, strict=True):
            into.copy_(part)
        return target
    return NotImplemented


def _makes_like(name: str) -> None:
    """Register an operator whose result depends only on the weight's shape, dtype and device; it is dense."""
    of = getattr(aten, name).default

    def dense_like(weight: StoredTensor, *rest: Any, **named: Any) -> Any:
        shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        named["device"] = named.get("device") or weight.device
        named.pop("memory_format", None)
        return of(shape, *rest, **named)

    OPERATORS[of] = dense_like


for _name in ("empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like"):
    _makes_like(_name)


@_implements("equal")
def _equal(a: Any, b: Any) -> Any:
    if not (isinstance(a, StoredTensor) and isinstance(b, StoredTensor)) or a.form != b.form:
        return NotImplemented
    if (a.shape, a.tail, a.swapped) != (b.shape, b.tail, b.swapped):
        return NotImplemented
    return all(map(torch.equal, a.parts, b.parts))


@_implements("is_same_size")
def _is_same_size(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape


@_implements("is_pinned")
def _is_pinned(weight: StoredTensor, device: Any = None) -> bool:
    return all(part.is_pinned() for part in weight.parts)


@_implements("_has_compatible_shallow_copy_type")
def _has_compatible_shallow_copy_type(_: Any, __: Any) -> bool:
    return False
