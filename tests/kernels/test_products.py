"""Products of the compiled kernel beyond a few float32 inputs: other dtypes, tiles, pieces, long sums."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import kernels, measure, quantize
from tests import strategies
from tests.compiled import assert_close_in, assert_exact, compiled, given_stored, stored

pytestmark = pytest.mark.usefixtures("poisoned", "only_c")

batches = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 17, 33, 50])
low_dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@compiled
@given(
    *given_stored,
    batches,
    low_dtypes,
    strategies.seeds,
)
def test_products_in_16_bits_lose_no_more_than_their_roundings(level, weight, form, size, scales, batch, dtype, seed):
    q = quantize(weight, form, block_size=size, scales=scales)
    dense = q.dequantize()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, q.shape[1], generator=generator).to(dtype)
    grad = torch.randn(batch, q.shape[0], generator=generator).to(dtype)
    with kernels.using(level):
        assert_close_in(dtype, kernels.linear(x, q, dtype), x, dense)
        assert_close_in(dtype, kernels.input_grad(grad, q, dtype), grad, dense.t())


@compiled
@given(
    strategies.weights(min_dims=2, max_dims=2, max_columns=300),
    low_dtypes,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    batches,
    strategies.seeds,
)
def test_both_products_with_16bit_weights_in_every_dtype(level, weight, stored, dtype, batch, seed):
    w = weight.to(stored).contiguous()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, w.shape[1], generator=generator).to(dtype)
    grad = torch.randn(batch, w.shape[0], generator=generator).to(dtype)
    with kernels.using(level):
        products = kernels.linear(x, w, dtype), kernels.input_grad(grad, w, dtype)
    for got, left, right in zip(products, (x, grad), (w, w.t()), strict=True):
        if dtype == torch.float32:
            assert_exact(got, left, right)
        else:
            assert_close_in(dtype, got, left, right)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_bias_of_every_dtype_is_added_before_the_result_is_rounded(level, dtype, bias_dtype, batch):
    q = quantize(strategies.make_weight("normal", (21, 70), 0, 0))
    x, bias = torch.randn(batch, 70).to(dtype), torch.randn(21).to(bias_dtype)
    with kernels.using(level):
        got, without = kernels.linear(x, q, dtype, bias), kernels.linear(x, q, torch.float32)
    wide = without + bias.float()
    unit = torch.finfo(dtype).eps
    assert ((got.float() - wide).abs() <= 3 * unit * (x.float().abs() @ q.dequantize().abs().t() + bias.abs())).all()


@compiled
@pytest.mark.parametrize("block_size", [10, 12, 30, 62, 100, 1022])
@pytest.mark.parametrize("batch", [1, 4, 20])
def test_blocks_that_are_not_whole_words(level, block_size, batch):
    q = quantize(strategies.make_weight("mixed", (19, 517), 0, 0), "int4", block_size=block_size, scales="float32")
    x, grad, dense = torch.randn(batch, 517), torch.randn(batch, 19), q.dequantize()
    with kernels.using(level):
        assert_exact(kernels.linear(x, q, torch.float32), x, dense)
        assert_exact(kernels.input_grad(grad, q, torch.float32), grad, dense.t())
        assert_close_in(torch.bfloat16, kernels.linear(x.bfloat16(), q, torch.bfloat16), x.bfloat16(), dense)


@compiled
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64, 72, 128, 256, 512, 4096])
@pytest.mark.parametrize("columns", [127, 640, 1025, 2300])
def test_every_number_of_a_few_inputs(level, block_size, columns):
    scales = {8: "float16", 16: "double", 24: "float32"}.get(block_size, "double")
    form = "nf4" if block_size % 16 else "bof4s"  # which has signed scales
    q = quantize(strategies.make_weight("normal", (131, columns), 0, 1), form, block_size=block_size, scales=scales)
    dense = q.dequantize()
    with kernels.using(level):
        for dtype, batches in ((torch.bfloat16, [*range(1, 10), 11, 16, 17]), (torch.float32, [2, 7, 10, 16, 17])):
            for batch in batches:
                x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 131).to(dtype)
                assert_close_in(dtype, kernels.linear(x, q, dtype), x, dense)
                assert_close_in(dtype, kernels.input_grad(grad, q, dtype), grad, dense.t())


@compiled
@pytest.mark.parametrize("stored_as", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 127, 640])
def test_every_number_of_a_few_inputs_with_16_bit_weights(level, stored_as, columns):
    w = strategies.make_weight("normal", (77, columns), 0, 1).to(stored_as)
    with kernels.using(level):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for batch in range(1, 11):
                x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 77).to(dtype)
                assert_close_in(dtype, kernels.linear(x, w, dtype), x, w)
                assert_close_in(dtype, kernels.input_grad(grad, w, dtype), grad, w.t())


@compiled
@pytest.mark.parametrize("block_size", [8, 10, 16, 24, 32, 48, 64, 72, 100, 128, 4096, None])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 65), (64, 192), (130, 1300), (258, 129), (32, 2000)])
def test_batches_and_weights_around_whole_tiles_in_bfloat16(level, block_size, rows, columns):
    """AMX takes 16 inputs, 32 columns and 16 rows at a time; None is a weight of bfloat16 numbers."""
    dense = strategies.make_weight("normal", (rows, columns), 0, 2)
    w = quantize(dense, "nf4", block_size=block_size) if block_size else dense.bfloat16()
    restored = w.dequantize() if block_size else w.float()
    generator = torch.Generator().manual_seed(rows)
    bias = torch.randn(rows, generator=generator)
    with kernels.using(level):
        for batch in (3, 4, 15, 16, 17, 31, 32, 33, 48, 50):
            x = torch.randn(batch, columns, generator=generator).bfloat16()
            grad = torch.randn(batch, rows, generator=generator).bfloat16()
            assert_close_in(torch.bfloat16, kernels.linear(x, w, torch.bfloat16), x, restored)
            assert_close_in(torch.bfloat16, kernels.input_grad(grad, w, torch.bfloat16), grad, restored.t())
            ones = torch.ones(batch, 1, dtype=torch.bfloat16)  # a bias is one more column
            got = kernels.linear(x, w, torch.bfloat16, bias)
            assert_close_in(torch.bfloat16, got, torch.cat((x, ones), 1), torch.cat((restored, bias[:, None]), 1))


@compiled
@pytest.mark.parametrize(("block_size", "columns"), [(None, 330), (16, 330), (64, 330), (128, 2000), (24, 330)])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_row(level, block_size, columns, bad):
    """What fills tiles up and is not used touches nothing: one bad input, one bad row of the weight."""
    dense = strategies.make_weight("normal", (45, columns), 0, 0)
    w = quantize(dense, block_size=block_size, scales="float32") if block_size else dense.bfloat16()
    for batch in (2, 5, 21, 40):
        x, grad = torch.randn(batch, columns).bfloat16(), torch.randn(batch, 45).bfloat16()
        x[1], grad[1] = bad, bad
        with kernels.using(level):
            products = kernels.linear(x, w, torch.bfloat16), kernels.input_grad(grad, w, torch.bfloat16)
            for got in products:
                finite = got.isfinite().all(1)
                assert not finite[1]
                assert finite[0]
                assert finite[2:].all()
            for row in (7, 44):
                broken = replace(w, scales=w.scales.clone()) if block_size else w.clone()
                (broken.scales if block_size else broken)[row] = bad
                finite = kernels.linear(x, broken, torch.bfloat16).isfinite()[0]
                assert not finite[row]
                assert finite.sum() == 44


@compiled
def test_a_result_that_is_subnormal_is_one_in_every_row(level):
    q, bias = quantize(torch.randn(45, 64)), torch.full((45,), 1e-39)
    with kernels.using(level):
        for batch in (1, 3, 20):
            got = kernels.linear(torch.zeros(batch, 64).bfloat16(), q, torch.bfloat16, bias)
            assert (got == bias.bfloat16()).all()


@compiled
@pytest.mark.parametrize("columns", [4098, 8192, 8194, 20000])
@pytest.mark.parametrize("batch", [1, 5, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["half", "int4"])
def test_wide_rows_are_packed_in_parts(level, columns, batch, dtype, kind):
    dense = strategies.make_weight("normal", (9, columns), 0, 0)
    w, restored = stored(kind, dense, block_size=96)
    x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 9).to(dtype)
    bias = torch.randn(9)
    with kernels.using(level):
        got, back = kernels.linear(x, w, dtype, bias), kernels.input_grad(grad, w, dtype)
        assert measure.peak_bytes(lambda: kernels.linear(x, w, dtype, bias)) <= 2**20 + got.nbytes + x.numel() * 4
    if dtype == torch.float32:
        assert_exact(got, x, restored, bias)
        assert_exact(back, grad, restored.t())
    else:
        magnitudes = x.float().abs() @ restored.abs().t() + bias.abs()
        assert ((got.float() - (x.float() @ restored.t() + bias)).abs() <= 2**-7 * magnitudes).all()
        assert_close_in(dtype, back, grad, restored.t())


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["half", "int4"])
def test_sums_of_wide_rows_are_rounded_once(level, dtype, kind):
    """Some inputs and some rows at a time."""
    w, restored = stored(kind, strategies.make_weight("normal", (600, 8200), 0, 0))
    bias = torch.randn(600)
    for batch in (7, 300):
        x = torch.randn(batch, 8200).to(dtype)
        with kernels.using(level):
            got, added = kernels.linear(x, w, dtype), kernels.linear(x, w, dtype, bias)
        assert_close_in(dtype, got, x, restored)
        unit = torch.finfo(dtype).eps / 2
        assert ((added.float() - got.float() - bias).abs() <= unit * (added.abs() + got.abs() + 1e-3)).all()


@compiled
@pytest.mark.parametrize("batch", [161, 330, 513, 1100])
@pytest.mark.parametrize("columns", [40, 1024])
def test_batches_of_several_pieces(level, batch, columns):
    q = quantize(strategies.make_weight("normal", (10, columns), 0, 0))
    half = strategies.make_weight("normal", (10, columns), 0, 0).half()
    x, grad = torch.randn(batch, columns), torch.randn(batch, 10)
    with kernels.using(level):
        for w, dense in ((q, q.dequantize()), (half, half)):
            assert_exact(kernels.linear(x, w, torch.float32), x, dense)
            assert_exact(kernels.input_grad(grad, w, torch.float32), grad, dense.t())
        low = grad.bfloat16()
        assert_close_in(torch.bfloat16, kernels.input_grad(low, q, torch.bfloat16), low, q.dequantize().t())


@compiled
@pytest.mark.parametrize("columns", [64, 192, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_weights_whose_last_group_of_columns_is_short(level, columns, dtype):
    """At levels whose groups are shorter than a row is padded to, a group may hold no column at all."""
    w = torch.randn(200, columns).to(dtype)
    with kernels.using(level):
        for batch in (1, 3, 8, 9, 20, 33):
            for x in (torch.randn(batch, 200), torch.randn(batch, 200).to(dtype)):
                for _ in range(20):  # a write past the scratch would show when it is freed
                    got = kernels.input_grad(x, w, torch.float32)
                assert_exact(got, x, w.float().t())


@compiled
@pytest.mark.parametrize("size", [1024, 4096])
@pytest.mark.parametrize("kind", ["half", "int4"])
def test_long_sums_of_one_sign_keep_their_bound(level, kind, size):
    dense = torch.rand(5, size, generator=torch.Generator().manual_seed(0)) + 0.1
    (wide, of_wide), (tall, of_tall) = stored(kind, dense), stored(kind, dense.t().contiguous(), block_size=8)
    with kernels.using(level):
        for batch in (1, 4, 12, 16, 40, 100):
            for x in (torch.ones(batch, size), torch.rand(batch, size)):
                assert_exact(kernels.linear(x, wide, torch.float32), x, of_wide)
                assert_exact(kernels.input_grad(x, tall, torch.float32), x, of_tall.t())


@compiled
@pytest.mark.parametrize("size", [512, 4096])
@pytest.mark.parametrize("kind", ["half", "int4"])
def test_sums_whose_roundings_all_go_one_way_keep_their_bound(level, kind, size):
    """Of numbers so alike that no rounding makes up for another."""
    dense = 0.9 + 0.05 * torch.rand(256, size, generator=torch.Generator().manual_seed(0))
    (wide, of_wide), (tall, of_tall) = stored(kind, dense), stored(kind, dense.t().contiguous(), block_size=8)
    with kernels.using(level):
        for batch in (1, 4, 12, 16, 40, 100):
            for x in (torch.full((batch, size), 0.37), torch.full((batch, size), 0.61)):
                assert_exact(kernels.linear(x, wide, torch.float32), x, of_wide)
                assert_exact(kernels.input_grad(x, tall, torch.float32), x, of_tall.t())


@compiled
@pytest.mark.parametrize("size", [256, 2048, 4096])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("half", {}),
        ("bfloat16", {}),
        ("int4", {"block_size": 96}),
        ("int4", {"block_size": 128}),
        ("nf4", {"block_size": 512}),
        ("nf4", {"block_size": 100}),
    ],
)
def test_sums_of_equal_numbers_keep_their_bound(level, kind, options, size):
    """Their roundings may all go one way."""
    for noise in (0.0, 0.05):
        dense = 0.9 + noise * torch.rand(64, size, generator=torch.Generator().manual_seed(0))
        w, restored = stored(kind, dense, **options)
        with kernels.using(level):
            for batch in (1, 4, 5, 8, 12, 24, 40):
                for value in (0.37, 0.61, 0.9, 1 / 3, 0.7731):
                    x = torch.full((batch, size), value)
                    assert_exact(kernels.linear(x, w, torch.float32), x, restored)


IN_INTEGERS = ("avx512vnni", "avx512bf16", "avx512amx")
"""Where levels on a grid are multiplied in integers: 128 columns of up to 4 inputs are exact, but for 24 bits."""


def longest_chain(level: str, kind: str, batch: int) -> int:
    """The most products of a float32 sum that are added one after the other before what they make is added apart."""
    if kind == "int4" and batch <= 4 and level in IN_INTEGERS:
        return 128
    if batch <= 12:
        return 32 if kind in ("half", "bfloat16") and batch <= 8 else 16
    return 128 if level == "avx512amx" else 64


def longest_chain_of_gradient(level: str, kind: str, batch: int) -> int:
    """The same of a sum over rows."""
    if kind == "int4" and batch == 1 and level in IN_INTEGERS:
        return 256
    if batch > 96 and level == "avx512amx":
        return 128
    return 16 if batch <= {"portable": 1, "avx2": 3, "neon": 3}.get(level, 16) else 32


LARGE = 2.0**25
"""Float32 counts by fours from here on: a one that is added to it vanishes, a sum of four ones counts."""


def assert_lost_ones(got: torch.Tensor, terms: int, chain: int) -> None:
    """Of a large number and ones, those in its chain may be lost, and 4 by rounding what was there before it came."""
    assert ((got.double() - (LARGE + terms - 1)).abs() <= chain + 4).all()


@compiled
@pytest.mark.parametrize("columns", [768, 3840])  # whole blocks, so that no chain is short
@pytest.mark.parametrize(
    ("kind", "block_size"),
    [("half", None), ("bfloat16", None), *((kind, size) for kind in ("int4", "nf4") for size in (16, 64, 96, 256))],
)
def test_chains_of_products_are_short(level, kind, block_size, columns):
    """What is added to a large number, one by one, may all be rounded off."""
    w, _ = stored(kind, torch.ones(40, columns), block_size=block_size, scales="float16")
    for batch in (1, 3, 4, 5, 8, 9, 12, 13, 24, 40, 100):
        x = torch.ones(batch, columns)
        x[torch.arange(batch), (torch.arange(batch) * 37 + 5 * batch) % columns] = LARGE
        with kernels.using(level):
            got = kernels.linear(x, w, torch.float32)
        assert_lost_ones(got, columns, longest_chain(level, kind, batch))


@compiled
@pytest.mark.parametrize("kind", ["half", "bfloat16", "int4", "nf4"])
@pytest.mark.parametrize("rows", [1024, 4096])
def test_chains_of_a_gradient_are_short(level, kind, rows):
    w, _ = stored(kind, torch.ones(rows, 256), scales="float16")
    for batch in (1, 2, 3, 5, 16, 17, 40, 130):
        grad = torch.ones(batch, rows)
        grad[torch.arange(batch), (torch.arange(batch) * 37 + 5 * batch) % rows] = LARGE
        with kernels.using(level):
            got = kernels.input_grad(grad, w, torch.float32)
        assert_lost_ones(got, rows, longest_chain_of_gradient(level, kind, batch))


@compiled
@pytest.mark.parametrize("form", ["int4", "nf4", "bof4s"])
@pytest.mark.parametrize("batch", [1, 4, 5, 30])
def test_large_inputs_and_small_steps_make_no_infinity(level, form, batch):
    """The scales of `double` are steps of a small unit: no sum is held in steps."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    q = quantize(weight, form, scales="double")
    x = 4e36 * weight.sign().expand(batch, 64)
    with kernels.using(level):
        got = kernels.linear(x, q, torch.float32)
    assert got.isfinite().all()
    assert_exact(got, x, q.dequantize())
