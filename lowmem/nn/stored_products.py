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
from lowmem.kernels.grouped_matmul import grouped_product
from lowmem.kernels.tensor_checks import is_recording_operations
from lowmem.nn.call_context import autocast_linear_input
from lowmem.nn.frozen_conv import Geometry, convolution_or_adjoint
from lowmem.nn.frozen_linear import frozen_linear
from lowmem.nn.stored_tensor import (
    StoredTensor,
    check_needs_no_weight_gradient,
    implements_for_stored,
    needs_dispatcher,
)
from lowmem.quant.backend import backend_of

aten = torch.ops.aten


def _multiply_by_stored_weight(x: Tensor, weight: StoredTensor, transposed: bool) -> Tensor:
    """Return ``x @ W.T``, or ``x @ W`` if ``transposed``, in x's dtype; W is the matrix as its parts hold it."""
    check_needs_no_weight_gradient(weight)
    if needs_dispatcher(x, *weight.parts):
        recorded = weight.recordable_matrix
        return ops.product.record(x, recorded, weight.form.product_dtype(x), transposed).to(x.dtype)
    stored = weight.kernel_weight
    dtype = weight.form.product_dtype(x)
    return (kernels.input_grad if transposed else kernels.linear)(x, stored, dtype).to(x.dtype)


def _is_stored_matrix(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.leading_dim_count == 1 and len(weight.tail) == 1


def _is_stored_matrix_stack(weight: Any) -> bool:
    return isinstance(weight, StoredTensor) and weight.leading_dim_count == 2 and len(weight.tail) == 1


def _is_dense_floating_point(x: Any) -> bool:
    return not isinstance(x, StoredTensor) and x.is_floating_point()


# Products


@implements_for_stored("mm")
def _stored_mm_or_not_implemented(left_matrix: Any, right_matrix: Any) -> Any:
    if (left_matrix.dim(), right_matrix.dim()) != (2, 2):
        return NotImplemented
    if _is_stored_matrix(right_matrix) and _is_dense_floating_point(left_matrix):
        return _multiply_by_stored_weight(left_matrix, right_matrix, not right_matrix.swapped)
    if _is_stored_matrix(left_matrix) and _is_dense_floating_point(right_matrix):
        return _multiply_by_stored_weight(right_matrix.t(), left_matrix, left_matrix.swapped).t()
    return NotImplemented


@implements_for_stored("addmm")
def _stored_addmm(bias: Any, left_matrix: Any, right_matrix: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _stored_mm_or_not_implemented(left_matrix, right_matrix)
    if product is NotImplemented:
        return NotImplemented
    return _scaled_bias_plus_product(bias, product, beta, alpha)


def _scaled_bias_plus_product(bias: Any, product: Tensor, beta: float, alpha: float) -> Tensor:
    """Return ``beta bias + alpha product``; as in torch's operators, beta = 0 ignores the bias, even if it is NaN."""
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    dense = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return product + (dense if beta == 1 else dense * beta).to(product.dtype)


@implements_for_stored("linear")  # arrives undecomposed in inference mode only
def _stored_linear_operator(x: Any, weight: Any, bias: Any = None) -> Any:
    if not (_is_stored_matrix(weight) and not weight.swapped and _is_dense_floating_point(x)):
        return NotImplemented
    product = _multiply_by_stored_weight(x.reshape(-1, x.shape[-1]), weight, False).view(
        *x.shape[:-1], weight.shape[0]
    )
    return product if bias is None else _scaled_bias_plus_product(bias, product, 1, 1)


@implements_for_stored("mv")
def _stored_mv(matrix: Any, vector: Any) -> Any:
    return (
        _multiply_by_stored_weight(vector.unsqueeze(0), matrix, matrix.swapped).squeeze(0)
        if _is_stored_matrix(matrix) and _is_dense_floating_point(vector)
        else NotImplemented
    )


@implements_for_stored("bmm")
def _stored_bmm_or_not_implemented(left_stack: Any, right_stack: Any) -> Any:
    if _is_stored_matrix_stack(right_stack) and _is_dense_floating_point(left_stack):
        weight, x, transposed = right_stack, left_stack, not right_stack.swapped
    elif _is_stored_matrix_stack(left_stack) and _is_dense_floating_point(right_stack):
        weight, x, transposed = left_stack, right_stack.transpose(1, 2), left_stack.swapped
    else:
        return NotImplemented
    count, rows = x.shape[:2]
    # A single matrix that was expanded
    if count > 1 and all(part.stride(0) == 0 for part in weight.parts):
        matrix = weight.with_parts([part[0] for part in weight.parts])
        out = _multiply_by_stored_weight(x.reshape(count * rows, x.shape[2]), matrix, transposed).view(
            count, rows, -1
        )
        return out if weight is right_stack else out.transpose(1, 2)
    # Where reading them is free
    offsets = torch.arange(1, count + 1, dtype=torch.int32, device="cpu") * rows
    out = _multiply_row_groups_by_stack(x.reshape(count * rows, x.shape[2]), weight, offsets, transposed).view(
        count, rows, -1
    )
    return out if weight is right_stack else out.transpose(1, 2)


@implements_for_stored("baddbmm")
def _stored_baddbmm(bias: Any, left_stack: Any, right_stack: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _stored_bmm_or_not_implemented(left_stack, right_stack)
    return NotImplemented if product is NotImplemented else _scaled_bias_plus_product(bias, product, beta, alpha)


@implements_for_stored("_grouped_mm")
def _stored_grouped_mm(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not (_is_stored_matrix_stack(weight) and _is_dense_floating_point(x) and x.dim() == 2 and offs is not None):
        return NotImplemented
    out = _multiply_row_groups_by_stack(x, weight, offs, not weight.swapped)
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


def _multiply_row_groups_by_stack(x: Tensor, weight: StoredTensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Multiply rows ``offsets[e - 1]`` to ``offsets[e]`` of x by matrix e of a stack, for each e."""
    check_needs_no_weight_gradient(weight)
    recorded = needs_dispatcher(x, offsets, *weight.parts)
    matrix, count = weight.recordable_matrix if recorded else weight.kernel_matrix, weight.parts[0].shape[0]
    arguments = (x, matrix, weight.form.product_dtype(x), transposed, count, offsets)
    out = grouped_product.record(*arguments) if recorded else grouped_product.compute(backend_of(x), *arguments)
    return out.to(x.dtype)


# Gathers


@implements_for_stored("embedding")
def _stored_embedding(weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    if not _is_stored_matrix(weight) or weight.swapped:
        return NotImplemented
    check_needs_no_weight_gradient(weight)
    return weight.with_parts([functional.embedding(indices, part) for part in weight.parts]).dequantize()


@implements_for_stored("_embedding_bag", "_embedding_bag_forward_only")
def _stored_embedding_bag(
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
    if not _is_stored_matrix(weight) or weight.swapped:
        return NotImplemented
    padding = padding_idx
    # torch.unique has a data-dependent shape, which a graph cannot hold, and for which the host waits for a GPU.
    if needs_dispatcher(indices, *weight.parts) or backend_of(indices).is_asynchronous:
        rows = _stored_embedding(weight, indices)
        numbers = torch.arange(indices.shape[0], dtype=torch.int64, device=indices.device)
        # One more row in front stands for the padding
        if padding >= 0:
            rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
            numbers, padding = torch.where(indices == padding, 0, numbers + 1), 0
    else:
        distinct, numbers = torch.unique(indices, return_inverse=True)
        rows = _stored_embedding(weight, distinct)
        if padding >= 0:
            at = (distinct == padding).nonzero()
            padding = int(at[0]) if len(at) else -1
    rest = scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding
    return aten._embedding_bag_forward_only.default(rows, numbers.to(indices.dtype), offsets, *rest)


# Convolutions


def _stored_conv_geometry(weight: StoredTensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
    """Return the geometry of a convolution; for a transposed one, that of the convolution whose adjoint it is."""
    out_channels, channels, *kernel = weight.shape
    dims = len(kernel)
    strides, paddings, dilations = (
        tuple(sizes) * dims if len(sizes) == 1 else tuple(sizes) for sizes in (stride, padding, dilation)
    )
    return Geometry(channels * groups, out_channels, groups, tuple(kernel), strides, paddings, dilations)


@implements_for_stored("convolution", "convolution_overrideable")
def _stored_convolution(
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
    if not (_is_stored_conv_kernel(weight) and _is_dense_floating_point(x)):
        return NotImplemented
    check_needs_no_weight_gradient(weight)
    geometry = _stored_conv_geometry(weight, stride, padding, dilation, groups)
    stored = weight.recordable_matrix if needs_dispatcher(x, *weight.parts) else weight.kernel_weight
    dtype = weight.form.product_dtype(x)
    size = geometry.transposed_conv_output_size(x.shape[2:], output_padding) if transposed else None
    out = convolution_or_adjoint(x, stored, geometry, dtype, size)
    if bias is None:
        return out
    dense = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return out + dense.to(out.dtype).view(-1, *[1] * len(geometry.kernel))


@implements_for_stored("convolution_backward", "convolution_backward_overrideable")
def _stored_convolution_backward(
    grad: Any,
    x: Any,
    weight: Any,
    *conv_arguments: Any,
) -> Any:
    *_sizes, stride, padding, dilation, transposed, _output_padding, groups, mask = conv_arguments
    if not (_is_stored_conv_kernel(weight) and _is_dense_floating_point(grad)) or mask[1]:
        return NotImplemented
    geometry = _stored_conv_geometry(weight, stride, padding, dilation, groups)
    stored = weight.recordable_matrix if needs_dispatcher(grad, *weight.parts) else weight.kernel_weight
    dtype = weight.form.product_dtype(grad)
    of_input = of_bias = None
    if mask[0]:
        of_input = convolution_or_adjoint(grad, stored, geometry, dtype, None if transposed else x.shape[2:])
    if len(mask) > 2 and mask[2]:
        of_bias = grad.sum([0, *range(2, grad.dim())])
    return (of_input, None, of_bias)[: len(mask)]


def _is_stored_conv_kernel(weight: Any) -> bool:
    return (
        isinstance(weight, StoredTensor)
        and weight.leading_dim_count == 1
        and 2 <= len(weight.tail) <= 4
        and not weight.swapped
    )


# Functions, above autograd


@implements_for_stored(functional.linear)
def _stored_linear_function(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not StoredTensor or isinstance(input, StoredTensor):
        return NotImplemented
    # Reading an attribute of a tensor subclass takes a microsecond
    attributes = weight.__dict__
    if attributes["swapped"] or len(attributes["tail"]) != 1:
        return NotImplemented
    stored = weight.kernel_weight
    if len(stored.shape) != 2:
        return NotImplemented
    x = autocast_linear_input(input)
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return frozen_linear(x, stored, weight.form.product_dtype(x), bias)


@implements_for_stored(torch.einsum)
def _stored_einsum(*arguments: Any) -> Any:
    """Contract with the dense values, which backward makes again; torch's einsum would keep them for it."""
    return einsum_recomputing_dense_weights(arguments, StoredTensor, lambda weight: weight.dequantize())


def einsum_recomputing_dense_weights(
    arguments: tuple[Any, ...], weight_class: type[Any], dense_values: Callable[[Any], Tensor]
) -> Any:
    """Return ``torch.einsum(*arguments)``, where backward makes the dense values of weights again.

    Args:
        arguments: of ``torch.einsum``.
        weight_class: the class of the weights.
        dense_values: returns the dense values of a weight.

    Returns:
        The result; NotImplemented where nothing is differentiated, and in graphs and transforms, which take no hooks
        of saved tensors.
    """
    if not torch.is_grad_enabled() or is_recording_operations() or torch._C._are_functorch_transforms_active():
        return NotImplemented

    def dense_einsum(*operands: Any) -> Any:
        return torch.einsum(*tree_map_only(weight_class, dense_values, operands))

    return checkpoint(dense_einsum, *arguments, use_reentrant=False, preserve_rng_state=False)
