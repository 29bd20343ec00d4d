"""An adapter's update by the compiled kernel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels
from lowmem.kernels import reference
from tests import strategies
from tests.compiled import compiled, on_threads, stored

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

PLAIN_UPDATE = reference.add_update
BATCHES = st.one_of(st.integers(1, 12), st.sampled_from([17, 31, 64, 127, 128]))  # for more, torch serves


@compiled
@given(
    BATCHES,
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(0.01, 8),
    strategies.seeds,
)
def test_an_update_equals_the_two_products(level, batch, rank, rows, columns, scaling, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, rows), (batch, columns), (rank, columns), (rows, rank)
    base, x, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    before = base.clone()
    with kernels.using(level):
        got = kernels.add_update(base, x, a, b, scaling)
    expected = base.double() + scaling * (x.double() @ a.double().t()) @ b.double().t()
    sizes = base.abs() + scaling * (x.abs() @ a.abs().t()) @ b.abs().t()
    assert ((got - expected).abs() <= 2e-6 * sizes + 1e-12).all()
    assert torch.equal(base, before)


@compiled
@given(
    st.sampled_from(["int4", "nf4", "half", "bfloat16"]),
    BATCHES,
    st.integers(1, 40),
    st.integers(1, 150),
    st.sampled_from([1, 30, 70, 256, 9000]),
    st.booleans(),
    strategies.seeds,
)
def test_a_product_with_an_update_is_the_product_and_then_the_update(
    level, kind, batch, rank, rows, columns, with_bias, seed
):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, columns), (batch, columns), (rank, columns), (rows, rank)
    dense, x, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    weight, _ = stored(kind, dense, block_size=16)
    bias = torch.randn(rows, generator=generator) if with_bias else None
    with kernels.using(level):
        expected = kernels.add_update(kernels.linear(x, weight, torch.float32, bias), x, a, b, 0.75)
        for threads in (1, 2, 3):
            with on_threads(threads):
                got = kernels.linear(x, weight, torch.float32, bias, (a, b, 0.75))
                assert torch.equal(got, expected)


@compiled
@pytest.mark.parametrize("shape", [(3, 5), (2, 7)])
def test_an_update_that_does_not_fit_its_layer_is_torch_s_error(level, shape, monkeypatch):
    monkeypatch.setattr(reference, "add_update", PLAIN_UPDATE)
    half, x = torch.randn(4, 6).half(), torch.randn(2, 6)
    with kernels.using(level), pytest.raises(RuntimeError):
        kernels.linear(x, half, torch.float32, None, (torch.randn(shape), torch.randn(4, shape[0]), 1.0))


@compiled
def test_an_update_of_another_dtype_or_layout_is_added_by_torch(level, monkeypatch):
    monkeypatch.setattr(reference, "add_update", PLAIN_UPDATE)
    half, x, a, b = torch.randn(4, 6).half(), torch.randn(2, 6), torch.randn(3, 6), torch.randn(4, 3)
    with kernels.using(level):
        expected = kernels.linear(x, half, torch.float32, None, (a, b, 2.0))
        strided = kernels.linear(x, half, torch.float32, None, (a.t().contiguous().t(), b, 2.0))
        twice = kernels.linear(x.t().contiguous().t(), half, torch.float32, None, (a, b, 2.0))
        low = kernels.linear(x.bfloat16(), half, torch.bfloat16, None, (a.bfloat16(), b.bfloat16(), 2.0))
        many = kernels.linear(x.repeat(65, 1), half, torch.float32, None, (a, b, 2.0))  # torch's products are as fast
    torch.testing.assert_close(strided, expected)
    torch.testing.assert_close(twice, expected)
    torch.testing.assert_close(many, expected.repeat(65, 1))
    torch.testing.assert_close(low, expected.bfloat16(), atol=0.1, rtol=0.1)


def test_an_update_that_c_does_not_take_goes_to_torch(monkeypatch):
    monkeypatch.setattr(reference, "add_update", PLAIN_UPDATE)
    base, x, a, b = torch.randn(3, 5), torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)
    expected = base + 0.5 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(kernels.add_update(base.t().contiguous().t(), x, a, b, 0.5), expected)
    many = kernels.add_update(base.repeat(50, 1), x.repeat(50, 1), a, b, 0.5)
    torch.testing.assert_close(many, expected.repeat(50, 1))
    wide = kernels.add_update(base.half(), x, a, b, 0.5)
    torch.testing.assert_close(wide, expected.half(), atol=1e-2, rtol=1e-2)
    with pytest.raises(RuntimeError):
        kernels.add_update(base, x[:, :3], a, b, 0.5)
