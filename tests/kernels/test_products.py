"""Products of the compiled kernel: every dtype, the edges of tiles, parts and pieces, long sums, hard numbers."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels, measure, quantize
from lowmem.kernels import cpu
from lowmem.quant.formats import EIGHT_BIT
from tests import strategies
from tests.compiled import (
    EDGES,
    ISAS,
    assert_close_in,
    assert_exact,
    at,
    by_torch,
    compiled,
    compiled_bfloat16,
    given_stored,
    spread_inputs,
    stored,
)
from tests.selection import covering

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

batches = st.sampled_from([*EDGES, 50, 62, 64, 96])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KINDS = ["int4", "nf4", "half", "bfloat16"]


def assert_product(got, dtype, x, dense, bias=None, by_torch=False):
    if dtype == torch.float32:
        assert_exact(got, x, dense, bias, by_torch)
    elif bias is None:
        assert_close_in(dtype, got, x, dense)
    else:  # a bias is one more column
        ones = torch.ones(len(x), 1, dtype=dtype)
        assert_close_in(dtype, got, torch.cat((x, ones), 1), torch.cat((dense.float(), bias[:, None]), 1))


def check_products(isa, w, dense, batch, dtype, with_bias, seed):
    """Hold both products of a weight to those of what it stands for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = dense.shape
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    grad = torch.randn(batch, rows, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator) if with_bias else None
    with kernels.temporary_cpu_backend(isa):
        of_torch = [by_torch(w, batch, dtype, product) for product in ("linear", "input_grad")]
        assert_product(kernels.linear(x, w, dtype, bias), dtype, x, dense, bias, of_torch[0])
        assert_product(kernels.input_grad(grad, w, dtype), dtype, grad, dense.t(), None, of_torch[1])


@compiled_bfloat16
@given(
    given_stored[0],
    st.one_of(strategies.formats, st.sampled_from(["half", "bfloat16"])),
    *given_stored[2:],
    batches,
    dtypes,
    st.booleans(),
    strategies.seeds,
)
def test_products_lose_no_more_than_their_roundings(isa, weight, kind, size, scales, batch, dtype, biased, seed):
    w, dense = stored(kind, weight.contiguous(), block_size=size, scales=scales)
    check_products(isa, w, dense, batch, dtype, biased, seed)


@compiled_bfloat16
@covering(dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_of_every_dtype_is_added_before_the_result_is_rounded(isa, dtype):
    q, unit = quantize(strategies.make_weight("normal", (21, 70), 0, 0)), torch.finfo(dtype).eps
    for batch in (1, 3, 40):
        x = torch.randn(batch, 70).to(dtype)
        magnitudes = x.float().abs() @ q.dequantize().abs().t()
        for bias_dtype in (torch.float32, torch.bfloat16, torch.float16):
            bias = torch.randn(21).to(bias_dtype)
            with kernels.temporary_cpu_backend(isa):
                got, without = kernels.linear(x, q, dtype, bias), kernels.linear(x, q, torch.float32)
            off = (got.float() - (without + bias.float())).abs()
            assert (off <= 3 * unit * (magnitudes + bias.abs())).all()


@compiled_bfloat16
@covering(1, block_size=[8, 16, 24, 32, 64, 72, 128, 256, 512, 4096], columns=[127, 640, 1025, 2300])
def test_every_number_of_a_few_inputs(isa, block_size, columns):
    scales = {8: "float16", 16: "double", 24: "float32"}.get(block_size, "double")
    form = "nf4" if block_size % 16 else "bof4s"  # which has signed scales
    q = quantize(strategies.make_weight("normal", (131, columns), 0, 1), form, block_size=block_size, scales=scales)
    dense = q.dequantize()
    with kernels.temporary_cpu_backend(isa):
        for dtype, batches in ((torch.bfloat16, [*range(1, 10), 11, 16, 17]), (torch.float32, [2, 7, 10, 16, 17])):
            for batch in batches:
                x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 131).to(dtype)
                assert_close_in(dtype, kernels.linear(x, q, dtype), x, dense)
                assert_close_in(dtype, kernels.input_grad(grad, q, dtype), grad, dense.t())


@compiled_bfloat16
@covering(1, block_size=[16, 32, 64, 128], batch=[1, 5, 19, 40])
def test_small_bfloat16_numbers_are_exact_beside_large_ones_that_cancel(isa, block_size, batch):
    """Levels are multiples of 1/8. Of four columns of one weight, two hold x and -x, the third up to 3."""
    levels = torch.randint(-7, 8, (9, 75)) / 8.0
    levels[:, :: block_size // 4] = -1.0  # the largest of each block
    dense = levels.repeat_interleave(4, 1)
    q = quantize(dense, "q4_0", block_size=block_size)
    assert torch.equal(q.dequantize(), dense)
    large, small = 64.0 * torch.randint(128, 256, (batch, 75)), torch.randint(-3, 4, (batch, 75)).float()
    x = torch.stack((large, -large, small, 0 * small), 2).flatten(1)
    with kernels.temporary_cpu_backend(isa):
        got = kernels.linear(x.bfloat16(), q, torch.bfloat16)
    assert torch.equal(got, (x.double() @ dense.double().t()).bfloat16())


@compiled_bfloat16
@covering(1, columns=[5, 127, 640], stored_as=[torch.float16, torch.bfloat16])
def test_every_number_of_a_few_inputs_with_16_bit_weights(isa, stored_as, columns):
    w = strategies.make_weight("normal", (77, columns), 0, 1).to(stored_as)
    with kernels.temporary_cpu_backend(isa):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for batch in range(1, 11):
                x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 77).to(dtype)
                assert_close_in(dtype, kernels.linear(x, w, dtype), x, w)
                assert_close_in(dtype, kernels.input_grad(grad, w, dtype), grad, w.t())


@compiled_bfloat16
@covering(
    1,
    block_size=[8, 10, 16, 24, 32, 48, 64, 72, 100, 128, 512, 4096, "half", "bfloat16"],
    shape=[(1, 1), (17, 127), (33, 129), (31, 65), (64, 192), (130, 1300), (258, 129), (1058, 130), (9, 9000)],
)
def test_batches_and_weights_around_whole_tiles_parts_and_pieces(isa, block_size, shape):
    """Rows are taken 16 or 32 at a time, columns 32, 128 or 256, 8192 are packed together, and 256 inputs a piece."""
    rows, columns = shape
    dense = strategies.make_weight("normal", shape, 0, 2)
    if isinstance(block_size, str):
        w, numbers = stored(block_size, dense)
    else:
        w, numbers = stored("int4" if rows % 2 else "nf4", dense, block_size=block_size)
    generator = torch.Generator().manual_seed(rows)
    bias = torch.randn(rows, generator=generator)
    with kernels.temporary_cpu_backend(isa):
        for batch in (*EDGES, 97, 130, *([257] if columns < 1000 else [])):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(batch, columns, generator=generator).to(dtype)
                grad = torch.randn(batch, rows, generator=generator).to(dtype)
                assert_product(kernels.linear(x, w, dtype, bias), dtype, x, numbers, bias)
                assert_product(kernels.input_grad(grad, w, dtype), dtype, grad, numbers.t())


@compiled_bfloat16
def test_a_result_that_is_subnormal_is_one_in_every_row(isa):
    q, bias = quantize(torch.randn(45, 64)), torch.full((45,), 1e-39)
    with kernels.temporary_cpu_backend(isa):
        for batch in (1, 3, 20):
            got = kernels.linear(torch.zeros(batch, 64).bfloat16(), q, torch.bfloat16, bias)
            assert (got == bias.bfloat16()).all()


@compiled_bfloat16
@covering(columns=[4098, 8192, 8194, 20000], dtype=[torch.float32, torch.bfloat16], kind=["half", "int4"])
def test_wide_rows_are_packed_in_parts(isa, columns, dtype, kind):
    dense = strategies.make_weight("normal", (9, columns), 0, 0)
    w, dequantized = stored(kind, dense, block_size=96)
    bias = torch.randn(9)
    for batch in (1, 5, 30):
        x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 9).to(dtype)
        with kernels.temporary_cpu_backend(isa):
            got, back = kernels.linear(x, w, dtype, bias), kernels.input_grad(grad, w, dtype)
            peak = measure.peak_bytes(lambda x=x: kernels.linear(x, w, dtype, bias))
        assert peak <= 2**20 + got.nbytes + x.numel() * 4
        assert_product(got, dtype, x, dequantized, bias)
        assert_product(back, dtype, grad, dequantized.t())


@compiled_bfloat16
@covering(1, dtype=[torch.bfloat16, torch.float16], kind=["half", "int4"])
def test_sums_of_wide_rows_are_rounded_once(isa, dtype, kind):
    """Some inputs at a time: at most 128."""
    w, dequantized = stored(kind, strategies.make_weight("normal", (600, 8200), 0, 0))
    bias = torch.randn(600)
    for batch in (7, 130):
        x = torch.randn(batch, 8200).to(dtype)
        with kernels.temporary_cpu_backend(isa):
            got, added = kernels.linear(x, w, dtype), kernels.linear(x, w, dtype, bias)
            assert_close_in(dtype, got, x, dequantized)
        unit = torch.finfo(dtype).eps / 2
        assert ((added.float() - got.float() - bias).abs() <= unit * (added.abs() + got.abs() + 1e-3)).all()


@compiled_bfloat16
@covering(columns=[40, 1024])
def test_batches_of_several_pieces(isa, columns):
    q = quantize(strategies.make_weight("normal", (10, columns), 0, 0))
    half = strategies.make_weight("normal", (10, columns), 0, 0).half()
    for batch in (161, 330, 513, 1100):
        x, grad = torch.randn(batch, columns), torch.randn(batch, 10)
        with kernels.temporary_cpu_backend(isa):
            for w, dense in ((q, q.dequantize()), (half, half)):
                assert_exact(kernels.linear(x, w, torch.float32), x, dense)
                assert_exact(kernels.input_grad(grad, w, torch.float32), grad, dense.t())
            low = grad.bfloat16()
            assert_close_in(torch.bfloat16, kernels.input_grad(low, q, torch.bfloat16), low, q.dequantize().t())


def longest_chain(kind: str, batch: int) -> int:
    """The most products of a float32 sum that are added one after the other before what they make is added apart."""
    if batch <= 12:
        return 32 if kind in ("half", "bfloat16") and batch <= 8 else 16
    return 64


def longest_chain_of_gradient(batch: int) -> int:
    """The same of a sum over rows."""
    return 16 if batch <= 16 else 32


LARGE = 2.0**25
"""Float32 counts by fours from here on: a one that is added to it vanishes, a sum of four ones counts."""


def assert_lost_ones(got: torch.Tensor, terms: int, chain: int) -> None:
    """Of a large number and ones, those in its chain may be lost, and 4 by rounding what was there before it came."""
    assert ((got.double() - (LARGE + terms - 1)).abs() <= chain + 4).all()


@compiled
@covering(case=[("half", None), ("bfloat16", None), ("int4", 16), ("nf4", 64), ("int4", 96), ("nf4", 256)])
def test_chains_of_products_are_short(isa, case):
    """What is added to a large number, one by one, may all be rounded off."""
    kind, block_size = case
    for columns in (768, 3840):  # whole blocks, so that no chain is short
        w, _ = stored(kind, torch.ones(40, columns), block_size=block_size, scales="float16")
        for batch in (1, 3, 4, 5, 8, 9, 12, 13, 24, 40, 100):
            x = torch.ones(batch, columns)
            x[torch.arange(batch), (torch.arange(batch) * 37 + 5 * batch) % columns] = LARGE
            with kernels.temporary_cpu_backend(isa):
                got = kernels.linear(x, w, torch.float32)
            assert_lost_ones(got, columns, longest_chain(kind, batch))


@compiled
@covering(kind=KINDS)
def test_chains_of_a_gradient_are_short(isa, kind):
    for rows in (1024, 4096):
        w, _ = stored(kind, torch.ones(rows, 256), scales="float16")
        for batch in (1, 2, 3, 5, 16, 17, 40, 130):
            grad = torch.ones(batch, rows)
            grad[torch.arange(batch), (torch.arange(batch) * 37 + 5 * batch) % rows] = LARGE
            with kernels.temporary_cpu_backend(isa):
                got = kernels.input_grad(grad, w, torch.float32)
            assert_lost_ones(got, rows, longest_chain_of_gradient(batch))


# Inputs and weights that are hard to multiply: of magnitudes that lie apart, at the ends of float32, not finite.


@compiled_bfloat16
@given(
    st.sampled_from([*KINDS, "fp4"]),
    batches,
    st.one_of(st.integers(1, 700), st.sampled_from([128, 256, 640, 1024])),  # columns: whole groups of them or not
    st.sampled_from([8, 16, 24, 32, 64, 128, 256, 1024]),
    st.sampled_from(["float32", "float16", "double"]),
    st.integers(0, 38),  # the decades over which the columns of an input lie
    st.sampled_from([torch.float32, torch.bfloat16]),
    strategies.seeds,
)
def test_magnitudes_of_inputs_columns_and_rows_that_lie_apart(
    isa, kind, batch, columns, size, scales, decades, dtype, seed
):
    generator, few = torch.Generator().manual_seed(seed), dtype == torch.bfloat16
    sizes = 10 ** (-(0 if few else 3) * torch.rand(columns, 1, generator=generator))
    wide, numbers = stored(kind, torch.randn(9, columns, generator=generator), block_size=size, scales=scales)
    tall, turned = stored(kind, torch.randn(columns, 9, generator=generator) * sizes, block_size=size, scales=scales)
    x = spread_inputs(torch.linspace(-3.0, 0 if few else 12, batch), columns, decades, generator).to(dtype)
    with kernels.temporary_cpu_backend(isa):
        assert_product(kernels.linear(x, wide, dtype), dtype, x, numbers)
        assert_product(kernels.input_grad(x, tall, dtype), dtype, x, turned.t())


@compiled_bfloat16
@covering(kind=[*KINDS, "fp4"])
def test_inputs_and_weights_of_every_magnitude(isa, kind):
    """All of them, one of them, and a single number of one; an input of zeros, and zeros beside others."""
    dense = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    w, numbers = stored(kind, dense * 0.01)
    for exponent in (-149, -126, -100, -61, -60, -59, 0, 59, 60, 61, 100, 120):
        every = torch.linspace(-1, 1, 120 * 300).reshape(120, 300) * 2.0**exponent
        every[:, :128] = 0
        one, single = torch.randn(2, 120, 300)
        one[0], single[0, 5] = every[0], 2.0**exponent
        one[1] = 0
        for x, batch, dtype in product((every, one, single), (1, 3, 120), (torch.float32, torch.bfloat16)):
            few = x[:batch].to(dtype)
            grad = few[:, :70].contiguous()
            with kernels.temporary_cpu_backend(isa):
                assert_product(kernels.linear(few, w, dtype), dtype, few, numbers)
                assert_product(kernels.input_grad(grad, w, dtype), dtype, grad, numbers.t())
    options = {} if kind == "bfloat16" else {"block_size": 16, "scales": "float32"}
    for exponent, batch in product((-120, -41, 61, 110) if kind != "half" else (), (1, 4, 100)):
        large, numbers = stored(kind, dense * 2.0**exponent, **options)
        x, grad = torch.randn(batch, 300), torch.randn(batch, 70)
        with kernels.temporary_cpu_backend(isa):
            assert_exact(kernels.linear(x, large, torch.float32), x, numbers)
            assert_exact(kernels.input_grad(grad, large, torch.float32), grad, numbers.t())


@at(["portable", "avx2"])
@covering(kind=["int4", "nf4", "int8"], size=[32, 64])
def test_subnormal_bfloat16_inputs_lose_no_more_than_docs_kernels_says(isa, kind, size):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(40, 300, generator=generator)
    for scale, exponent, batch in product((1.0, 6e4, 1e20), (-133, -130, -127, -122, -119), (1, 5, 30)):
        w = quantize(dense * scale, kind, block_size=size, scales="float32")
        x = (torch.randn(batch, 300, generator=generator) * 2.0**exponent).bfloat16()
        with kernels.temporary_cpu_backend(isa):
            if by_torch(w, batch, torch.bfloat16):
                continue
            got = kernels.linear(x, w, torch.bfloat16).double()
        numbers = w.dequantize().double()
        expected = x.double() @ numbers.t()
        norms = x.double().norm(dim=1, keepdim=True) * numbers.norm(dim=1)
        zeros = 2.0**-126 * numbers.abs().sum(1) if isa in ("avx512bf16", "avx512amx") else 0.0  # vdpbf16ps and AMX
        assert ((got - expected).abs() <= 3e-5 * norms + 2.0**-8 * expected.abs() + 2.0**-134 + zeros).all()


def assert_as_in_float64(got, dtype, x, dense, of_weight=False) -> None:
    """What is not finite is so in the same places and of the same sign; what is finite is exact.

    An infinite scale is that of numbers of both signs, whose sum may be taken before: it may give a NaN, too.
    """
    expected = x.double() @ dense.double().t()
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert of_weight or torch.equal(got.isnan(), expected.isnan())
    assert ((got == expected) | got.isnan())[expected.isinf()].all()
    rows, columns = x.isfinite().all(1), dense.isfinite().all(1)
    assert_product(got[rows][:, columns], dtype, x[rows], dense[columns])


@pytest.mark.thorough(keep=1)
@compiled_bfloat16
@covering(kind=KINDS)
def test_what_is_not_finite_shows_as_in_float32(isa, kind):
    """A number of an input, of a gradient, or of the weight, each of which may be infinite or no number."""
    coded = kind not in ("half", "bfloat16")
    options = {"block_size": 16 if kind == "int4" else 64, "scales": "float32"} if coded else {}
    w, numbers = stored(kind, strategies.make_weight("normal", (70, 330), 0, 0) + 3, **options)  # none is zero
    for value, column, batch in product((torch.inf, -torch.inf, torch.nan), (0, 45, 69), (2, 5, 21, 520)):
        broken = replace(w, scales=w.scales.clone()) if coded else w.clone()
        (broken.scales if coded else broken)[column, 2] = value
        of_broken = broken.dequantize() if coded else broken.float()
        for dtype in (torch.float32, torch.bfloat16):
            x, grad = torch.randn(batch, 330).to(dtype), torch.randn(batch, 70).to(dtype)
            broken_x, broken_grad = x.clone(), grad.clone()
            broken_x[-1, 4 * column], broken_grad[-1, column] = value, value
            with kernels.temporary_cpu_backend(isa):
                for few in (x, broken_x, broken_x[-1:]):
                    assert_as_in_float64(kernels.linear(few, w, dtype), dtype, few, numbers)
                for few in (grad, broken_grad, broken_grad[-1:]):
                    assert_as_in_float64(kernels.input_grad(few, w, dtype), dtype, few, numbers.t())
                assert_as_in_float64(kernels.linear(x, broken, dtype), dtype, x, of_broken, True)
                assert_as_in_float64(kernels.input_grad(grad, broken, dtype), dtype, grad, of_broken.t(), True)
                assert_product(kernels.linear(x, w, dtype), dtype, x, numbers)  # and is not remembered


# What else is computed at the same time changes no bit.


@compiled_bfloat16
@covering(kind=["half", "int4", "nf4"])
def test_an_input_s_result_is_its_own(isa, kind):
    """Whatever its place in a tile, and whatever lies beside it."""
    w, _ = stored(kind, torch.randn(45, 330))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(48, 330).to(dtype)
        with kernels.temporary_cpu_backend(isa):
            whole = kernels.linear(x, w, dtype)
            order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
            assert torch.equal(kernels.linear(x[order], w, dtype), whole[order])
        x[::2] = torch.nan
        with kernels.temporary_cpu_backend(isa):
            got = kernels.linear(x, w, dtype)
        assert torch.equal(got[1::2], whole[1::2])
        assert got[::2].isnan().all()


@pytest.mark.parametrize("isa", [isa for isa in ("avx512vnni", "avx512bf16", "avx512amx") if isa in ISAS])
def test_an_isa_without_a_source_of_its_own_gives_the_bits_of_another(isa):
    """Which is why tests do not run there again; see ``tests.compiled.compiled``."""
    dense = strategies.make_weight("normal", (70, 330), 0, 0)
    made, of_integers = [], quantize(dense, "nf4")
    for name in (isa, "avx512vnni"):
        with kernels.temporary_cpu_backend(name):
            inputs = [torch.randn(n, 330, generator=torch.Generator().manual_seed(n)) for n in EDGES]
            made.append([kernels.linear(x, of_integers, torch.int8) for x in inputs])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    made.clear()
    for name in (isa, "avx512"):
        with kernels.temporary_cpu_backend(name):
            q = quantize(dense, "nf4", search=True)
            found = [q.packed, q.scales.view(torch.uint8), q.dequantize(), q.dequantize(torch.bfloat16)]
            weights = q, quantize(dense, "int4", block_size=16), dense.half()
            for w, dtype, batch in product(weights, (torch.float32, torch.float16), EDGES):
                generator = torch.Generator().manual_seed(batch)
                x, grad = (torch.randn(batch, n, generator=generator).to(dtype) for n in (330, 70))
                found += [kernels.linear(x, w, dtype), kernels.input_grad(grad, w, dtype)]
        made.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@compiled_bfloat16
def test_chunks_that_torch_multiplies_are_all_of_the_weight(isa, monkeypatch):
    """Several chunks of rows, and of columns in the gradient, of which the last is smaller."""
    monkeypatch.setattr(cpu, "_TORCH_CHUNK", 64)
    w = quantize(strategies.make_weight("normal", (150, 200), 0, 0), "nf4", block_size=64)
    bias, dense = torch.randn(150), w.dequantize()
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = torch.randn(600, 200).to(dtype), torch.randn(600, 150).to(dtype)
        with kernels.temporary_cpu_backend(isa):
            got = kernels.linear(x, w, dtype, bias.to(dtype))
            back = kernels.input_grad(grad, w, dtype)
        assert_product(got, dtype, x, dense, bias.to(dtype).float())
        assert_product(back, dtype, grad, dense.t())


@compiled_bfloat16
@covering(kind=KINDS, least=[9, 16, 192, 256, 512])  # rows from which torch multiplies at some ISA
def test_batches_where_torch_takes_over(isa, kind, least):
    dtype = torch.float32 if least == 256 else torch.bfloat16
    w, dense = stored(kind, strategies.make_weight("normal", (70, 90), 0, 0))
    for batch in (least - 1, least, least + 1):
        x, grad = torch.randn(batch, 90).to(dtype), torch.randn(batch, 70).to(dtype)
        with kernels.temporary_cpu_backend(isa):
            assert_product(kernels.linear(x, w, dtype), dtype, x, dense)
            assert_product(kernels.input_grad(grad, w, dtype), dtype, grad, dense.t())


@compiled
@covering(name=list(EIGHT_BIT))
def test_products_with_8_bit_weights_lose_no_more_than_their_roundings(isa, name):
    """The scale of a block is multiplied with the sum of its products, and with 1/127 for int8."""
    generator = torch.Generator().manual_seed(2)
    for columns, block, batch in ((70, 64, 1), (300, 16, 3), (129, 24, 2), (256, 128, 20)):
        q = quantize(torch.randn(33, columns, generator=generator), name, block_size=block)
        check_products(isa, q, q.restore(slice(None)), batch, torch.float32, True, columns)


@compiled
@covering(name=list(EIGHT_BIT))
def test_every_8_bit_code_has_its_level(isa, name):
    """No quantizer of lowmem writes code 0; a file may hold it."""
    stored = quantize(torch.randn(8, 64), name, block_size=16, scales="float32")
    codes = torch.arange(512).view(8, 64) % 256
    stored.packed[:] = codes
    expected = (codes - 128) / (127 if name == "int8" else 1) * stored.scales.repeat_interleave(16, -1)
    with kernels.temporary_cpu_backend(isa):
        assert torch.equal(stored.dequantize(), expected)
        check_products(isa, stored, expected, 2, torch.float32, False, 64)
