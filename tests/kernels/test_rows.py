"""Rows that the compiled kernel quantizes and dequantizes."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels, quantize
from lowmem.quant.backend import backend_for
from lowmem.quant.formats import FORMATS, get_format
from lowmem.quant.packing import pack
from tests import strategies
from tests.compiled import (
    assert_exact,
    assert_same_bytes,
    bound,
    compiled,
    compiled_bfloat16,
    needs_kernel,
    no_plain_rows,
    on_threads,
)
from tests.selection import covering

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

low_dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@compiled
@given(
    strategies.weights(min_dims=1, max_dims=3, max_columns=500),
    strategies.four_bit_formats,
    strategies.block_sizes,
    strategies.encodings,
    st.booleans(),
    strategies.importance_kinds,
    low_dtypes,
    strategies.seeds,
)
def test_quantizing_gives_the_bytes_of_plain_torch_and_dequantizing_its_bits(
    isa, weight, form, size, scales, search, kind, dtype, seed
):
    options = {
        "block_size": size,
        "scales": scales,
        "search": search,
        "importance": strategies.make_importance(kind, weight.shape[-1], seed),
    }
    with kernels.temporary_cpu_backend("reference"):
        expected = quantize(weight, form, **options)
        values = expected.dequantize(), expected.dequantize(dtype)
    with kernels.temporary_cpu_backend(isa), no_plain_rows():
        got = quantize(weight, form, **options)
        assert_same_bytes(got, expected)
        assert torch.equal(got.dequantize(), values[0])
        assert torch.equal(got.dequantize(dtype), values[1])


@needs_kernel
@covering(form=["nf4", "bof4s", "int4", "int8", "q8_0"], dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_every_isa_and_any_number_of_threads_sum_the_same_error(form, dtype):
    """In rows that end within a block, or within a vector, and are converted where they lie or in chunks."""
    for columns in (1, 15, 33, 200):
        weight = strategies.make_weight("normal", (70, columns), 0, columns).to(dtype)
        for values in (weight, weight.t().contiguous().t()):
            with kernels.temporary_cpu_backend("reference"):
                expected = quantize(values, form, block_size=24)
                dense = expected.dequantize()
                pair = backend_for("cpu").squares(values, dense)
            found, compared = set(), set()
            for isa in compiled.args[1]:
                for threads in (1, 2, 5):
                    with kernels.temporary_cpu_backend(isa), no_plain_rows(), on_threads(threads):
                        q = quantize(values, form, block_size=24)
                        assert_same_bytes(q, expected)
                        found.add(q.squares)
                        compared.add(backend_for("cpu").squares(weight, dense))
            assert len(found) == len(compared) == 1
            for one, other in ((found.pop(), expected.squares), (compared.pop(), pair)):
                # The same squares, which float64 holds exactly, in another order: off by 14,000 roundings at most.
                assert one == pytest.approx(other, rel=14000 * 2**-53, abs=0)


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
            with kernels.temporary_cpu_backend("reference"):
                cases.append((fits, options, quantize(fits, form, **options)))
    return cases


@needs_kernel
@covering(
    exponent=[-149, -140, -126, -75, 0, 15, 62, 65, 127],
    form=["nf4", "int4", "fp4", "bof4s"],
    importance=["none", "some zeros", "mixed"],
)
def test_a_search_at_the_ends_of_float32_finds_the_bytes_of_plain_torch(form, importance, exponent):
    for weight, options, expected in searched_by_plain_torch(form, importance, exponent):
        for isa in compiled.args[1]:  # plain torch takes longest
            with kernels.temporary_cpu_backend(isa), no_plain_rows():
                assert_same_bytes(quantize(weight, form, **options), expected)


@compiled
@covering(block_size=[8, 10, 64, 256])
def test_every_stored_scale_of_both_signs_is_read_as_plain_torch_reads_it(isa, block_size):
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
        with kernels.temporary_cpu_backend("reference"):
            dense = signed.dequantize()
        assert (dense < 0).any()
        with kernels.temporary_cpu_backend(isa), no_plain_rows():
            assert torch.equal(signed.dequantize(), dense)
            for batch in (1, 3):
                assert_exact(kernels.linear(x[:batch], signed, torch.float32), x[:batch], dense)
                assert_exact(kernels.input_grad(grad[:batch], signed, torch.float32), grad[:batch], dense.t())


@compiled
@covering(form=["nf4", "bof4s"])
def test_every_double_scale_is_found_again(isa, form):
    """Blocks whose largest weight is at the upper end level, with every count of steps that a byte holds."""
    most = 127 if form == "bof4s" else 255
    codes = torch.randint(0, 16, (4, most * 8), dtype=torch.uint8)
    codes[:, ::8] = 15
    counts = torch.arange(1, most + 1).to(torch.uint8).expand(4, -1)
    row_scales = torch.tensor([[0.37], [1.0], [3e-3], [65504.0]], dtype=torch.float16).view(torch.uint8)
    q = quantize(torch.ones(4, most * 8), form, block_size=8, scales="double", search=False)
    q = replace(q, packed=pack(codes, 8), scales=torch.cat([counts, row_scales], dim=-1).contiguous())
    dense = q.dequantize()
    with kernels.temporary_cpu_backend(isa), no_plain_rows():
        assert_same_bytes(quantize(dense, form, block_size=8, scales="double", search=False), q)


@compiled
@covering(dtype=[torch.float16, torch.bfloat16])
def test_restored_values_are_rounded_as_torch_rounds(isa, dtype):
    """Magnitudes around every rounding: subnormal, halfway, and beyond what the dtype holds."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.rand(64, 300, generator=generator) * 160 - 140)
    q = quantize(torch.randn(64, 300 * 8, generator=generator), "fp4", block_size=8, scales="float32")
    q = replace(q, scales=scales)
    broken = replace(q, scales=torch.full_like(scales, torch.nan))
    with kernels.temporary_cpu_backend("reference"):
        expected, nans = q.dequantize().to(dtype), broken.dequantize().isnan()
    with kernels.temporary_cpu_backend(isa), no_plain_rows():
        assert torch.equal(q.dequantize(dtype), expected)
        assert torch.equal(broken.dequantize(dtype).isnan(), nans)


@bound
@covering(value=[torch.nan, torch.inf, 1e30])
def test_weights_that_cannot_be_held_raise_what_plain_torch_raises(isa, value):
    weight = torch.ones(300, 64)
    weight[299, 63] = value
    messages = []
    for name in ("reference", isa):
        with kernels.temporary_cpu_backend(name), pytest.raises(ValueError, match="weight holds") as error:
            quantize(weight, "nf4", scales="float16")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@bound
@covering(threads=[2, 3, 7])
def test_a_weight_that_cannot_be_held_is_refused_whichever_thread_reads_it(isa, threads):
    """A part of the rows each: who finds it may be the first to be done, or the last."""
    rows, columns = 64, 2048  # two chunks of rows, of 65536 weights each: a search is worth 7 threads, the rest 2
    weight = strategies.make_weight("normal", (rows, columns), 0, 0)
    with on_threads(threads), kernels.temporary_cpu_backend(isa):
        for form, options in (("nf4", {}), ("nf4", {"search": True, "scales": "float16"}), ("bof4s", {})):
            for row, value in zip(range(0, rows, 3), [torch.nan, torch.inf, -torch.nan, 1e30] * 6, strict=False):
                broken = weight.clone()
                broken[row, row] = value
                with pytest.raises(ValueError, match="weight holds (1 values that are NaN|the magnitude 1e)"):
                    quantize(broken, form, **{"scales": "double", **options})


@compiled
def test_a_search_near_the_largest_float16_tries_no_scale_beyond_it(isa):
    """Of a block that is best held with 17/16 of its largest weight as the scale, which float16 does not have."""
    levels, largest = torch.tensor(get_format("bof4s").levels), torch.finfo(torch.float16).max
    block = levels.where(levels < 1, levels[7]).repeat(4) * (largest * 17 / 16)
    block[0] = largest
    for scales, sign in product(("float16", "double"), (1.0, -1.0)):
        weight = torch.stack([block, block.flip(0), block / 2]) * sign
        best = quantize(weight, "bof4s", block_size=64, scales="float32", search=True)
        assert torch.equal(best.scales, torch.tensor([[17 / 16], [17 / 16], [17 / 32]]) * largest * sign)
        with kernels.temporary_cpu_backend("reference"):
            expected = quantize(weight, "bof4s", block_size=64, scales=scales, search=True)
        assert torch.equal(expected.dequantize().abs().amax(1)[:2], torch.full((2,), largest))
        with kernels.temporary_cpu_backend(isa), no_plain_rows():
            assert_same_bytes(quantize(weight, "bof4s", block_size=64, scales=scales, search=True), expected)


# NaNs whose rounding by an addition would carry into the sign, or leave an infinity.
NANS = [0x7FFF9000, 0x7FFFFFFF, 0x7F800001, 0x7F80FFFF, 0x7FC00000, -1, -0x7000]


@compiled_bfloat16
@covering(dtype=[torch.bfloat16, torch.float16])
def test_every_nan_is_one_when_it_is_rounded(isa, dtype):
    """Wherever C rounds: dequantized rows, products and gradients, in whole vectors and at their ends."""
    shapes = ((37, 300, 8), (21, 129, 10), (70, 130, 64), (33, 1, 8), (5, 8200, 64))
    for bits, (rows, columns, block_size) in product(NANS, shapes):
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        assert nan.isnan()
        q = quantize(strategies.make_weight("normal", (rows, columns), 0, 0), "nf4", block_size=block_size)
        q = replace(q, scale_encoding="float32", scales=torch.empty(rows, -(-columns // block_size)))
        q.scales.copy_(nan)
        finite = replace(q, scales=torch.ones_like(q.scales))
        half = finite.dequantize(dtype)
        bias = nan.expand(rows).contiguous()
        with kernels.temporary_cpu_backend(isa), no_plain_rows():
            assert q.dequantize(dtype).isnan().all()
            for batch in (1, 3, 6, 13, 32):
                x, grad = torch.ones(batch, columns, dtype=dtype), torch.ones(batch, rows, dtype=dtype)
                made = [kernels.linear(x, q, dtype), kernels.input_grad(grad, q, dtype)]
                made += [kernels.linear(x, w, dtype, bias) for w in (finite, half)]
                assert all(out.dtype == dtype and out.isnan().all() for out in made), f"{bits & 0xFFFFFFFF:08x}"


@compiled
@covering(dtype=[torch.bfloat16, torch.float16])
def test_a_number_halfway_between_two_is_rounded_to_the_even_one(isa, dtype):
    """Weights at the end level, so that each is its scale: odd multiples of half a unit in the last place."""
    bits = 8 if dtype == torch.bfloat16 else 11
    scales = (1 + torch.arange(1, 65, 2) * 2.0**-bits)[:, None]
    q = quantize(torch.ones(32, 53), "fp4", block_size=32, scales="float32")  # a whole block, and a part of one
    q = replace(q, scales=scales.repeat(1, 2))
    with kernels.temporary_cpu_backend(isa), no_plain_rows():
        assert torch.equal(q.dequantize(dtype), scales.expand(32, 53).to(dtype))


@compiled
@given(
    st.integers(1, 5),
    st.integers(1, 400),
    strategies.short_blocks,
    strategies.encodings,
    st.integers(0, 50),
    st.integers(1, 50),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strategies.seeds,
)
def test_columns_from_a_block_on_are_the_same(isa, rows, columns, size, scales, first, count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(rows, columns, generator=generator), "nf4", block_size=size, scales=scales)
    blocks = -(-columns // size)
    start = first % blocks * size
    end = min(start + count * size, columns)
    with kernels.temporary_cpu_backend(isa):
        whole, kernel = q.dequantize(dtype), backend_for()
        part = torch.empty(rows, end - start, dtype=dtype)
        assert kernel._try_dequantize_into(kernel._cached_native_weight_or_none(q), 0, start, part) is part
    assert torch.equal(part, whole[:, start:end])


@bound
def test_no_columns_that_begin_or_end_within_a_block_or_beyond_the_row(isa):
    q = quantize(torch.randn(2, 40), "nf4", block_size=16)
    columns = [(3, 16), (8, 8), (8, 16), (0, 17), (16, 8), (-16, 16), (48, 16), (32, 9), (64, 0)]
    with kernels.temporary_cpu_backend(isa):
        kernel = backend_for()
        for column, count in columns:
            assert (
                kernel._try_dequantize_into(kernel._cached_native_weight_or_none(q), 0, column, torch.empty(2, count))
                is None
            )
        assert (
            kernel._try_dequantize_into(kernel._cached_native_weight_or_none(q), 0, 32, torch.empty(2, 8)) is not None
        )  # the end of the rows


@compiled
@covering(form=sorted(FORMATS))
def test_what_lies_beyond_a_short_block_counts_in_no_error(isa, form):
    """A format without a zero would have an error there, and the search would choose other scales."""
    weight = strategies.make_weight("normal", (60, 21), 0, 0)
    with kernels.temporary_cpu_backend("reference"):
        expected = quantize(weight, form, block_size=16, search=True)
    with kernels.temporary_cpu_backend(isa), no_plain_rows():
        assert_same_bytes(quantize(weight, form, block_size=16, search=True), expected)
