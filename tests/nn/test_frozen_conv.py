"""The convolution with a frozen weight under autograd, torch.func and as an operator."""

import pytest
import torch

from lowmem import quantize
from lowmem.kernels.frozen_weight_operator import codes_scales_and_description
from lowmem.nn.frozen_conv import Geometry, frozen_conv
from tests import strategies
from tests.operators import assert_operator

# dynamo makes an instance of every function of one's own
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

GEOMETRY = Geometry(4, 6, 2, (3,), (2,), (1,), (1,))
kinds = pytest.mark.parametrize("kind", ["half", "4-bit"])


def make_weight(kind: str):
    dense = strategies.make_weight("normal", (6, 6), 0, 3)
    return dense.half().view(6, 2, 3) if kind == "half" else quantize(dense, block_size=8)


def exact(weight, x):
    dense = weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float64)
    return torch.nn.functional.conv1d(x, dense.view(6, 2, 3), None, 2, 1, 1, 2)


@kinds
def test_torch_func_transforms_compose(kind):
    weight = make_weight(kind)
    x = torch.randn(3, 4, 9, dtype=torch.float64)
    loss = lambda one: frozen_conv(one, weight, GEOMETRY, torch.float64).square().sum()  # noqa: E731
    expected = torch.func.grad(lambda x: exact(weight, x).square().sum())(x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    conv = lambda one: frozen_conv(one, weight, GEOMETRY, torch.float64)  # noqa: E731
    torch.testing.assert_close(torch.func.jacfwd(conv)(x[0]), torch.func.jacrev(conv)(x[0]))


@kinds
def test_vmap_over_any_dimension_keeps_examples_apart(kind):
    weight = make_weight(kind)
    x = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    expected = exact(weight, x.flatten(0, 1)).unflatten(0, (2, 3))
    for dim in range(2):  # over the other one lies the batch of an example
        conv = lambda batch: frozen_conv(batch, weight, GEOMETRY, torch.float64)  # noqa: E731
        torch.testing.assert_close(torch.func.vmap(conv, in_dims=dim, out_dims=dim)(x), expected)


@kinds
@pytest.mark.parametrize("size", [None, [9]], ids=["forward", "adjoint"])
def test_the_operator_is_what_torch_expects_of_one(kind, size):
    weight = make_weight(kind)
    x = torch.randn(2, 4, 9, requires_grad=True) if size is None else torch.randn(2, 6, 5, requires_grad=True)
    stored = codes_scales_and_description(weight) if kind == "4-bit" else (weight, None, "")
    arguments = (x, *stored, [4, 6, 2, 3, 2, 1, 1], torch.float32, size)
    assert_operator(torch.ops.lowmem.convolve.default, arguments)
