"""Levels on a grid and a few inputs: sums in integers are as close as those of floats, whatever the inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels, quantize
from tests import strategies
from tests.compiled import (
    assert_close_in,
    assert_exact,
    compiled,
    exact_product,
    on_threads,
    spread_inputs,
)

pytestmark = pytest.mark.parametrize("form", ["int4", "fp4"])
few = st.integers(1, 4)
columns_of_groups = st.one_of(st.integers(1, 700), st.sampled_from([128, 256, 640, 1024]))  # whole ones or not


@compiled
@given(
    few,
    columns_of_groups,
    st.sampled_from([8, 16, 24, 32, 64, 128, 256, 1024]),
    st.sampled_from(["float32", "float16", "double"]),
    st.integers(0, 38),
    strategies.seeds,
)
def test_products_lose_no_more_than_float32_s(level, form, batch, columns, block_size, scales, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(9, columns, generator=generator), form, block_size=block_size, scales=scales)
    x = spread_inputs(torch.arange(-3.0, batch - 3), columns, decades, generator)
    with kernels.using(level):
        got = kernels.linear(x, q, torch.float32)
    assert_exact(got, x, q.dequantize(torch.float64))


@compiled
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1e-28, 1e-26, 1.0, 1.2e30, 1.3e30, 1e35])
def test_inputs_of_every_magnitude(level, form, largest):
    q = quantize(strategies.make_weight("normal", (7, 300), 0, 0), form)
    x = torch.linspace(-1, 1, 600).reshape(2, 300) * largest
    x[1, :128] = 0  # a group without an input
    with kernels.using(level):
        got = kernels.linear(x, q, torch.float32)
    assert got.isfinite().all()
    assert_exact(got, x, q.dequantize(torch.float64))


@compiled
@pytest.mark.parametrize("tiny", [2.0**-24, 0.49 * 2.0**-23, 1.49 * 2.0**-23, 2.0**-20 / 3])
def test_what_is_small_beside_a_large_neighbour_is_off_by_less_than_the_norms_allow(level, form, tiny):
    """Every small input is rounded the same way, all weights have one sign: the errors add up."""
    q = quantize(torch.full((3, 1024), 0.7) + 0.3 * torch.rand(3, 1024), form)
    x = torch.full((2, 1024), tiny)
    x[:, ::128] = 1.0
    with kernels.using(level):
        got = kernels.linear(x, q, torch.float32)
    assert_exact(got, x, q.dequantize(torch.float64))


@compiled
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("column", [0, 129, 299])
def test_what_is_not_finite_shows_as_in_float32(level, form, value, column):
    q = quantize(strategies.make_weight("normal", (7, 300), 0, 0) + 3, form)  # no weight is zero
    x = torch.randn(3, 300)
    x[1, column] = value
    expected = x.double() @ q.dequantize(torch.float64).t()
    with kernels.using(level):
        got = kernels.linear(x, q, torch.float32)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[1].nan_to_num(), expected[1].float().nan_to_num())
    assert_exact(got[::2], x[::2], q.dequantize(torch.float64))


@compiled
@given(few, columns_of_groups, strategies.seeds)
def test_float16_is_widened_and_rounded_once(level, form, batch, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(5, columns, generator=generator), form)
    x = torch.randn(batch, columns, generator=generator).half()
    expected, allowed = exact_product(x, q.dequantize())
    with kernels.using(level):
        got = kernels.linear(x, q, torch.float16)
    rounded = 2.0**-11 * (expected.abs() + allowed) + 2.0**-25  # the second where the result is subnormal
    assert ((got.double() - expected).abs() <= allowed + rounded).all()


@compiled
@pytest.mark.parametrize("block_size", [64, 1024, 4096])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_sums_that_cancel_are_as_exact_as_those_of_single_levels(level, form, block_size, spread):
    """Inputs of one sign, weights far below their block's scale: nothing large may be there to cancel."""
    weight = torch.full((2, 4096), 0.0 if form == "fp4" else 1 / 15)
    weight[1, ::2] *= -1
    weight[:, ::block_size] = 1.0
    q = quantize(weight, form, block_size=block_size, scales="float32")
    x = 1 + spread * torch.rand(2, 4096, generator=torch.Generator().manual_seed(0))
    x[:, ::block_size] = 0
    with kernels.using(level):
        got = kernels.linear(x, q, torch.float32)
    assert_exact(got, x, q.dequantize(torch.float64))
    if form == "fp4":
        assert torch.equal(got, torch.zeros(2, 2))


@compiled
@given(
    columns_of_groups,
    st.sampled_from([8, 16, 24, 32, 64, 128, 256, 1024]),
    st.sampled_from(["float32", "float16", "double"]),
    st.integers(0, 38),
    strategies.seeds,
)
def test_one_input_in_bfloat16_loses_no_more_than_its_rounding(
    level, form, columns, block_size, scales, decades, seed
):
    generator = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(9, columns, generator=generator), form, block_size=block_size, scales=scales)
    x = spread_inputs(torch.zeros(1), columns, decades, generator).bfloat16()
    with kernels.using(level):
        got = kernels.linear(x, q, torch.bfloat16)
    assert_close_in(torch.bfloat16, got, x, q.dequantize())


@compiled
@pytest.mark.parametrize("tiny", [0.49, 1.49, 7.49])
@pytest.mark.parametrize("large", [1, 2, 3, 4, 8])
def test_bfloat16_beside_large_neighbours_is_off_by_no_more_than_its_rounding(level, form, tiny, large):
    """Every small input is rounded the same way by digits, and meets weights that are large beside the others."""
    weight = torch.ones(3, 1024)
    x = torch.full((1, 1024), tiny / 0x7F00)
    for column in range(large):
        x[:, 17 * column % 128 :: 128] = 1.0
        weight[:, 17 * column % 128 :: 128] = 1 / 15 if form == "int4" else 1 / 12
    x, q = x.bfloat16(), quantize(weight, form, block_size=16)
    with kernels.using(level):
        got = kernels.linear(x, q, torch.bfloat16)
    assert_close_in(torch.bfloat16, got, x, q.dequantize())


@compiled
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-34, 8e-19, 9e-19, 1.0, 1.2e30, 1.3e30, 1e35])
def test_one_input_of_every_magnitude(level, form, largest):
    q = quantize(strategies.make_weight("normal", (7, 300), 0, 0), form, block_size=16)
    x = torch.linspace(-1, 1, 300).reshape(1, 300) * largest
    x[:, :128] = 0  # a group without an input
    with kernels.using(level):
        exact, close = kernels.linear(x, q, torch.float32), kernels.linear(x.bfloat16(), q, torch.bfloat16)
    assert_exact(exact, x, q.dequantize(torch.float64))
    assert_close_in(torch.bfloat16, close, x.bfloat16(), q.dequantize())


@compiled
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("column", [0, 129, 299])
def test_one_bfloat16_that_is_not_finite_shows(level, form, value, column):
    q = quantize(strategies.make_weight("normal", (7, 300), 0, 0) + 3, form, block_size=16)
    x = torch.randn(1, 300).bfloat16()
    x[0, column] = value
    expected = x.double() @ q.dequantize(torch.float64).t()
    with kernels.using(level):
        got = kernels.linear(x, q, torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.float().nan_to_num(), expected.bfloat16().float().nan_to_num())


@compiled
@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("faint", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("large", [10.0, 1e3, 1e5])
def test_bfloat16_beside_many_large_ones_that_hardly_count(level, form, block_size, faint, large):
    """Those meet a block of small weights: what the others lose is not small beside what they make."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 256, generator=generator), torch.randn(1, 256, generator=generator)
    weight[:, :block_size] *= faint
    x[:, :8] = large * torch.tensor([1.0, -1.0]).repeat(4)
    x, q = x.bfloat16(), quantize(weight, form, block_size=block_size, scales="float16")
    with kernels.using(level):
        got = kernels.linear(x, q, torch.bfloat16)
    assert_close_in(torch.bfloat16, got, x, q.dequantize())


@compiled
@pytest.mark.parametrize("large", [100.0, 1e3, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_a_large_bfloat16_that_meets_no_weight_takes_nothing_from_others(level, form, batch, large):
    """In the forward a block of zeros, in the gradient a row of them."""
    q = quantize(torch.ones(96, 256), form, block_size=16, scales="float16")
    q.scales[:, 0] = 0
    x = torch.ones(batch, 256, dtype=torch.bfloat16)
    x[:, 3] = large
    with kernels.using(level):
        assert_close_in(torch.bfloat16, kernels.linear(x, q, torch.bfloat16), x, q.dequantize())
    q.scales[0] = 0
    grad = torch.ones(batch, 96, dtype=torch.bfloat16)
    grad[:, 0] = large
    with kernels.using(level):
        assert_close_in(torch.bfloat16, kernels.input_grad(grad, q, torch.bfloat16), grad, q.dequantize().t())


@compiled
@pytest.mark.parametrize("block_size", [8, 16, 24, 32])
@pytest.mark.parametrize("batch", [1, 2, 4, 5])
@pytest.mark.parametrize("large", [1e3, 1e6, 1e9])
def test_many_large_ones_that_meet_no_weight_take_nothing_from_a_few_others(level, form, block_size, batch, large):
    """Zeros among a block's codes, or a block of zeros: beside each of the small ones lies a large one."""
    weight = torch.zeros(3, 144)
    weight[:, 1:16] = 1
    q = quantize(weight, form, block_size=block_size, scales="float16")
    if form == "int4":  # which has no zero
        q = quantize(torch.ones(3, 144), form, block_size=block_size, scales="float16")
        q.scales.zero_()
        q.scales[:, 2:4] = 1
    weights = q.dequantize()
    assert (weights == 0).any()
    x = torch.where(weights[:1] == 0, large, 1.0).expand(batch, -1).bfloat16()
    with kernels.using(level):
        assert_close_in(torch.bfloat16, kernels.linear(x, q, torch.bfloat16), x, weights)


@compiled
@given(
    st.integers(1, 400),
    columns_of_groups,
    st.sampled_from([8, 16, 32, 64, 128, 256]),
    st.sampled_from(["float16", "double"]),
    st.integers(0, 38),
    st.integers(0, 4),
    strategies.seeds,
)
def test_gradients_of_one_input_lose_no_more_than_float32_s(
    level, form, rows, columns, block_size, scales, decades, apart, seed
):
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-apart * torch.rand(rows, 1, generator=generator))
    q = quantize(torch.randn(rows, columns, generator=generator) * sizes, form, block_size=block_size, scales=scales)
    grad = spread_inputs(torch.zeros(1), rows, decades, generator)
    with kernels.using(level):
        got = kernels.input_grad(grad, q, torch.float32)
    assert_exact(got, grad, q.dequantize(torch.float64).t())


@compiled
@pytest.mark.parametrize("small", [1.0, 1e-6])
def test_gradients_of_every_magnitude(level, form, small):
    """And float16 scales that are subnormal, blocks of zeros, rows without a gradient."""
    weight = strategies.make_weight("normal", (300, 384), 0, 0) * small
    weight[::3, 64:128] = 0
    q = quantize(weight, form, block_size=16)
    for largest in (0.0, 1e-45, 1e-38, 1e-19, 1.0, 1e17, 1e19, 1e35):
        grad = torch.linspace(-1, 1, 300).reshape(1, 300) * largest
        grad[:, :128] = 0
        with kernels.using(level):
            got = kernels.input_grad(grad, q, torch.float32)
        assert_exact(got, grad, q.dequantize(torch.float64).t())


@compiled
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("row", [0, 130, 299])
def test_a_gradient_that_is_not_finite_shows_as_in_float32(level, form, value, row):
    q = quantize(strategies.make_weight("normal", (300, 256), 0, 0) + 3, form, block_size=16)  # no weight is zero
    grad = torch.randn(1, 300)
    grad[0, row] = value
    expected = grad.double() @ q.dequantize(torch.float64)
    with kernels.using(level):
        got = kernels.input_grad(grad, q, torch.float32)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.float().nan_to_num())


@compiled
@pytest.mark.parametrize("columns", [128, 640, 768, 1100, 1408])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("later", [False, True])
def test_threads_change_no_bit_of_a_gradient(level, form, columns, block_size, later):
    """Groups of columns that share what is found of their scales may go to two threads; some are left to others."""
    weight = torch.randn(300, columns, generator=torch.Generator().manual_seed(0))
    apart = weight[:, 512:] if later else weight[:, :512]
    apart *= 10 ** torch.linspace(-4, 0, 300)[:, None]
    q, grad = quantize(weight, form, block_size=block_size), torch.randn(1, 300)
    found = []
    with kernels.using(level):
        for count in (1, 2, 3, 5, 8):
            with on_threads(count):
                found.append(kernels.input_grad(grad, q, torch.float32))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert_exact(found[0], grad, q.dequantize(torch.float64).t())
