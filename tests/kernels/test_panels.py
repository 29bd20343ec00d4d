"""Batches that fill panels of inputs: what is packed, restored and turned comes out as for any other batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels, quantize
from tests import strategies
from tests.compiled import assert_close_in, assert_exact, compiled, given_stored, on_threads, stored

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
batches = st.sampled_from([15, 16, 31, 32, 47, 48, 49, 62, 64, 96])  # 16 to a panel; a few may be missing


def assert_product(got, dtype, x, dense, bias=None):
    if dtype == torch.float32:
        assert_exact(got, x, dense, bias)
    elif bias is None:
        assert_close_in(dtype, got, x, dense)
    else:  # a bias is one more column
        ones = torch.ones(len(x), 1, dtype=dtype)
        assert_close_in(dtype, got, torch.cat((x, ones), 1), torch.cat((dense.float(), bias[:, None]), 1))


@compiled
@given(*given_stored, batches, dtypes, strategies.seeds)
def test_products_with_codes(level, weight, form, size, scales, batch, dtype, seed):
    q = quantize(weight, form, block_size=size, scales=scales)
    x = torch.randn(batch, q.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    with kernels.using(level):
        assert_product(kernels.linear(x, q, dtype), dtype, x, q.dequantize())


@compiled
@given(
    strategies.weights(min_dims=2, max_dims=2, max_columns=500),
    st.sampled_from([torch.bfloat16, torch.float16]),
    batches,
    dtypes,
    strategies.seeds,
)
def test_products_with_16_bit_weights(level, weight, stored_as, batch, dtype, seed):
    w = weight.to(stored_as).contiguous()
    x = torch.randn(batch, w.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    with kernels.using(level):
        assert_product(kernels.linear(x, w, dtype), dtype, x, w)


@compiled
@pytest.mark.parametrize("block_size", [8, 10, 16, 24, 32, 48, 64, 100, 128, 512, 4096, None])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (16, 128), (17, 127), (33, 129), (70, 640), (130, 1300), (9, 9000)]
)
@pytest.mark.parametrize("batch", [32, 47, 500])
def test_around_whole_panels_tiles_and_parts(level, block_size, rows, columns, batch):
    """16 rows make a tile, 128 or 256 columns a part, 256 inputs a piece, 8192 columns what is packed at a time."""
    generator = torch.Generator().manual_seed(rows)
    dense = torch.randn(rows, columns, generator=generator)
    form = "int4" if rows % 2 else "nf4"
    w = quantize(dense, form, block_size=block_size) if block_size else dense.half()
    restored, bias = w.dequantize() if block_size else w, torch.randn(rows, generator=generator)
    x = torch.randn(batch, columns, generator=generator)
    with kernels.using(level):
        for dtype in (torch.float32, torch.bfloat16):
            assert_product(kernels.linear(x.to(dtype), w, dtype, bias), dtype, x.to(dtype), restored, bias)


@compiled
@pytest.mark.parametrize("kind", ["half", "int4", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_s_result_is_its_own(level, kind, dtype):
    """Whatever its place in a panel, and whatever lies beside it. (A NaN in float32: AMX leaves all to vectors.)"""
    w, _ = stored(kind, torch.randn(45, 330))
    x = torch.randn(48, 330).to(dtype)
    with kernels.using(level):
        whole = kernels.linear(x, w, dtype)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
        assert torch.equal(kernels.linear(x[order], w, dtype), whole[order])
    if level == "avx512amx" and dtype == torch.float32:
        with kernels.using("avx512bf16"):
            whole = kernels.linear(x, w, dtype)
    x[::2] = torch.nan
    with kernels.using(level):
        got = kernels.linear(x, w, dtype)
    assert torch.equal(got[1::2], whole[1::2])
    assert got[::2].isnan().all()


@compiled
@pytest.mark.parametrize(("columns", "dtype"), [(8192, torch.float32), (8192, torch.bfloat16), (4096, torch.float32)])
def test_many_threads_change_no_bit(level, columns, dtype):
    """They have less room for inputs."""
    q, x = quantize(torch.randn(64, columns), "int4"), torch.randn(32, columns).to(dtype)
    found = []
    with kernels.using(level):
        for count in (1, 13, 20, 64):
            with on_threads(count):
                found.append(kernels.linear(x, q, dtype))
    assert all(torch.equal(found[0], other) for other in found[1:])
