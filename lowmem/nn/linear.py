"""Linear layers with weights in 4, 8 or 16 bits; a product is computed for a chunk of rows at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lowmem import kernels
from lowmem.errors import short_repr
from lowmem.kernels.frozen_weight_operator import check_requires_no_grad
from lowmem.nn.call_context import autocast_linear_input, can_bypass_autograd, record_as_fx_leaf
from lowmem.nn.forms import CodedForm, as_frozen_parameter
from lowmem.nn.frozen_linear import frozen_linear
from lowmem.nn.module_class import hookless_shallow_copy
from lowmem.nn.module_copy import LAYERS, stored_parameter_property
from lowmem.nn.quantized_module import QuantizedModule, cached_quantized_weight_or_none, weight_compute_dtype
from lowmem.nn.stored_module import StoredModule
from lowmem.nn.stored_tensor import StoredTensor
from lowmem.quant.backend import backend_of
from lowmem.quant.tensor import QuantizedTensor


class QuantizedLinear(QuantizedModule, nn.Linear):
    """``y = x W^T + b`` with W stored in codes and frozen; the bias is unchanged.

    Args:
        weight: quantized (out_features, in_features).
        bias: floating point (out_features,), or None.
        compute_dtype: dtype of the product; None: the dtype of the input; torch.int8: 8-bit integers.
        dtype: of the ``weight`` attribute; None: that of the bias, or float32.

    Raises:
        TypeError, ValueError: a weight that is not quantized, or a bias that is no parameter of its rows.
    """

    dense_class = nn.Linear
    stored_names = ("weight",)
    compute_dtype = weight_compute_dtype
    weight = stored_parameter_property("weight")

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(f"weight={short_repr(weight)} must be what lowmem.quantize returns")
        if bias is not None and not isinstance(bias, nn.Parameter):
            raise TypeError(f"bias={short_repr(bias)} must be an nn.Parameter or None")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias.shape={tuple(bias.shape)} must be ({weight.shape[0]},), one an output")
        nn.Module.__init__(self)
        self.__dict__.update(_forms={}, _kept={})
        self.out_features, self.in_features = weight.shape
        dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        self.set_stored_weight("weight", weight, (self.in_features,), dtype)
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        if isinstance(input, Proxy):
            return record_as_fx_leaf(self, input)
        x = autocast_linear_input(input)
        # Faster than attributes; a parametrization may have moved a parameter out
        parameters = self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 - get would evaluate self.bias each time
        # Faster than the property
        dtype = self._forms["weight"].form.compute_dtype or x.dtype
        # Inline, for speed
        if can_bypass_autograd(x, bias) and x.dim() > 1 and not x.is_nested:
            weight = cached_quantized_weight_or_none(self)
            if weight is not None:
                out = backend_of(x).linear(x, weight, dtype, bias)
                return out if dtype is x.dtype else out.to(x.dtype)
        return frozen_linear(x, self.quantized, dtype, bias)


class Linear4Bit(QuantizedLinear):
    """``y = x W^T + b`` with W stored in 4 bits and frozen; the bias is unchanged."""


class Linear8Bit(QuantizedLinear):
    """``y = x W^T + b`` with W stored in 8 bits and frozen; the bias is unchanged."""

    stored_bits = 8


class GatheredLinear4Bit(Linear4Bit):
    """``y = x[..., order] W[:, order]^T + b`` with ``W[:, order]`` stored in 4 bits and frozen.

    ``quantized`` has the columns in the stored order, ``weight`` in that of the dense layer.
    """

    weight_order: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        if isinstance(input, Proxy):
            return record_as_fx_leaf(self, input)
        return super().forward(input.index_select(-1, self.weight_order))


def shallow_copy_with_column_order(layer: Linear4Bit, column_order: Tensor) -> GatheredLinear4Bit:
    """Return a copy of a layer whose stored columns are declared to be in another order. The copy has no hooks.

    Args:
        layer: stores ``W[:, order]``.
        column_order: int32 (in_features,).
    """
    columns = layer.in_features
    if column_order.shape != (columns,) or column_order.dtype.is_floating_point or column_order.dtype.itemsize != 4:
        raise ValueError(f"order is {column_order.dtype} {tuple(column_order.shape)}, and must be int32 ({columns},)")
    copied = cast(GatheredLinear4Bit, hookless_shallow_copy(layer, GatheredLinear4Bit))
    described = layer._forms["weight"]
    assert isinstance(described.form, CodedForm)
    form = replace(described.form, gathered=True)
    copied.__dict__.update(
        _forms={**layer._forms, "weight": described._replace(form=form)},
        _kept={},
        _parameters={**layer._parameters, "weight_order": as_frozen_parameter(column_order)},
    )
    return copied


class HalfLinear(StoredModule, nn.Linear):
    """``y = x W^T + b`` with W and b stored in 16 bits and frozen.

    The product is computed in ``torch.promote_types(x.dtype, D)``, where D is the stored dtype.
    """

    dense_class = nn.Linear
    stored_names = ("weight", "bias")
    weight = stored_parameter_property("weight")
    bias = stored_parameter_property("bias")

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        if isinstance(input, Proxy):
            return record_as_fx_leaf(self, input)
        x = autocast_linear_input(input)
        # Faster than attributes; a parametrization may have moved a parameter out
        parameters = self._parameters
        weight = parameters.get("weight_rounded")
        weight = cast(nn.Parameter, self.weight_rounded) if weight is None else weight
        bias = parameters["bias_rounded"] if "bias_rounded" in parameters else self.bias  # noqa: SIM401 - get would evaluate it
        bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
        if x.dtype is weight.dtype and kernels.fast_matmul_dtype(x.dtype, x) is x.dtype:
            if torch.is_grad_enabled():
                check_requires_no_grad(weight)
            bias = bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype)  # it may be dense, and shared
            return nn.functional.linear(x, weight.detach(), None if bias is None else bias.detach())
        wide = x.dtype if x.dtype is torch.float32 else torch.promote_types(x.dtype, weight.dtype)
        return frozen_linear(x, weight, wide, bias)


LAYERS.update({(nn.Linear, 4): Linear4Bit, (nn.Linear, 8): Linear8Bit, (nn.Linear, 16): HalfLinear})
