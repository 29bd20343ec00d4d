"""The product with a frozen weight under autograd, torch.func, hooks and dtype changes."""

import pytest
import torch

from lowmem import quantize
from lowmem.nn.frozen_linear import frozen_linear
from tests import strategies


def make_weight(kind: str, rows: int = 6, columns: int = 10):
    dense = strategies.make_weight("normal", (rows, columns), 0, 3)
    return dense.half() if kind == "half" else quantize(dense, block_size=8)


kinds = pytest.mark.parametrize("kind", ["half", "4-bit"])


@kinds
def test_gradients_of_both_orders_and_both_modes_are_right_in_float64(kind):
    weight = make_weight(kind)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    product = lambda x: frozen_linear(x, weight, torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(product, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, x)


@kinds
def test_the_graph_saves_stored_bytes_only(kind):
    weight = make_weight(kind, 64, 64)
    saved = []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        frozen_linear(x, weight, torch.float32).sum()
    stored = [weight] if kind == "half" else [weight.packed, weight.scales]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in stored]


@kinds
def test_a_weight_changed_before_backward_is_an_error(kind):
    weight = make_weight(kind)
    x = torch.randn(2, 10, requires_grad=True)
    out = frozen_linear(x, weight, torch.float32)
    (weight if kind == "half" else weight.packed).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
