"""An adapter's update by the compiled kernel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels
from lowmem.kernels import reference
from tests import strategies
from tests.compiled import bound, compiled, on_threads, stored
from tests.rounding import assert_sum

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

PLAIN_UPDATE = reference.add_low_rank


def assert_update(got, base, x, a, b, scaling, rounded=(), weight=None):
    """Hold an update to ``base + scaling * (x @ A.T) @ B.T`` of these factors in float64.

    Where a weight is given, its product with x is the base.

    Each term is rounded in a sum over the columns, in one over the rank and the base, and when it is scaled, by a
    number that was rounded: errors of sums of sums multiply, and gamma_m + gamma_n + gamma_m gamma_n <= gamma_(m+n)
    (Higham, lemma 3.3).
    """
    x, a, b = (tensor.double() for tensor in (x, a, b))
    base = base.double() if weight is None else x @ weight.double().t()
    sizes = base.abs() if weight is None else x.abs() @ weight.double().abs().t()
    expected = base + scaling * (x @ a.t()) @ b.t()
    magnitudes = sizes + scaling * (x.abs() @ a.abs().t()) @ b.abs().t()
    assert_sum(got, expected, magnitudes, x.shape[1] + a.shape[0] + 3, rounded=rounded)


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
def test_an_update_equals_the_two_products(isa, batch, rank, rows, columns, scaling, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, rows), (batch, columns), (rank, columns), (rows, rank)
    base, x, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    before = base.clone()
    with kernels.temporary_cpu_backend(isa):
        got = kernels.add_low_rank(base, x, a, b, scaling)
    assert_update(got, base, x, a, b, scaling)
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
    isa, kind, batch, rank, rows, columns, with_bias, seed
):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, columns), (batch, columns), (rank, columns), (rows, rank)
    dense, x, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    weight, _ = stored(kind, dense, block_size=16)
    bias = torch.randn(rows, generator=generator) if with_bias else None
    with kernels.temporary_cpu_backend(isa):
        expected = kernels.add_low_rank(kernels.linear(x, weight, torch.float32, bias), x, a, b, 0.75)
        for threads in (1, 2, 3):
            with on_threads(threads):
                got = kernels.linear(x, weight, torch.float32, bias, (a, b, 0.75))
                assert torch.equal(got, expected)


@bound
@pytest.mark.parametrize("shape", [(3, 5), (2, 7)])
def test_an_update_that_does_not_fit_its_layer_is_torch_s_error(isa, shape, monkeypatch):
    monkeypatch.setattr(reference, "add_low_rank", PLAIN_UPDATE)
    half, x = torch.randn(4, 6).half(), torch.randn(2, 6)
    with kernels.temporary_cpu_backend(isa), pytest.raises(RuntimeError):
        kernels.linear(x, half, torch.float32, None, (torch.randn(shape), torch.randn(4, shape[0]), 1.0))


@bound
def test_an_update_of_another_dtype_or_layout_is_added_by_torch(isa, monkeypatch):
    monkeypatch.setattr(reference, "add_low_rank", PLAIN_UPDATE)
    half, x, a, b = torch.randn(4, 6).half(), torch.randn(2, 6), torch.randn(3, 6), torch.randn(4, 3)
    with kernels.temporary_cpu_backend(isa):
        strided = kernels.linear(x, half, torch.float32, None, (a.t().contiguous().t(), b, 2.0))
        twice = kernels.linear(x.t().contiguous().t(), half, torch.float32, None, (a, b, 2.0))
        low = kernels.linear(x.bfloat16(), half, torch.bfloat16, None, (a.bfloat16(), b.bfloat16(), 2.0))
        many = kernels.linear(x.repeat(65, 1), half, torch.float32, None, (a, b, 2.0))  # torch's products are as fast
    for got, times in ((strided, 1), (twice, 1), (many, 65)):
        assert_update(got, None, x.repeat(times, 1), a, b, 2.0, weight=half)
    # In bfloat16 each term may be rounded with the weight, after each of three sums, and when it is scaled.
    narrow = (tensor.bfloat16() for tensor in (x, a, b))
    assert_update(low, None, *narrow, 2.0, rounded=[torch.bfloat16] * 5, weight=half)


def test_an_update_that_c_does_not_take_goes_to_torch(monkeypatch):
    monkeypatch.setattr(reference, "add_low_rank", PLAIN_UPDATE)
    base, x, a, b = torch.randn(3, 5), torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)
    assert_update(kernels.add_low_rank(base.t().contiguous().t(), x, a, b, 0.5), base, x, a, b, 0.5)
    many = kernels.add_low_rank(base.repeat(50, 1), x.repeat(50, 1), a, b, 0.5)
    assert_update(many, base.repeat(50, 1), x.repeat(50, 1), a, b, 0.5)
    narrow = kernels.add_low_rank(base.half(), x, a, b, 0.5)
    assert narrow.dtype == torch.float16
    # The update is rounded, and its sum with the base.
    assert_update(narrow, base.half(), x, a, b, 0.5, rounded=[torch.float16] * 2)
    with pytest.raises(RuntimeError):
        kernels.add_low_rank(base, x[:, :3], a, b, 0.5)
