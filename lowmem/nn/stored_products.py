"""Products, gathers and convolutions with stored weights, which are not dequantized whole: operators, which run below
autograd, with their gradients, and functions, which are intercepted above it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lowmem import kernels
from lowmem.kernels import ops
from lowmem.kernels.grouped import grouped_product
from lowmem.kernels.memory import is_traced
from lowmem.nn.calls import autocast
from lowmem.nn.frozen_conv import Geometry, convolution
from lowmem.nn.frozen_linear import frozen_linear
from lowmem.nn.stored_tensor import StoredTensor, implements, is_recorded, refuse_gradient
from lowmem.quant.backend import backend_of

aten = torch.ops.aten


def _product(x: Tensor, weight: StoredTensor, transposed: bool) -> Tensor:
    """Return ``x @ W.T``, or ``x @ W`` if ``transposed``, in x's dtype; W is the matrix as its parts hold it."""
    refuse_gradient(weight)
    if is_recorded(x, *weight.parts):
        recorded = weight.recorded
        return ops.product.record(x, recorded, weight.form.product_dtype(x), transposed).to(x.dtype)
    stored = weight.stored
    dtype = weight.form.product_dtype(x)
    return (kernels.input_grad if transposed else kernels.linear)(x, stored, dtype).to(x.dtype)


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.lead == 1 and len(weight.tail) == 1


def _is_stack(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.lead == 2 and len(weight.tail) == 1


def _is_input(x: Any) -> bool:
    return not isinstance(x, StoredTensor) and x.is_floating_point()


# Products


@implements("mm")
def _mm(a: Any, b: Any) -> Any:
    if (a.dim(), b.dim()) != (2, 2):
        return NotImplemented
    if _is_matrix(b) and _is_input(a):
        return _product(a, b, not b.swapped)
    if _is_matrix(a) and _is_input(b):
        return _product(b.t(), a, a.swapped).t()
    return NotImplemented


@implements("addmm")
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


@implements("linear")  # arrives undecomposed in inference mode only
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not (_is_matrix(weight) and not weight.swapped and _is_input(x)):
        return NotImplemented
    product = _product(x.reshape(-1, x.shape[-1]), weight, False).view(*x.shape[:-1], weight.shape[0])
    return product if bias is None else _added(bias, product, 1, 1)


@implements("mv")
def _mv(a: Any, vector: Any) -> Any:
    return (
        _product(vector.unsqueeze(0), a, a.swapped).squeeze(0)
        if _is_matrix(a) and _is_input(vector)
        else NotImplemented
    )


@implements("bmm")
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
    offsets = torch.arange(1, count + 1, dtype=torch.int32, device="cpu") * rows  # where reading them is free
    out = _grouped(x.reshape(count * rows, x.shape[2]), weight, offsets, transposed).view(count, rows, -1)
    return out if weight is b else out.transpose(1, 2)


@implements("baddbmm")
def _baddbmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _bmm(a, b)
    return NotImplemented if product is NotImplemented else _added(bias, product, beta, alpha)


@implements("_grouped_mm")
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
    arguments = (x, matrix, weight.form.product_dtype(x), transposed, count, offsets)
    out = grouped_product.record(*arguments) if recorded else grouped_product.compute(backend_of(x), *arguments)
    return out.to(x.dtype)


# Gathers


@implements("embedding")
def _embedding(weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    if not _is_matrix(weight) or weight.swapped:
        return NotImplemented
    refuse_gradient(weight)
    return weight.like([functional.embedding(indices, part) for part in weight.parts]).dequantize()


@implements("_embedding_bag", "_embedding_bag_forward_only")
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
    # torch.unique has a data-dependent shape, which a graph cannot hold, and for which the host waits for a GPU.
    if is_recorded(indices, *weight.parts) or not indices.is_cpu:
        rows = _embedding(weight, indices)
        numbers = torch.arange(indices.shape[0], dtype=torch.int64, device=indices.device)
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


@implements("convolution", "convolution_overrideable")
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
    dtype = weight.form.product_dtype(x)
    size = geometry.transposed_size(x.shape[2:], output_padding) if transposed else None
    out = convolution(x, stored, geometry, dtype, size)
    if bias is None:
        return out
    dense = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return out + dense.to(out.dtype).view(-1, *[1] * len(geometry.kernel))


@implements("convolution_backward", "convolution_backward_overrideable")
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
    dtype = weight.form.product_dtype(grad)
    of_input = of_bias = None
    if mask[0]:
        of_input = convolution(grad, stored, geometry, dtype, None if transposed else x.shape[2:])
    if len(mask) > 2 and mask[2]:
        of_bias = grad.sum([0, *range(2, grad.dim())])
    return (of_input, None, of_bias)[: len(mask)]


def _is_kernel(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.lead == 1 and 2 <= len(weight.tail) <= 4 and not weight.swapped


# Functions, above autograd


@implements(functional.linear)
def _linear_function(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not StoredTensor or isinstance(input, StoredTensor):
        return NotImplemented
    own = weight.__dict__  # reading an attribute of a tensor subclass takes a microsecond
    if own["swapped"] or len(own["tail"]) != 1:
        return NotImplemented
    stored = weight.stored
    if len(stored.shape) != 2:
        return NotImplemented
    x = autocast(input)
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return frozen_linear(x, stored, weight.form.product_dtype(x), bias)


@implements(torch.einsum)
def _einsum(*arguments: Any) -> Any:
    """Contract with the dense values, which backward makes again; torch's einsum would keep them for it."""
    return recomputed_einsum(arguments, StoredTensor, lambda weight: weight.dequantize())


def recomputed_einsum(arguments: tuple[Any, ...], kind: type[Any], values: Callable[[Any], Tensor]) -> Any:
    """Return ``torch.einsum(*arguments)``, where backward makes the dense values of weights again.

    Args:
        arguments: of ``torch.einsum``.
        kind: the class of the weights.
        values: returns the dense values of a weight.

    Returns:
        The result; NotImplemented where nothing is differentiated, and in graphs and transforms, which take no hooks
        of saved tensors.
    """
    if not torch.is_grad_enabled() or is_traced() or torch._C._are_functorch_transforms_active():
        return NotImplemented

    def contract(*given: Any) -> Any:
        return torch.einsum(*tree_map_only(kind, values, given))

    return checkpoint(contract, *arguments, use_reentrant=False, preserve_rng_state=False)
