"""The product with a frozen weight under autograd, torch.func, hooks and dtype changes."""

import sys

import pytest
import torch

from lowmem import FourBit, convert, quantize
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


def called_functions(function) -> list[str]:
    """Return the names of the functions of Python that a second call of ``function`` calls."""
    names = []
    function()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.parametrize(("of_input", "most"), [(False, 40), (True, 60)], ids=["bias", "input"])
def test_a_differentiated_call_reads_no_signature(of_input, most):
    """torch reads the signature of an autograd function with a ``setup_context``, which takes longer than a small
    product: half of the functions that were called."""
    layer = convert(torch.nn.Linear(64, 64), FourBit())
    x = torch.randn(2, 64, requires_grad=of_input)
    names = called_functions(lambda: layer(x))
    assert "signature" not in names
    assert len(names) <= most
    out = layer(x)
    assert "signature" not in called_functions(lambda: out.backward(torch.ones_like(out), retain_graph=True))


@kinds
def test_a_product_whose_bias_alone_is_differentiated_has_no_node(kind):
    weight, bias = make_weight(kind), torch.randn(6, requires_grad=True)
    x = torch.randn(3, 10)
    out = frozen_linear(x, weight, torch.float32, bias)
    (added,) = (node for node, _ in out.grad_fn.next_functions if node is not None)
    assert added.variable is bias
    torch.testing.assert_close(out, frozen_linear(x, weight, torch.float32) + bias, rtol=0, atol=0)
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.full((6,), 3.0))


def test_a_product_without_a_gradient_refuses_a_16_bit_weight_that_requires_one():
    weight = torch.nn.Parameter(make_weight("half"))
    bias = torch.randn(6, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires a gradient, and would get none"):
        frozen_linear(torch.randn(3, 10), weight, torch.float32, bias)


@kinds
def test_gradients_of_functional_transforms_are_those_of_autograd(kind):
    weight, x = make_weight(kind), torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    product = lambda x: frozen_linear(x, weight, torch.float64).square().sum()  # noqa: E731
    expected = torch.autograd.grad(product(x), x)[0]
    torch.testing.assert_close(torch.func.grad(product)(x.detach()), expected)
    jacobian = torch.func.jacrev(lambda x: frozen_linear(x, weight, torch.float64))(x.detach()[0])
    torch.testing.assert_close(jacobian, torch.func.jacfwd(lambda x: frozen_linear(x, weight, torch.float64))(x[0]))
