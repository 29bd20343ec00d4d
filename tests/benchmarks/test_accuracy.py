"""A product of the benchmarks that is wrong in one place is seen, and one that is right passes."""

import pytest
import torch

from benchmarks.accuracy import assert_layers_exact, assert_product
from lowmem import FourBit, convert


@pytest.fixture
def product():
    """Return x, a weight, a bias, and their product in float32."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 64), torch.randn(8, 64), torch.randn(8)
    return x, weight, bias, torch.nn.functional.linear(x, weight, bias)


def test_a_product_is_right(product):
    x, weight, bias, out = product
    assert_product(out, x, [weight], bias)
    assert_product(out - bias, x, [weight])


def test_one_of_several_weights_may_be_what_is_multiplied_with(product):
    x, weight, bias, out = product
    assert_product(out, x, [weight + 1, weight], bias)


def test_an_output_that_is_wrong_by_a_thousandth_is_seen(product):
    x, weight, bias, out = product
    out[2, 3] *= 1.001
    with pytest.raises(AssertionError, match="a product is beyond its bound"):
        assert_product(out, x, [weight], bias)


def test_a_product_without_its_bias_is_seen(product):
    x, weight, bias, out = product
    with pytest.raises(AssertionError, match="a product is beyond its bound"):
        assert_product(out - bias, x, [weight], bias)


def test_each_layer_of_a_model_is_held_to_what_it_stores():
    torch.manual_seed(0)
    model = convert(
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)), FourBit("nf4")
    )
    assert_layers_exact(model, torch.randn(2, 64))
    model[2].register_forward_hook(lambda layer, inputs, out: out * 1.01, prepend=True)
    with pytest.raises(AssertionError, match="a product is beyond its bound"):
        assert_layers_exact(model, torch.randn(2, 64))
