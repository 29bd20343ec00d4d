"""The product with a frozen weight under autograd, torch.func, hooks and dtype changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FourBit, Half, convert, quantize
from lowmem.nn.frozen_linear import frozen_linear
from tests import strategies


def make_weight(kind: str, rows: int = 6, columns: int = 10):
    dense = strategies.make_weight("normal", (rows, columns), 0, 3)
    return dense.half() if kind == "half" else quantize(dense, block_size=8)


def restored(weight):
    return weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float64)


kinds = pytest.mark.parametrize("kind", ["half", "4-bit"])


@kinds
def test_gradients_of_both_orders_and_both_modes_are_right_in_float64(kind):
    weight = make_weight(kind)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    product = lambda x: frozen_linear(x, weight, torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(product, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, x)


@kinds
@given(st.lists(st.integers(0, 3), max_size=3).map(tuple), strategies.seeds)
def test_every_leading_shape_gives_linear_s_output_and_gradient(kind, leading, seed):
    weight = make_weight(kind)
    x = strategies.make_input(leading, 10, seed, torch.float64)
    out = frozen_linear(x, weight, torch.float64)
    expected = torch.nn.functional.linear(x, restored(weight))
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, x, weights)[0], torch.autograd.grad(expected, x, weights)[0])


@kinds
def test_torch_func_transforms_compose(kind):
    weight = make_weight(kind)
    x = torch.randn(4, 10, dtype=torch.float64)
    loss = lambda row: frozen_linear(row, weight, torch.float64).square().sum()  # noqa: E731
    expected = 2 * x @ restored(weight).t() @ restored(weight)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    jacobian = torch.func.jacrev(lambda row: frozen_linear(row, weight, torch.float64))(x[0])
    torch.testing.assert_close(jacobian, restored(weight))
    torch.testing.assert_close(torch.func.jacfwd(lambda r: frozen_linear(r, weight, torch.float64))(x[0]), jacobian)


@kinds
def test_vmap_over_any_dimension_keeps_examples_apart(kind):
    weight = make_weight(kind)
    x = torch.randn(4, 3, 10, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, restored(weight))
    for dim in range(2):  # over the other one lies the batch of an example
        product = torch.func.vmap(lambda rows: frozen_linear(rows, weight, torch.float64), in_dims=dim, out_dims=dim)
        torch.testing.assert_close(product(x), expected)


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


@kinds
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 9), "must end in in_features=10"),
        (torch.tensor(1.0), "must end in in_features=10"),
        (torch.ones(3, 10, dtype=torch.int64), "torch.int64 must be a floating-point"),
        (torch.ones(3, 10, dtype=torch.complex64), "torch.complex64 must be a floating-point"),
    ],
)
def test_a_wrong_input_raises_what_linear_raises(kind, x, message):
    with pytest.raises(RuntimeError):
        torch.nn.Linear(10, 6)(x)
    with pytest.raises(RuntimeError, match=message):
        frozen_linear(x, make_weight(kind), torch.float32)


def test_stored_tensors_of_another_format_or_dtype_are_not_loaded():
    make = lambda technique: convert(torch.nn.Sequential(torch.nn.Linear(32, 8)), technique)  # noqa: E731
    model = make(FourBit("nf4", 16, "float16"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="0 stores nf4, block_size=16, scales=float16; the state holds int4"):
        model.load_state_dict(make(FourBit("int4", 16, "float16")).state_dict())
    wide = make(FourBit("nf4", 16, "float32")).state_dict()
    wide = {name: tensor for name, tensor in wide.items() if "_extra_state" not in name}  # which says no format
    with (
        pytest.warns(UserWarning, match="how its 4-bit codes are stored"),
        pytest.raises(RuntimeError, match=r"0.weight_scales has shape \(8, 4\); the state holds \(8, 8\)"),
    ):
        model.load_state_dict(wide)
    half = make(Half())
    with pytest.raises(RuntimeError, match="0.weight_rounded stores torch.float16; the state holds torch.bfloat16"):
        half.load_state_dict(make(Half(torch.bfloat16)).state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
