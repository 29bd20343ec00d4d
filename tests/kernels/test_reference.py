"""Plain torch, the definition of the products: against the dequantized weight in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem import FourBit, convert, kernels, quantize
from lowmem.quant.tensor import float32_table
from tests import strategies
from tests.compiled import dequantized
from tests.rounding import assert_product

pytestmark = pytest.mark.usefixtures("poisoned")

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@st.composite
def stored_weights(draw):
    weight = draw(strategies.weights(min_dims=2, max_dims=2, max_columns=100))
    if draw(st.booleans()):
        return weight.to(draw(st.sampled_from([torch.float16, torch.bfloat16])))
    return quantize(weight, draw(strategies.formats), block_size=draw(strategies.small_blocks))


@given(stored_weights(), st.integers(0, 5), dtypes, strategies.seeds)
def test_both_products_equal_those_with_the_restored_weight(weight, batch, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = dequantized(weight, dtype)
    x = torch.randn(batch, dense.shape[1], generator=generator).to(dtype)
    grad = torch.randn(batch, dense.shape[0], generator=generator).to(dtype)
    with kernels.temporary_cpu_backend("reference"):
        products = kernels.linear(x, weight, dtype), kernels.input_grad(grad, weight, dtype)
    sums, rounded = (torch.float32, [dtype] * 2) if dtype == torch.bfloat16 else (dtype, ())  # a sum, and its chunks'
    for got, factor, weights in zip(products, (x, grad), (dense, dense.t()), strict=True):
        assert got.dtype == dtype
        assert_product(got, factor, weights, None, sums, rounded)


def test_half_precision_sums_over_chunks_of_rows_are_rounded_once():
    """Each of nine chunks adds about 180 ones, a number that bfloat16 holds; it does not hold all sums of them."""
    weight = (torch.rand(8000, 64) < 0.2).bfloat16()
    with kernels.temporary_cpu_backend("reference"):
        got = kernels.input_grad(torch.ones(1, 8000, dtype=torch.bfloat16), weight, torch.bfloat16)
    assert torch.equal(got, weight.double().sum(0, keepdim=True).bfloat16())


@pytest.mark.thorough
@pytest.mark.parametrize("columns", [64, 1000])
def test_many_chunks_are_written_whole_and_match_and_a_block_of_zeros_has_no_scale(columns):
    dense = strategies.make_weight("normal", (1500, columns), 0, 0)
    weight = quantize(dense, block_size=16)
    dense[1400, :17] = torch.tensor([-1e-2] * 16 + [1e4])  # in steps of 1e4 / 255 the first block is all but zero
    for form, step, level in (("nf4", 0, 0), ("fp4", 0, 0), ("bof4s", 0, 0), ("int4", 1, -1 / 15), ("int8", 0, 0)):
        with kernels.temporary_cpu_backend("reference"):
            stored = quantize(dense, form, block_size=16, scales="double")
            again = quantize(stored.dequantize(), form, block_size=16, scales="double")
        assert stored.scales[1400, 0] == step
        torch.testing.assert_close(stored.dequantize()[1400, :16], torch.full((16,), level * 1e4 / 255))
        assert again.scales[1400, 0] == step
    x = torch.randn(3, columns, dtype=torch.float64)
    dense = weight.dequantize(torch.float64)
    torch.testing.assert_close(kernels.linear(x, weight, torch.float64), x @ dense.t())
    grad = torch.randn(3, 1500, dtype=torch.float64)
    torch.testing.assert_close(kernels.input_grad(grad, weight, torch.float64), grad @ dense)


@pytest.mark.parametrize("low", [-6e4, 0.0])
def test_weights_with_offsets_use_all_levels_of_their_range_which_scales_must_hold(low):
    """Beside the magnitudes of the weights, that of the range above a block's offset: 16/15 of it is the scale."""
    weight = torch.linspace(low, 6e4, 16)[None]
    q = quantize(weight, "uint4", block_size=16, scales="float32_offsets")
    torch.testing.assert_close(q.dequantize(), weight, rtol=0, atol=0.1)
    if low == 0:
        torch.testing.assert_close(quantize(weight, "uint4", block_size=16).dequantize(), weight, rtol=0, atol=40)
        return
    says = "the magnitude 128000, above 65504, the most that scales='float16_offsets' can hold"
    with pytest.raises(ValueError, match=says):
        quantize(weight, "uint4", block_size=16)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name() in ("aten::mm", "aten::mm.out", "aten::addmm_")
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_nothing_waits_for_another_device_than_the_cpu_and_its_chunks_are_large(offsets, dtype):
    """On the meta device a value that is asked for is an error; so are sizes that depend on values."""
    technique = FourBit("nf4", 64, compute_dtype=dtype, offsets=offsets)
    layer = convert(torch.nn.Linear(256, 4096), technique).to("meta")
    table = convert(torch.nn.Embedding(1000, 64), FourBit("nf4", 64, embeddings="4bit")).to("meta")
    x = torch.randn(3, 256, device="meta", requires_grad=True)
    for _ in range(2):  # the second time with what the first one kept
        layer(x).sum().backward()
        assert table(torch.zeros(5, 7, dtype=torch.int64, device="meta")).shape == (5, 7, 64)
    with Products() as products:
        layer(x).sum().backward()
    assert products.count == 2  # a million weights are one chunk, forward and backward
    with torch.no_grad(), Products() as products:
        layer(x)
    assert products.count == 1 + (offsets and dtype is torch.int8)  # whose offsets are multiplied apart
    assert float32_table((0.0, 1.0), x.device) is float32_table((0.0, 1.0), x.device)
