"""A linear layer whose 4-bit weight is stored with its columns in another order (``lowmem.nn.gathered_weight``)."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor
from torch.fx import Proxy

from lowmem.nn.forms import freeze
from lowmem.nn.fourbit import Linear4Bit
from lowmem.nn.frozen_linear import recorded_call
from lowmem.nn.stored import FourBitForm
from lowmem.nn.stored_module import copied_module

__all__ = ["GatheredLinear4Bit", "gathered_copy"]


class GatheredLinear4Bit(Linear4Bit):
    """``y = x[..., order] W[:, order]^T + b`` with ``W[:, order]`` stored in 4 bits and frozen.

    ``quantized`` has the columns in the stored order, ``weight`` in that of the dense layer.
    """

    weight_order: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return (..., out_features) in the input's dtype, for input (..., in_features)."""
        if isinstance(input, Proxy):
            return recorded_call(self, input)
        return super().forward(input.index_select(-1, self.weight_order))


def gathered_copy(layer: Linear4Bit, order: Tensor) -> GatheredLinear4Bit:
    """Return a copy of a layer whose stored columns are declared to be in another order. The copy has no hooks.

    Args:
        layer: stores ``W[:, order]``.
        order: int32 (in_features,).

    Raises:
        ValueError: the order has another dtype or length.
    """
    columns = layer.in_features
    if order.shape != (columns,) or order.dtype.is_floating_point or order.dtype.itemsize != 4:
        raise ValueError(f"order is {order.dtype} {tuple(order.shape)}, and must be int32 ({columns},)")
    copied = cast(GatheredLinear4Bit, copied_module(layer, GatheredLinear4Bit))
    described = layer._forms["weight"]
    assert isinstance(described.form, FourBitForm)
    form = replace(described.form, gathered=True)
    copied.__dict__.update(
        _forms={**layer._forms, "weight": described._replace(form=form)},
        _kept={},
        _parameters={**layer._parameters, "weight_order": freeze(order)},
    )
    return copied
