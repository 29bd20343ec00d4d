"""A stored matrix whose columns are stored in another order, as in GPTQ files with activation order (desc_act).

Blocks are consecutive stored columns, but GPTQ's groups may consist of columns that are not consecutive. So the parts
hold ``W[:, order]``, in which each group is. A product gathers the columns of its input once,
``x[..., order] @ W[:, order].T``; any other operator gets dequantized values in the order of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels.torch_versions import leave_to_eager
from lowmem.nn.frozen_linear import autocast, frozen_linear
from lowmem.nn.stored_tensor import FUNCTIONS, OPERATORS, StoredTensor, dequantized_call

__all__ = ["GatheredTensor", "check_order"]

_ALIKE = {"detach", "alias", "lift_fresh", "clone", "_to_copy"}  # operators that keep the order of columns
_READING = {Tensor.__getitem__, functional.bilinear, torch.einsum}


def check_order(order: Tensor, name: str) -> None:
    """Check that an order that was read from a file or state is a permutation; one on the meta device passes.

    Raises:
        ValueError: it is not.
    """
    if not order.is_meta and not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise ValueError(f"{name} does not name each of {len(order)} columns once; get it again")


class GatheredTensor(StoredTensor):
    """A read-only matrix (rows, columns) whose parts hold its columns in the order ``order``: int32 (columns,)."""

    order: Tensor

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a dense tensor, rounded once to ``dtype`` (None: the dtype of this tensor)."""
        return super().dequantize(dtype).index_select(-1, self.order.argsort())

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.linear:
            result = _linear(*args, **kwargs)
        else:  # functions that write raise errors, as for any stored weight
            own = None if function in _READING else FUNCTIONS.get(function)
            result = NotImplemented if own is None else own(*args, **kwargs)
        if result is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if operator.overloadpacket.__name__ in _ALIKE:
            result = OPERATORS[operator](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return dequantized_call(operator, args, kwargs)


leave_to_eager(GatheredTensor.__torch_dispatch__.__func__)  # type: ignore[attr-defined]


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not GatheredTensor or isinstance(input, StoredTensor):
        return NotImplemented
    x = autocast(input).index_select(-1, weight.order)
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return frozen_linear(x, weight.stored, x.dtype, bias)
