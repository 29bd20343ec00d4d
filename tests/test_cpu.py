"""The compiled kernel beyond float32 products: other dtypes, quantizing, restoring, updates, what it remembers."""

import copy
import pickle
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import QuantizedTensor, blockwise, kernels, measure, quantize
from lowmem.kernels import cpu, reference
from tests import strategies
from tests.test_kernels import assert_exact, compiled

PLAIN_UPDATE = reference.add_update

batches = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 17, 33, 50])
low_dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def poisoned():
    """Fill every fresh tensor with NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def only_c(monkeypatch):
    """Let no test here pass because plain torch did the work: its products raise."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("plain torch served")

    monkeypatch.setattr(reference, "linear", refuse)
    monkeypatch.setattr(reference, "input_grad", refuse)
    monkeypatch.setattr(reference, "add_update", refuse)


@contextmanager
def no_plain_rows():
    """The same for quantizing and restoring."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dequantize", "quantize_rows"):
            patch.setattr(type(blockwise.PLAIN), name, None)  # calling it is a TypeError
        yield


def assert_close_in(dtype: torch.dtype, got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """Within the roundings of both factors and of the result of the float64 product; sums are in float32."""
    unit = torch.finfo(dtype).eps / 2  # what one rounding loses
    expected = x.double() @ dense.double().t()
    magnitudes = x.double().abs() @ dense.double().abs().t()
    factors = 2.1 * unit if dtype == torch.bfloat16 else 1e-6  # float16 is widened: its factors are exact
    tiny = torch.finfo(dtype).smallest_normal * (1 + x.double().abs().sum(1, keepdim=True))  # subnormals count as 0
    allowed = factors * magnitudes + 1.1 * unit * expected.abs() + tiny
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= allowed).all()


@compiled
@given(
    strategies.weights(min_dims=2, max_dims=2, max_columns=400, max_exponent=0),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
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
@pytest.mark.parametrize("columns", [8192, 8194, 20000])
@pytest.mark.parametrize("batch", [1, 5, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["half", "4-bit"])
def test_wide_rows_are_packed_in_parts(level, columns, batch, dtype, kind):
    dense = strategies.make_weight("normal", (9, columns), 0, 0)
    w = dense.half() if kind == "half" else quantize(dense, block_size=96)
    x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, 9).to(dtype)
    restored = w.float() if kind == "half" else w.dequantize()
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


def assert_same_bytes(got: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert torch.equal(got.packed, expected.packed)
    assert torch.equal(got.scales.view(torch.uint8), expected.scales.view(torch.uint8))


@compiled
@pytest.mark.parametrize("form", ["nf4", "int4", "fp4", "bof4s"])
@pytest.mark.parametrize("importance", ["none", "some zeros", "mixed"])
@pytest.mark.parametrize("exponent", [-149, -140, -126, -75, 0, 15, 62, 65, 127])
def test_a_search_at_the_ends_of_float32_finds_the_bytes_of_plain_torch(level, form, importance, exponent):
    """Squares that vanish or overflow, candidates above the largest scale, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
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
                expected = quantize(fits, form, **options)
            with kernels.using(level), no_plain_rows():
                assert_same_bytes(quantize(fits, form, **options), expected)


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


@compiled
def test_threads_change_no_bit_of_anything(level):
    q = quantize(strategies.make_weight("normal", (301, 520), 0, 0))
    x = strategies.make_weight("normal", (40, 520), 0, 1)
    grad = strategies.make_weight("normal", (40, 301), 0, 2)
    a, b = strategies.make_weight("normal", (130, 520), 0, 3), strategies.make_weight("normal", (301, 130), 0, 4)
    large = strategies.make_weight("normal", (301, 900), 0, 5)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with kernels.using(level):
                made = [quantize(large, scales="double").packed, quantize(large).dequantize()]
                made += [quantize(large, "bof4s", search=True).scales]
                for batch in (1, 4, 6, 12, 13, 40):
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        made.append(kernels.linear(x[:batch].to(dtype), q, dtype))
                        made.append(kernels.input_grad(grad[:batch].to(dtype), q, dtype))
                made.append(kernels.add_update(grad[:3].contiguous(), x[:3].contiguous(), a, b, 0.5))
                made += [kernels.linear(x[:n].contiguous(), q, torch.float32, None, (a, b, 0.5)) for n in (3, 12)]
                results.append(made)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for made in results for one, other in zip(made, results[0], strict=True))


@compiled
@pytest.mark.parametrize("kind", ["half", "4-bit"])
def test_small_pieces_of_a_batch_change_no_bit(level, kind):
    """With many threads less is packed at a time, and what is packed may be so little that alone it would be few."""
    q, _ = stored(kind, strategies.make_weight("normal", (77, 8190), 0, 0), block_size=64)
    x, grad = torch.randn(30, 8190), torch.randn(30, 77)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 16, 64):
            torch.set_num_threads(threads)
            with kernels.using(level):
                made = []
                for batch in (3, 5, 7, 8, 9, 13, 25, 30):
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        made.append(kernels.linear(x[:batch].to(dtype), q, dtype))
                        made.append(kernels.input_grad(grad[:batch].to(dtype), q, dtype))
            results.append(made)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for made in results for one, other in zip(made, results[0], strict=True))


@compiled
@given(
    st.integers(1, 12),
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
    st.integers(1, 12),
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
    sixteen = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(kind)
    weight = dense.to(sixteen) if sixteen else quantize(dense, kind, block_size=16)
    bias = torch.randn(rows, generator=generator) if with_bias else None
    before = torch.get_num_threads()
    with kernels.using(level):
        expected = kernels.add_update(kernels.linear(x, weight, torch.float32, bias), x, a, b, 0.75)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                got = kernels.linear(x, weight, torch.float32, bias, (a, b, 0.75))
                assert torch.equal(got, expected)
        finally:
            torch.set_num_threads(before)


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
        many = kernels.linear(x.repeat(7, 1), half, torch.float32, None, (a, b, 2.0))  # torch's products are faster
    torch.testing.assert_close(strided, expected)
    torch.testing.assert_close(twice, expected)
    torch.testing.assert_close(many, expected.repeat(7, 1))
    torch.testing.assert_close(low, expected.bfloat16(), atol=0.1, rtol=0.1)


def test_an_update_that_c_does_not_take_goes_to_torch(monkeypatch):
    monkeypatch.setattr(reference, "add_update", PLAIN_UPDATE)
    base, x, a, b = torch.randn(3, 5), torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)
    expected = base + 0.5 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(kernels.add_update(base.t().contiguous().t(), x, a, b, 0.5), expected)
    many = kernels.add_update(base.repeat(30, 1), x.repeat(30, 1), a, b, 0.5)
    torch.testing.assert_close(many, expected.repeat(30, 1))
    wide = kernels.add_update(base.half(), x, a, b, 0.5)
    torch.testing.assert_close(wide, expected.half(), atol=1e-2, rtol=1e-2)
    with pytest.raises(RuntimeError):
        kernels.add_update(base, x[:, :3], a, b, 0.5)


@compiled
def test_what_is_remembered_of_a_weight_follows_it(level):
    """Changed in place, moved, copied, or shared between levels: the product is that of its values."""
    q = quantize(strategies.make_weight("normal", (12, 64), 0, 0))
    other = quantize(strategies.make_weight("normal", (12, 64), 0, 1))
    x = torch.randn(2, 64)
    with kernels.using(level):
        assert_exact(kernels.linear(x, q, torch.float32), x, q.dequantize())
        twins = copy.deepcopy(q), pickle.loads(pickle.dumps(q))
        q.packed.copy_(other.packed)
        q.scales.copy_(other.scales)
        assert_exact(kernels.linear(x, q, torch.float32), x, other.dequantize())
        for twin in twins:
            assert_exact(kernels.linear(x, twin, torch.float32), x, twin.dequantize())
            assert not torch.equal(twin.packed, q.packed)
        q.packed.data = twins[0].packed.clone()
        q.scales.data = twins[0].scales.clone()
        assert_exact(kernels.linear(x, q, torch.float32), x, twins[0].dequantize())
        bias = torch.randn(12)
        first = kernels.linear(x, q, torch.float32, bias)
        bias.data = bias.flip(0)
        assert_exact(kernels.linear(x, q, torch.float32, bias), x, q.dequantize(), bias)
        assert not torch.equal(first, kernels.linear(x, q, torch.float32, bias))
    with kernels.using("portable"):
        assert_exact(kernels.linear(x, q, torch.float32), x, q.dequantize())


@compiled
def test_a_bias_that_changed_under_the_same_address_is_read_anew(level):
    q = quantize(strategies.make_weight("normal", (8, 64), 0, 0))
    x, full = torch.randn(1, 64), torch.randn(16)
    with kernels.using(level):
        plain = kernels.linear(x, q, torch.float32)
        bias = torch.nn.Parameter(full[:8], requires_grad=False)
        torch.testing.assert_close(kernels.linear(x, q, torch.float32, bias), plain + full[:8])
        bias.data = full[::2]
        torch.testing.assert_close(kernels.linear(x, q, torch.float32, bias), plain + full[::2])
        bias.data = full.view(torch.float16)[:8]
        narrow = full.view(torch.float16)[:8].float()
        torch.testing.assert_close(kernels.linear(x, q, torch.float32, bias), plain + narrow, equal_nan=True)
        q.packed.resize_(4, 32)
        with pytest.raises((AssertionError, RuntimeError)):
            kernels.linear(x, q, torch.float32)


@compiled
@pytest.mark.parametrize("columns", [64, 192, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_weights_whose_last_group_of_columns_is_short(level, columns, dtype):
    """At levels whose groups are shorter than a row is padded to, a group may hold no column at all."""
    w = torch.randn(200, columns).to(dtype)
    with kernels.using(level):
        for batch in (1, 3, 8, 9):
            for x in (torch.randn(batch, 200), torch.randn(batch, 200).to(dtype)):
                for _ in range(20):  # a write past the scratch would show when it is freed
                    got = kernels.input_grad(x, w, torch.float32)
                assert_exact(got, x, w.float().t())


def stored(kind, dense, **options):
    """A weight of a kind, and the numbers that it stands for."""
    w = dense.half() if kind == "half" else quantize(dense, "int4", **options)
    return w, w.float() if kind == "half" else w.dequantize()


@compiled
@pytest.mark.parametrize("size", [1024, 4096])
@pytest.mark.parametrize("kind", ["half", "4-bit"])
def test_long_sums_of_one_sign_lose_no_more_than_torch_s(level, kind, size):
    dense = torch.rand(5, size, generator=torch.Generator().manual_seed(0)) + 0.1
    (wide, of_wide), (tall, of_tall) = stored(kind, dense), stored(kind, dense.t().contiguous(), block_size=8)
    with kernels.using(level):
        for batch in (1, 4, 12, 16, 40):
            for x in (torch.ones(batch, size), torch.rand(batch, size)):
                assert_exact(kernels.linear(x, wide, torch.float32), x, of_wide)
                assert_exact(kernels.input_grad(x, tall, torch.float32), x, of_tall.t())


@compiled
@pytest.mark.parametrize("size", [512, 4096])
@pytest.mark.parametrize("kind", ["half", "4-bit"])
def test_sums_that_round_one_way_lose_no_more_than_torch_s(level, kind, size):
    """Of numbers so alike that torch's own product loses more than 1e-6 of some."""
    dense = 0.9 + 0.05 * torch.rand(256, size, generator=torch.Generator().manual_seed(0))
    (wide, of_wide), (tall, of_tall) = stored(kind, dense), stored(kind, dense.t().contiguous(), block_size=8)

    def lost(got, x, exact):
        norms = x.double().norm(dim=1)[:, None] * exact.double().norm(dim=1)
        return ((got.double() - x.double() @ exact.double().t()).abs() / norms).max()

    with kernels.using(level):
        for batch in (1, 4, 12, 16, 40):
            for x in (torch.full((batch, size), 0.37), torch.full((batch, size), 0.61)):
                for got, exact in (
                    (kernels.linear(x, wide, torch.float32), of_wide),
                    (kernels.input_grad(x, tall, torch.float32), of_tall.t()),
                ):
                    assert lost(got, x, exact) <= max(1e-6, lost(x @ exact.t(), x, exact))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["half", "bfloat16", "4-bit"])
@pytest.mark.parametrize(
    ("rows", "columns", "batch", "threads"),
    [
        *(
            (*shape, *work)
            for shape in ((4096, 256), (1024, 1280))
            for work in ((8, 4), (100, 2), (64, 4), (240, 4), (64, 8), (512, 8), (512, 16), (512, 18))
        ),
        *((64, 28672, *work) for work in ((4, 2), (16, 1), (8, 4), (64, 4), (512, 16))),
    ],
)
def test_scratch_of_gradients_and_products_of_every_dtype_stays_within_a_mebibyte(
    level, dtype, kind, rows, columns, batch, threads
):
    dense = strategies.make_weight("normal", (rows, columns), 0, 0)
    w = {"half": dense.half, "bfloat16": dense.bfloat16, "4-bit": lambda: quantize(dense)}[kind]()
    x, grad = torch.randn(batch, columns).to(dtype), torch.randn(batch, rows).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with kernels.using(level):
            for run, out in (
                (lambda: kernels.linear(x, w, dtype), rows),
                (lambda: kernels.input_grad(grad, w, dtype), columns),
            ):
                assert measure.peak_bytes(run) <= 2**20 + batch * out * dtype.itemsize
    finally:
        torch.set_num_threads(before)


def test_memory_that_cannot_be_written_is_left_to_plain_torch():
    weight = strategies.make_weight("normal", (4, 16), 0, 0)
    expected = quantize(weight, scales="float16", block_size=16)
    packed = torch.empty(8, 4, dtype=torch.uint8).t()
    stored = torch.empty(1, 4, dtype=torch.float16).t()
    kernel = cpu.Kernel(cpu.load()[0], kernels.available()[-1])
    kernel.quantize_rows(weight, replace(expected, packed=packed, scales=stored), slice(None), None)
    assert torch.equal(packed, expected.packed)
    assert torch.equal(stored, expected.scales)
    strided = torch.rand(32)[::2]
    expected = quantize(weight, scales="float16", block_size=16, search=True, importance=strided)
    searched = replace(expected, packed=torch.zeros_like(expected.packed), scales=torch.zeros_like(expected.scales))
    kernel.quantize_rows(weight, searched, slice(None), strided)
    assert_same_bytes(searched, expected)
    meta = replace(expected, packed=expected.packed.to("meta"), scales=expected.scales.to("meta"))
    assert kernel.dequantize(meta, slice(1, 3), torch.float32).shape == (2, 16)
    assert torch.equal(
        blockwise.PLAIN.dequantize(expected, slice(1, 3), torch.float64)[0], expected.dequantize()[1].double()
    )


PRODUCTS = {"linear": 11, "input_grad": 6, "restore": 7}


@compiled
@pytest.mark.parametrize("function", [*PRODUCTS, "quantize", "update", "prepare", "order"])
def test_a_wrong_number_of_arguments_is_an_error(level, function):
    native, _ = cpu.load()
    with pytest.raises(TypeError, match="arguments, got"):
        getattr(native, function)(0, 1)
    if function in PRODUCTS:
        numbers = [0] * (PRODUCTS[function] - 3)
        with pytest.raises(ValueError, match="PyCapsule"):
            getattr(native, function)(0, object(), torch.zeros(2), *numbers)


@contextmanager
def read_by_capsules():
    """As where torch has no table of functions for C: it was added after 2.4, the oldest that serves."""
    native, _ = cpu.load()
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    shared = torch.Tensor, torch.nn.Parameter
    assert not native.use_torch(*shared, None, torch._C._to_dlpack)
    try:
        yield
    finally:
        assert native.use_torch(*shared, table, torch._C._to_dlpack) is (table is not None)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 30])
def test_either_way_to_read_a_tensor_is_as_good(level, dtype, batch):
    dense = strategies.make_weight("normal", (33, 70), 0, 0)
    q, half = quantize(dense, block_size=16), dense.half()
    x, grad, bias = torch.randn(batch, 70).to(dtype), torch.randn(batch, 33).to(dtype), torch.randn(33)
    a, b = torch.randn(4, 70), torch.randn(33, 4)

    def run():
        made = [q.dequantize(dtype), kernels.add_update(grad[:3].float(), x[:3].float(), a, b, 0.5)]
        for weight in (q, half):
            made += [kernels.linear(x, weight, dtype, bias), kernels.input_grad(grad, weight, dtype)]
        return made, measure.peak_bytes(lambda: kernels.linear(x, q, dtype))

    with kernels.using(level):
        expected, memory = run()
        with read_by_capsules():
            got, same = run()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert memory == same > x.shape[0] * 33 * dtype.itemsize  # the scratch is seen


@compiled
def test_what_c_cannot_read_never_reaches_it(level):
    """Wrong shapes, dtypes, devices, layouts and sizes: None, so that plain torch serves or says what is wrong."""
    native, _ = cpu.load()
    index = native.levels().index(level)
    half, x = torch.randn(5, 8).half(), torch.randn(3, 8)
    lazy = torch._neg_view(torch.randn(3, 8))

    class Wrapped(torch.Tensor):
        pass

    def linear(weight=half, x=x, bias=None, out=None, handle=None, scales=None):
        return native.linear(index, handle, weight, scales, x, bias, out, 2, None, None, None)

    def everywhere():
        assert linear().shape == (3, 5)
        assert linear(x=torch.nn.Parameter(x)).shape == (3, 5)
        for bad in (x[:, :7], x[:0], x[0], x[None], x.double(), x.int(), x.t(), x[::2], x[:, ::2], x.to("meta")):
            assert linear(x=bad) is None
        for bad in (lazy, x.to_sparse(), torch._efficientzerotensor((3, 8)), x.as_subclass(Wrapped), None, 3):
            assert linear(x=bad) is None
        for bad in (half.float(), half.t(), half[:, :4], half[0], half[:, :0], half.byte(), half.to("meta"), None):
            assert linear(weight=bad) is None
        for bad in (torch.zeros(4), torch.zeros(5, 1), torch.zeros(10)[::2], torch.zeros(5).double(), lazy[0, :5]):
            assert linear(bias=bad) is None
        for bad in (torch.empty(3, 4), torch.empty(5, 3).t(), torch.empty(3, 5).double(), torch.empty(3, 5).int(), 3):
            with pytest.raises(ValueError, match="out is no tensor"):
                linear(out=bad)
        freed = torch.randn(3, 8)
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="no memory"):
            linear(x=freed)

    everywhere()
    with read_by_capsules():
        everywhere()


@compiled
def test_a_weight_that_has_moved_or_changed_its_size_is_not_read_as_it_was(level):
    native, _ = cpu.load()
    index = native.levels().index(level)
    q = quantize(strategies.make_weight("normal", (6, 64), 0, 0), block_size=16)
    x = torch.randn(2, 64)
    with kernels.using(level):
        kernels.linear(x, q, torch.float32)
    handle = q.__dict__["prepared"].handle

    def linear(packed=q.packed, scales=q.scales):
        return native.linear(index, handle, packed, scales, x, None, None, 2, None, None, None)

    assert linear() is not None
    assert linear(packed=q.packed.clone()) is None
    assert linear(scales=q.scales.clone()) is None
    assert linear(packed=q.packed[:5]) is None
    assert linear(scales=q.scales[:5]) is None
    assert linear(packed=q.packed[1:]) is None
    assert native.restore(index, handle, q.packed, q.scales, 4, torch.empty(3, 64), 2) is None  # beyond the end
    assert native.restore(index, handle, q.packed, q.scales, -1, torch.empty(3, 64), 2) is None
    assert native.restore(index, handle, q.packed, q.scales, 4, torch.empty(2, 63), 2) is None
    assert native.restore(index, handle, q.packed, q.scales, 4, torch.empty(2, 64), 2) is not None
    for other, name in enumerate(native.levels()):
        found = native.linear(other, handle, q.packed, q.scales, x, None, None, 2, None, None, None)
        lanes = {"portable": 8, "neon": 4, "avx2": 8}
        assert (found is not None) == (lanes.get(name, 16) == lanes.get(level, 16))


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
