"""A stored matrix ``W[:, order]``, as in GPTQ files whose groups of columns lie apart (desc_act). A product gathers
the columns of its input once; any other operator gets values in the order of W."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.nn import stored_products, stored_views  # noqa: F401 - register what is copied here
from lowmem.nn.call_context import autocast_linear_input
from lowmem.nn.frozen_linear import frozen_linear
from lowmem.nn.stored_tensor import FUNCTIONS, OPERATORS, StoredTensor


def check_column_permutation(column_order: Tensor, tensor_name: str) -> None:
    """Check that an order that was read from a file or state is a permutation; one on the meta device passes."""
    columns = torch.arange(len(column_order), dtype=torch.int64, device=column_order.device)
    if not column_order.is_meta and not torch.equal(column_order.sort().values, columns):
        raise ValueError(f"{tensor_name} does not name each of {len(column_order)} columns once; get it again")


class GatheredTensor(StoredTensor):
    """A read-only matrix (rows, columns) whose parts hold its columns in the order ``order``: int32 (columns,)."""

    order: Tensor
    functions: ClassVar[dict[Any, Any]] = {}
    operators: ClassVar[dict[Any, Any]] = {}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a dense tensor, rounded once to ``dtype`` (None: the dtype of this tensor)."""
        return super().dequantize(dtype).index_select(-1, self.order.argsort())


def _gathered_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not GatheredTensor or isinstance(input, StoredTensor) or weight.dim() != 2:
        return NotImplemented
    x = autocast_linear_input(input).index_select(-1, weight.order)
    bias = bias.dequantize() if isinstance(bias, StoredTensor) else bias
    return frozen_linear(x, weight.kernel_weight, x.dtype, bias)


# For torch.load(weights_only=True)
torch.serialization.add_safe_globals([GatheredTensor])

# Writes are errors, as for any stored weight; of what reads it, copies and rows keep the order of the columns.
_ALIKE = ("detach", "alias", "lift_fresh", "clone", "_to_copy")
_ROWS = ("select", "slice", "split", "split_with_sizes", "unbind", "index_select", "index")
GatheredTensor.functions.update(FUNCTIONS)
GatheredTensor.functions[functional.linear] = _gathered_linear
GatheredTensor.operators.update(
    {call: own for call, own in OPERATORS.items() if call.overloadpacket.__name__ in _ALIKE + _ROWS}
)
