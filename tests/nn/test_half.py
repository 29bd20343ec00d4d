"""HalfLinear loses what rounding to 16 bits loses, and nothing more."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import BigNet, Half, HalfLinear, build, convert, kernels, measure
from tests import strategies
from tests.rounding import assert_product
from tests.selection import rows_in_one_case

half_dtypes = st.sampled_from([torch.float16, torch.bfloat16])


@given(strategies.linears(), half_dtypes)
def test_stored_weights_are_the_rounded_ones_frozen_and_copied(linear, dtype):
    original = copy.deepcopy(linear)
    layer = convert(linear, Half(dtype))
    assert isinstance(layer, HalfLinear)
    assert torch.equal(layer.weight, original.weight.to(dtype))
    assert (layer.bias is None) == (original.bias is None)
    assert layer.bias is None or torch.equal(layer.bias, original.bias.to(dtype))
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_bignet_stays_within_what_the_rounding_allows(seed):
    x = torch.randn(32, 1024, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        error = measure.difference(build("bignet", seed=seed)(x), build("half_precision", seed=seed)(x))
    assert error.max <= 0.0005
    assert error.mean <= 0.0001


@rows_in_one_case(
    ("x", "weight", "compute"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)
def test_the_product_is_taken_in_the_wider_dtype(x, weight, compute):
    layer = convert(torch.nn.Linear(64, 32), Half(weight))
    value = torch.randn(5, 64).to(x)
    out = layer(value)
    assert out.dtype == x
    # The product, the bias added to it, and the output may each be rounded to a dtype of fewer bits.
    assert_product(
        out,
        value,
        layer.weight,
        layer.bias,
        sums=torch.float64 if compute == torch.float64 else torch.float32,
        rounded=(compute, compute, x) if x != torch.float64 else (),
    )


def test_autocast_gives_its_dtype_as_for_a_dense_layer():
    layer = convert(torch.nn.Linear(16, 8), Half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 16)).dtype == torch.bfloat16
        assert layer(torch.randn(2, 16, dtype=torch.float64)).dtype == torch.float64


@rows_in_one_case(
    ("value", "message"),
    [
        (float("nan"), "0.weight holds 1 values that are NaN"),
        (float("inf"), "0.weight holds 1 values that are NaN or infinite"),
        (1e5, "magnitude 100000, above 65504.*bfloat16"),
    ],
)
@rows_in_one_case("name", ["weight", "bias"])
def test_values_that_cannot_be_stored_are_named(name, value, message):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with torch.no_grad():
        getattr(model[0], name).view(-1)[0] = value
    with pytest.raises(ValueError, match=message.replace("0.weight", f"0: {name}")):
        convert(model, Half())
    assert type(model[0]) is torch.nn.Linear


def test_bignet_halves():
    assert len({Half(), Half(torch.float16), Half(torch.bfloat16)}) == 2  # a technique is a value, which a set holds
    model = convert(BigNet(), Half())
    assert measure.theoretical_bytes(model) == 37_826_560


@pytest.mark.parametrize("kernel", ["reference", kernels.available()[-1]])
def test_a_float16_input_is_multiplied_with_bfloat16_weights_that_float16_does_not_hold(kernel):
    layer = convert(torch.nn.Linear(8, 3, bias=False), Half(torch.bfloat16))
    layer.weight_rounded.fill_(2.0**20)
    with kernels.using(kernel):
        out = layer(torch.full((2, 8), 2.0**-10, dtype=torch.float16))
    assert torch.equal(out, torch.full((2, 3), 2.0**13, dtype=torch.float16))
