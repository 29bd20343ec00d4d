"""Rows that the compiled kernel quantizes and restores."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels, quantize
from tests import strategies
from tests.compiled import assert_exact, assert_same_bytes, compiled, no_plain_rows

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

low_dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@compiled
@given(
    strategies.weights(min_dims=1, max_dims=3, max_columns=500),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
    st.booleans(),
    strategies.importance_kinds,
    low_dtypes,
    strategies.seeds,
)
def test_quantizing_gives_the_bytes_of_plain_torch_and_restoring_its_bits(
    level, weight, form, size, scales, search, kind, dtype, seed
):
    options = {
        "block_size": size,
        "scales": scales,
        "search": search,
        "importance": strategies.make_importance(kind, weight.shape[-1], seed),
    }
    with kernels.using("reference"):
        expected = quantize(weight, form, **options)
        values = expected.dequantize(), expected.dequantize(dtype)
    with kernels.using(level), no_plain_rows():
        got = quantize(weight, form, **options)
        assert_same_bytes(got, expected)
        assert torch.equal(got.dequantize(), values[0])
        assert torch.equal(got.dequantize(dtype), values[1])


@lru_cache(maxsize=1)  # levels come one after the other
def searched_by_plain_torch(form, importance, exponent):
    """Weights whose squares vanish or overflow, candidates above the largest scale, zeros of both signs."""
    generator, cases = torch.Generator().manual_seed(0), []
    for size, columns in ((8, 83), (64, 200), (24, 40), (4096, 5000)):
        weight = (torch.rand(6, columns, generator=generator) * 2 - 1) * 2.0**exponent
        weight[0, ::2] = -0.0
        weight[1] = torch.where(torch.arange(columns) % 3 == 0, -0.0, 0.0)
        weight[2, : columns // 2] = -(2.0**exponent)
        weight[3, 1] = -torch.finfo(torch.float32).max
        weight[4] = torch.where(weight[4] > 0, 1.0, -1.0) * 2.0**exponent
        for scales in ("float32", "float16", "double"):
            fits = weight if scales == "float32" else weight.clamp(-65504, 65504)
            counts = strategies.make_importance(importance, columns, 1)
            options = {"block_size": size, "scales": scales, "search": True, "importance": counts}
            with kernels.using("reference"):
                cases.append((fits, options, quantize(fits, form, **options)))
    return cases


@compiled
@pytest.mark.parametrize("form", ["nf4", "int4", "fp4", "bof4s"])
@pytest.mark.parametrize("importance", ["none", "some zeros", "mixed"])
@pytest.mark.parametrize("exponent", [-149, -140, -126, -75, 0, 15, 62, 65, 127])
def test_a_search_at_the_ends_of_float32_finds_the_bytes_of_plain_torch(level, form, importance, exponent):
    for weight, options, expected in searched_by_plain_torch(form, importance, exponent):
        with kernels.using(level), no_plain_rows():
            assert_same_bytes(quantize(weight, form, **options), expected)


@compiled
@pytest.mark.parametrize("block_size", [8, 10, 64, 256])
def test_every_stored_scale_of_both_signs_is_read_as_plain_torch_reads_it(level, block_size):
    """All bytes of signed double scales, under row scales of every kind, and all float16 scales."""
    generator = torch.Generator().manual_seed(0)
    columns = 256 * block_size
    q = quantize(torch.randn(5, columns, generator=generator), "bof4s", block_size=block_size, search=False)
    row_scales = torch.tensor([[0.0], [2.0**-24], [0.37], [1.0], [65504.0]], dtype=torch.float16).view(torch.uint8)
    every = torch.arange(256).to(torch.uint8).expand(5, -1)
    double = replace(q, scales=torch.cat([every, row_scales], dim=-1).contiguous())
    bits = torch.arange(-(2**15), 2**15, 51)[:1280].to(torch.int16).view(torch.float16).view(5, 256)
    half = replace(q, scales=bits.nan_to_num(0, 0, 0), scale_encoding="float16")
    x, grad = torch.randn(3, columns), torch.randn(3, 5)
    for signed in (double, half):
        with kernels.using("reference"):
            dense = signed.dequantize()
        assert (dense < 0).any()
        with kernels.using(level), no_plain_rows():
            assert torch.equal(signed.dequantize(), dense)
            for batch in (1, 3):
                assert_exact(kernels.linear(x[:batch], signed, torch.float32), x[:batch], dense)
                assert_exact(kernels.input_grad(grad[:batch], signed, torch.float32), grad[:batch], dense.t())


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_restored_values_are_rounded_as_torch_rounds(level, dtype):
    """Magnitudes around every rounding: subnormal, halfway, and beyond what the dtype holds."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.rand(64, 300, generator=generator) * 160 - 140)
    q = quantize(torch.randn(64, 300 * 8, generator=generator), "fp4", block_size=8, scales="float32")
    q = replace(q, scales=scales)
    broken = replace(q, scales=torch.full_like(scales, torch.nan))
    with kernels.using("reference"):
        expected, nans = q.dequantize().to(dtype), broken.dequantize().isnan()
    with kernels.using(level), no_plain_rows():
        assert torch.equal(q.dequantize(dtype), expected)
        assert torch.equal(broken.dequantize(dtype).isnan(), nans)


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_weights_that_cannot_be_held_raise_what_plain_torch_raises(level, value):
    weight = torch.ones(300, 64)
    weight[299, 63] = value
    messages = []
    for name in ("reference", level):
        with kernels.using(name), pytest.raises(ValueError, match="weight holds") as error:
            quantize(weight, "nf4", scales="float16")
        messages.append(str(error.value))
    assert messages[0] == messages[1]
