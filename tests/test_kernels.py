"""The reference kernel against a plain product with the restored weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import QuantizedTensor, backend, kernels, measure, quantize
from tests import strategies

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def restored(weight, dtype):
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)


@st.composite
def stored_weights(draw):
    weight = draw(strategies.weights(min_dims=2, max_dims=2, max_columns=100))
    if draw(st.booleans()):
        return weight.to(draw(st.sampled_from([torch.float16, torch.bfloat16])))
    return quantize(weight, draw(strategies.formats), block_size=draw(strategies.small_blocks))


@given(stored_weights(), st.integers(0, 5), dtypes, strategies.seeds)
def test_both_products_equal_those_with_the_restored_weight(weight, batch, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = restored(weight, dtype)
    x = torch.randn(batch, dense.shape[1], generator=generator).to(dtype)
    grad = torch.randn(batch, dense.shape[0], generator=generator).to(dtype)
    for got, expected in (
        (kernels.linear(x, weight, dtype), x @ dense.t()),
        (kernels.input_grad(grad, weight, dtype), grad @ dense),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=1e-5 if dtype != torch.bfloat16 else 2e-2, atol=1e-30)


@pytest.mark.parametrize("columns", [64, 1000])
def test_many_chunks_are_written_whole_and_match(columns):
    weight = quantize(strategies.make_weight("normal", (1500, columns), 0, 0), block_size=16)
    x = torch.randn(3, columns, dtype=torch.float64)
    dense = weight.dequantize(torch.float64)
    torch.testing.assert_close(kernels.linear(x, weight, torch.float64), x @ dense.t())
    grad = torch.randn(3, 1500, dtype=torch.float64)
    torch.testing.assert_close(kernels.input_grad(grad, weight, torch.float64), grad @ dense)


@pytest.mark.parametrize("batch", [1, 512])
@pytest.mark.parametrize("kind", ["half", "4-bit"])
def test_no_product_takes_more_than_a_mebibyte_of_scratch(kind, batch):
    dense = strategies.make_weight("normal", (2048, 1024), 0, 0)
    weight = dense.half() if kind == "half" else quantize(dense)
    x, grad = torch.randn(batch, 1024), torch.randn(batch, 2048)
    for product, argument, out in ((kernels.linear, x, 2048), (kernels.input_grad, grad, 1024)):
        peak = measure.peak_bytes(lambda p=product, a=argument: p(a, weight, torch.float32))
        assert peak <= 2**20 + batch * out * 4


def test_thread_counts_give_the_same_result():
    weight = quantize(strategies.make_weight("normal", (300, 500), 0, 0))
    x = torch.randn(7, 500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = weight.dequantize(), kernels.linear(x, weight, torch.float32)
        torch.set_num_threads(2)
        assert torch.equal(weight.dequantize(), one[0])
        torch.testing.assert_close(kernels.linear(x, weight, torch.float32), one[1], atol=1e-4, rtol=0)
    finally:
        torch.set_num_threads(threads)


def test_backend_says_what_serves_and_why():
    assert backend().startswith("reference: plain torch")
