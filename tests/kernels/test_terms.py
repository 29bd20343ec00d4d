"""More than a few float32 inputs: sums of bfloat16 terms are as close as float32's; what has none is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels, quantize
from lowmem.quant import formats
from tests import strategies
from tests.compiled import assert_exact, compiled, spread_inputs, stored

KINDS = ["int4", "nf4", "half", "bfloat16"]


def assert_as_float32(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """What is not finite is so in the same places and of the same sign; what is finite is exact."""
    expected = x.double() @ dense.double().t()
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert ((got == expected) | got.isnan())[expected.isinf()].all()
    rows, columns = x.isfinite().all(1), dense.isfinite().all(1)
    assert_exact(got[rows][:, columns], x[rows], dense[columns])


@compiled
@pytest.mark.parametrize("block_size", [8, 10, 16, 24, 32, 48, 64, 72, 100, 128, 4096, "half", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (31, 65), (64, 192), (130, 1300), (1058, 129), (32, 2000), (40, 4200)]
)
def test_batches_and_weights_around_whole_tiles(level, block_size, rows, columns):
    dense = strategies.make_weight("normal", (rows, columns), 0, 2)
    cases = [stored(block_size, dense)] if isinstance(block_size, str) else []
    cases = cases or [stored(kind, dense, block_size=block_size) for kind in ("int4", "nf4")]
    generator = torch.Generator().manual_seed(rows)
    bias = torch.randn(rows, generator=generator)
    with kernels.using(level):
        for batch in (5, 12, 13, 16, 17, 31, 32, 33, 50, 97, 130):
            x = torch.randn(batch, columns, generator=generator)
            grad = torch.randn(batch, rows, generator=generator)
            for w, numbers in cases:
                assert_exact(kernels.linear(x, w, torch.float32, bias), x, numbers, bias)
                assert_exact(kernels.input_grad(grad, w, torch.float32), grad, numbers.t())


@compiled
@given(
    st.sampled_from(KINDS),
    st.sampled_from([5, 13, 20, 40, 100]),
    st.integers(1, 700),
    st.sampled_from([8, 16, 24, 64, 256, 1024]),
    st.sampled_from(["float32", "float16", "double"]),
    st.integers(0, 38),
    strategies.seeds,
)
def test_products_lose_no_more_than_float32_s(level, kind, batch, columns, block_size, scales, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    wide, numbers = stored(kind, torch.randn(9, columns, generator=generator), block_size=block_size, scales=scales)
    tall, turned = stored(kind, torch.randn(columns, 9, generator=generator), block_size=block_size, scales=scales)
    x = spread_inputs(torch.linspace(-3.0, 12, batch), columns, decades, generator)
    with kernels.using(level):
        assert_exact(kernels.linear(x, wide, torch.float32), x, numbers)
        assert_exact(kernels.input_grad(x, tall, torch.float32), x, turned.t())


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [-149, -126, -100, -61, -60, -59, 59, 60, 61, 100, 120])
def test_inputs_of_every_magnitude(level, kind, exponent):
    """All of them, one of them, and a single number of one."""
    w, numbers = stored(kind, torch.randn(70, 300, generator=torch.Generator().manual_seed(0)) * 0.01)
    every = torch.linspace(-1, 1, 120 * 300).reshape(120, 300) * 2.0**exponent
    one, single = torch.randn(2, 120, 300)
    one[3], single[3, 5] = every[3], 2.0**exponent
    one[4] = 0
    with kernels.using(level):
        for x in (every, one, single):
            assert_exact(kernels.linear(x, w, torch.float32), x, numbers)
            grad = x[:, :70].contiguous()
            assert_exact(kernels.input_grad(grad, w, torch.float32), grad, numbers.t())


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [-149, -148, -147])
def test_inputs_that_are_the_least_of_all_count_beside_large_weights(level, kind, exponent):
    w, numbers = stored(kind, torch.full((70, 4096), 6e4), **({} if kind == "nf4" else {"scales": "float16"}))
    x = torch.full((100, 4096), 2.0**exponent)
    with kernels.using(level):
        assert_exact(kernels.linear(x, w, torch.float32), x, numbers)
        grad = x[:, :70].contiguous()
        assert_exact(kernels.input_grad(grad, w, torch.float32), grad, numbers.t())


@compiled
@pytest.mark.parametrize("kind", ["int4", "nf4", "bfloat16"])
@pytest.mark.parametrize("exponent", [-120, -90, -41, -40, -33, -31, 0, 30, 59, 61, 90, 110])
def test_weights_of_every_magnitude(level, kind, exponent):
    """The whole weight, a row, and a block; a row of zeros."""
    whole = torch.randn(70, 300, generator=torch.Generator().manual_seed(0)) * 2.0**exponent
    row, block = torch.randn(2, 70, 300)
    row[3], block[3, 16:32] = whole[3], whole[3, 16:32]
    row[4] = 0
    for dense in (whole, row, block):
        w, numbers = stored(kind, dense, **({} if kind == "bfloat16" else {"block_size": 16, "scales": "float32"}))
        x, grad = torch.randn(100, 300), torch.randn(100, 70)
        with kernels.using(level):
            assert_exact(kernels.linear(x, w, torch.float32), x, numbers)
            assert_exact(kernels.input_grad(grad, w, torch.float32), grad, numbers.t())


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("column", [0, 45, 69])
def test_what_is_not_finite_shows_as_in_float32(level, kind, value, column):
    dense = strategies.make_weight("normal", (70, 330), 0, 0) + 3  # no weight is zero
    w, numbers = stored(
        kind, dense, **({} if kind in ("half", "bfloat16") else {"block_size": 16, "scales": "float32"})
    )
    x, grad = torch.randn(100, 330), torch.randn(100, 70)
    broken_x, broken_grad = x.clone(), grad.clone()
    broken_x[1, column], broken_grad[1, column] = value, value
    broken = replace(w, scales=w.scales.clone()) if hasattr(w, "scales") else w.clone()
    (broken.scales if hasattr(w, "scales") else broken)[column, 2] = value
    of_broken = broken.dequantize() if hasattr(w, "scales") else broken.float()
    with kernels.using(level):
        assert_as_float32(kernels.linear(broken_x, w, torch.float32), broken_x, numbers)
        assert_as_float32(kernels.input_grad(broken_grad, w, torch.float32), broken_grad, numbers.t())
        assert_as_float32(kernels.linear(x, broken, torch.float32), x, of_broken)
        assert_as_float32(kernels.input_grad(grad, broken, torch.float32), grad, of_broken.t())
        assert_exact(kernels.linear(x, w, torch.float32), x, numbers)  # and is not remembered


@compiled
@pytest.mark.parametrize("least", [1e-2, 1e-6, 1e-20, 1e-38])
def test_levels_of_every_magnitude(level, least, monkeypatch):
    """Sixteen levels as data, all but one so small that their terms would be lost; half of the rows have no other."""
    small = replace(formats.get_format("nf4"), name="small", levels=(*(least * c for c in range(-8, 7)), 1.0))
    monkeypatch.setattr(formats, "FORMATS", {**formats.FORMATS, "small": small})
    q = quantize(strategies.make_weight("normal", (70, 300), 0, 0), "small", scales="float32")
    q.packed[::2] &= 0x77
    x, grad = torch.randn(100, 300), torch.randn(100, 70)
    with kernels.using(level):
        assert_exact(kernels.linear(x, q, torch.float32), x, q.dequantize(torch.float64))
        assert_exact(kernels.input_grad(grad, q, torch.float32), grad, q.dequantize(torch.float64).t())
