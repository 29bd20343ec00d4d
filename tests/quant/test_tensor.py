"""Quantization: its error is bounded, the bound is tight, and the bytes depend on the values alone."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lowmem import FORMATS, QuantizedTensor, kernels, measure, quantize
from lowmem.kernels import reference
from lowmem.quant.formats import get_format
from lowmem.quant.quantize_tensor import requantize_changed_rows
from lowmem.quant.scale_encodings import ENCODINGS
from lowmem.quant.tensor import METHODS, SCRATCH_BYTES, device_scratch_bytes, row_slices_within_scratch
from tests import strategies
from tests.compiled import assert_same_bytes, on_threads
from tests.rounding import default_dtype
from tests.selection import covering

every_format = pytest.mark.parametrize("format", sorted(FORMATS))
every_encoding = pytest.mark.parametrize("scales", sorted(ENCODINGS))


def codes_of(q: QuantizedTensor) -> torch.Tensor:
    return q.unpacked(q.packed)


def assert_within_bound(weight: torch.Tensor, q: QuantizedTensor) -> None:
    error = (weight.double() - q.dequantize().double()).abs()
    excess = error - q.error_bound().double()
    assert (excess <= 0).all(), f"error exceeds the bound by {float(excess.max())}"


@given(strategies.weights(), strategies.formats, strategies.block_sizes, strategies.encodings, st.booleans())
def test_error_never_exceeds_the_bound(weight, format, block_size, scales, search):
    q = quantize(weight, format, block_size=block_size, scales=scales, search=search)
    assert q.shape == weight.shape
    columns = math.ceil(weight.shape[-1] * get_format(format).bits / 8)
    assert q.packed.shape == (*weight.shape[:-1], columns)
    assert q.error_bound().shape == q.dequantize().shape == weight.shape
    assert q.dequantize().isfinite().all()
    assert_within_bound(weight, q)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=40),
    strategies.formats,
    strategies.small_blocks,
    st.booleans(),
)
@example([3.4028234663852886e38, -1e-45, 0.0], "nf4", 8, False)
@example([3.4028234663852886e38, -3e38, 0.0], "nf4", 8, True)
@example([3.4028234663852886e38], "q8_0", 8, False)
@example([3.4028234663852886e38, -3e38], "int8", 8, False)
@example([1e-45, 3e-45, -1.4e-44], "int4", 8, False)
@example([1e-38, 3e-38, -1.4e-38], "bof4s", 8, True)
def test_error_never_exceeds_the_bound_for_any_float32(values, format, block_size, search):
    weight = torch.tensor(values)
    assert_within_bound(weight, quantize(weight, format, block_size=block_size, scales="float32", search=search))


@given(strategies.formats, strategies.encodings, st.floats(2**-20, 60000, width=32), strategies.small_blocks)
def test_the_bound_is_tight_in_the_widest_gap(format, scales, magnitude, block_size):
    """A weight in the middle of the widest gap reaches 99% of the bound; beyond a nearer end, what is left to -1."""
    form = get_format(format)
    # Below, what a float16 scale may have lost counts, too: it adds to the distance to a nearer end.
    is_near = form.half_gap > form.top - form.end
    assume(magnitude >= 2**-13 * form.top or (form.bits == 4 and is_near))
    levels = torch.tensor(form.levels if form.bits == 4 else form.levels[1:])  # those that are chosen
    probe = quantize(torch.full((block_size,), magnitude), format, block_size=block_size, scales=scales, search=False)
    scale = float(probe.dequantize().abs().max()) / form.top  # what is stored for this magnitude
    widest = int((levels[1:] - levels[:-1]).argmax())
    middle = float(levels[widest] + levels[widest + 1]) / 2 * scale
    weight = torch.full((block_size,), middle if is_near else -magnitude)
    weight[0] = magnitude
    q = quantize(weight, format, block_size=block_size, scales=scales, search=False)
    error = (weight.double() - q.dequantize().double()).abs()
    assert float((error / q.error_bound().double()).max()) >= 0.99
    assert_within_bound(weight, q)


@every_format
@pytest.mark.parametrize(
    ("scales", "row", "magnitude"),
    [
        ("float32", 1.0, 2.0**-149),  # subnormal scales become zero
        ("float16", 1.0, 2.0**-26),  # as do those below the smallest subnormal float16
        ("float16", 1.0, 2.0**-24),
        ("float16", 1.0, 5 * 2.0**-24),
        ("double", 1.0, 2.0**-7),  # one step of the row's scale
        ("double", 1000.0, 4.0),
        ("double", 0.0, 2.0**-26),  # a row scale of zero
        ("double", 0.0, 2.0**-24),  # all steps of the smallest row scale
    ],
)
def test_the_bound_is_tight_where_a_stored_scale_falls_short(format, scales, row, magnitude):
    """The largest block that the same bytes store reaches 99% of the bound, at the end level nearer to zero."""

    def quantized(magnitude: float) -> tuple[torch.Tensor, QuantizedTensor]:
        weight = torch.tensor([[row] + 7 * [0.0] + [magnitude] + 7 * [-magnitude]])
        return weight, quantize(weight, format, block_size=8, scales=scales, search=False)

    stored = quantized(magnitude)[1].scales
    low, high = (int(torch.tensor(m).view(torch.int32)) for m in (magnitude, 1000.0))  # floats in order
    while high - low > 1:
        middle = (low + high) // 2
        same = torch.equal(
            quantized(float(torch.tensor(middle, dtype=torch.int32).view(torch.float32)))[1].scales, stored
        )
        low, high = (middle, high) if same else (low, middle)
    weight, q = quantized(float(torch.tensor(low, dtype=torch.int32).view(torch.float32)))
    assert torch.equal(q.scales, stored)
    error = (weight.double() - q.dequantize().double()).abs()
    assert float((error / q.error_bound().double())[:, 8:].max()) >= 0.99
    assert_within_bound(weight, q)


@given(
    strategies.weights(),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
)
@example(torch.tensor([[1e4] + [0.0] * 7 + [1e-4, -1e-4] * 4]), "nf4", 8, "double")  # a block far below one step
@example(torch.tensor([[1e4] + [0.0] * 7 + [6.0, -5.9] * 4]), "bof4s", 8, "double")  # whose largest changes its sign
@example(torch.tensor([[-1e-9] * 8]), "bof4s", 8, "float16")
@example(torch.tensor([[-1e-9] * 8]), "bof4s", 8, "double")
def test_quantizing_what_was_dequantized_gives_the_same_bytes(weight, format, block_size, scales):
    q = quantize(weight, format, block_size=block_size, scales=scales, search=False)
    for kernel in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(kernel):
            again = quantize(q.dequantize(), format, block_size=block_size, scales=scales, search=False)
            assert_same_bytes(again, q)


@every_format
@every_encoding
def test_tiny_scales_are_found_again_by_a_second_quantization(format, scales):
    """Every pair of a block's absmax and one other weight, in the units where few bits are left."""
    pairs = torch.cartesian_prod(torch.arange(1, 60), torch.arange(-60, 60))
    for unit in (2.0**-149, 2.0**-126, 2.0**-30, 2.0**-24):
        weight = (pairs * unit).float()
        q = quantize(weight, format, block_size=8, scales=scales, search=False)
        assert_same_bytes(quantize(q.dequantize(), format, block_size=8, scales=scales, search=False), q)
        assert_within_bound(weight, q)


@given(strategies.formats, strategies.encodings, strategies.small_blocks, st.integers(-9, 9), strategies.seeds)
@example("q8_0", "float16", 8, -7, 0)
@example("q8_0", "float16", 8, -8, 0)
@example("q8_0", "double", 8, -9, 1)
def test_scaling_by_a_power_of_two_scales_the_result_exactly(format, scales, block_size, exponent, seed):
    weight = strategies.make_weight("normal", (3, 75), 0, seed) + 1
    q = quantize(weight, format, block_size=block_size, scales=scales)
    scaled = quantize(weight * 2.0**exponent, format, block_size=block_size, scales=scales)
    expected = q.dequantize() * 2.0**exponent
    largest = quantize(weight, format, block_size=block_size, scales="float32", search=False).scales.abs()
    if scales != "float32" and float(largest.min()) * METHODS[q.method] * 2.0 ** min(exponent, 0) < 2.0**-14:
        # A scale may be a subnormal float16, which has fewer bits than the scale that it should be a multiple of.
        bound = scaled.error_bound().double() + q.error_bound().double() * 2.0**exponent
        assert ((scaled.dequantize().double() - expected).abs() <= bound).all()
    else:
        assert torch.equal(scaled.packed, q.packed)
        assert torch.equal(scaled.dequantize(), expected)


@given(strategies.formats, strategies.encodings, strategies.small_blocks, st.permutations(range(5)), strategies.seeds)
def test_permuting_blocks_permutes_the_result(format, scales, block_size, order, seed):
    weight = strategies.make_weight("mixed", (2, 5, block_size), 0, seed)
    permuted = quantize(weight[:, order].flatten(1), format, block_size=block_size, scales=scales)
    plain = quantize(weight.flatten(1), format, block_size=block_size, scales=scales)
    assert torch.equal(permuted.dequantize().view_as(weight), plain.dequantize().view_as(weight)[:, order])


@given(strategies.weights(min_dims=2), strategies.formats, strategies.small_blocks, strategies.encodings)
def test_rows_are_independent(weight, format, block_size, scales):
    whole = quantize(weight, format, block_size=block_size, scales=scales)
    first = quantize(weight[0], format, block_size=block_size, scales=scales)
    assert torch.equal(whole.packed[0], first.packed)
    assert torch.equal(whole.scales[0], first.scales)


@given(strategies.weights(), strategies.formats, strategies.block_sizes, strategies.encodings)
def test_views_and_thread_counts_give_the_same_bytes(weight, format, block_size, scales):
    q = quantize(weight, format, block_size=block_size, scales=scales)
    plain = quantize(
        weight.clone(memory_format=torch.contiguous_format), format, block_size=block_size, scales=scales
    )
    with on_threads(1 if torch.get_num_threads() > 1 else 2):
        other = quantize(weight, format, block_size=block_size, scales=scales)
    for same in (plain, other):
        assert torch.equal(same.packed, q.packed)
        assert torch.equal(same.scales.view(torch.uint8), q.scales.view(torch.uint8))


@every_format
@every_encoding
def test_blocks_of_zeros_and_zeros_where_the_format_has_one_stay_exact(format, scales):
    weight = torch.zeros(2, 40)
    weight[:, 16:32] = torch.tensor([0.0, 1.0, -0.0, -2.0, 0.0, 3.0, 1e-6, 0.0]).repeat(2)
    restored = quantize(weight, format, block_size=16, scales=scales).dequantize()
    assert not restored[:, :16].any()
    assert not restored[:, 32:].any()
    assert format == "int4" or not restored[weight == 0].any()


@given(strategies.weights(), strategies.formats, strategies.block_sizes, strategies.encodings)
def test_what_the_search_finds_is_never_worse_but_for_storing_the_scale(weight, format, block_size, scales):
    """Against stored scales that are exact, float32's, no block loses more than with its largest magnitude."""
    if scales == "float32":
        found, plain = (
            quantize(weight, format, block_size=block_size, scales=scales, search=search) for search in (True, False)
        )
        errors = [(weight - q.dequantize()).double().square().sum() for q in (found, plain)]
        assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-80
    else:
        q = quantize(weight, format, block_size=block_size, scales=scales, search=True)
        assert q.method == "search"
        assert q.bits_per_weight == quantize(weight, format, block_size=block_size, scales=scales).bits_per_weight


def test_the_search_and_signed_scales_lose_less_of_a_normal_matrix():
    weight = strategies.make_weight("normal", (1024, 4096), 0, 0)

    def rms(q: QuantizedTensor) -> float:
        assert q.bits_per_weight <= 4.15
        return float((weight - q.dequantize()).square().mean().sqrt() / weight.square().mean().sqrt())

    assert rms(quantize(weight, "nf4", search=True)) <= 0.087
    assert rms(quantize(weight, "bof4s", search=False)) <= 0.089
    assert rms(quantize(weight, "bof4s")) <= 0.082


def test_importance_moves_the_error_to_columns_that_count_less():
    weight = strategies.make_weight("normal", (64, 256), 0, 0)
    importance = torch.where(torch.arange(256) % 2 == 0, 1.0, 0.01)
    error = (weight - quantize(weight, search=True).dequantize()).square()
    weighted = (weight - quantize(weight, search=True, importance=importance).dequantize()).square()
    assert float(weighted[:, ::2].sum()) < 0.95 * float(error[:, ::2].sum())
    assert float(weighted[:, 1::2].sum()) > float(error[:, 1::2].sum())
    assert_within_bound(weight, quantize(weight, search=True, importance=importance))


def test_of_several_formats_the_one_with_the_least_error_is_taken():
    even = torch.linspace(-1, 1, 16).repeat(4, 4)
    normal = strategies.make_weight("normal", (64, 256), 0, 0)
    for weight, format in ((even, "int4"), (normal, "bof4s")):
        chosen = quantize(weight, ("nf4", "int4", "bof4s"), block_size=64, scales="float16")
        alone = quantize(weight, format, block_size=64, scales="float16")
        assert chosen.format == format
        assert torch.equal(chosen.packed, alone.packed)
    first = torch.ones(8, 16)
    first[:, 8:] = 0  # what counts is the half with importance
    assert quantize(first, ["nf4", "int4"], importance=torch.arange(16) // 8 * 1.0).format == "nf4"


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (torch.ones(7), ValueError, r"importance.shape=\(7,\) must be \(8,\)"),
        (-torch.ones(8), ValueError, "negative"),
        (torch.full((8,), math.nan), ValueError, "NaN"),
        (torch.ones(8, dtype=torch.int64), TypeError, "floating-point"),
        ([1.0] * 8, TypeError, "floating-point"),
    ],
)
def test_a_wrong_importance_is_named(importance, error, message):
    with pytest.raises(error, match=message):
        quantize(torch.ones(2, 8), importance=importance)


def test_what_was_calibrated_has_no_bound_for_single_weights():
    q = replace(quantize(torch.ones(2, 8)), method="calibrated")
    with pytest.raises(ValueError, match="method='calibrated' has no bound"):
        q.error_bound()
    assert requantize_changed_rows(q, torch.ones(2, 8)).method == "calibrated"  # it is what was stored
    assert requantize_changed_rows(q, torch.full((2, 8), 2.0)).method == "search"
    with pytest.raises(ValueError, match="method='magic' is unknown"):
        replace(q, method="magic")


def test_an_odd_row_is_padded_by_the_code_nearest_to_zero():
    q = quantize(torch.ones(3, 5), "nf4", block_size=8)
    assert q.packed.shape == (3, 3)
    assert (q.packed[:, 2] >> 4 == FORMATS["nf4"].zero_code).all()


def test_nbytes_and_bits_per_weight():
    q = quantize(torch.ones(64, 1024), "nf4", block_size=64, scales="double")
    assert q.nbytes == 64 * (512 + 16 + 2)
    assert q.bits_per_weight == 8 * (512 + 16 + 2) / 1024
    int4 = quantize(torch.ones(64, 1024), "int4")
    assert (int4.block_size, int4.scale_encoding, int4.bits_per_weight) == (16, "float16", 5.0)
    assert quantize(torch.ones(0, 8)).bits_per_weight == 0


def test_error_of_a_normal_matrix_is_what_the_format_is_known_for():
    weight = strategies.make_weight("normal", (1024, 4096), 0, 0)
    error = weight - quantize(weight, "nf4", block_size=64, scales="float32").dequantize()
    assert float(error.abs().mean()) == pytest.approx(0.0728, abs=2e-4)
    assert float(error.pow(2).mean().sqrt()) == pytest.approx(0.0920, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_in_float32(dtype):
    weight = strategies.make_weight("normal", (3, 50), 0, 1).to(dtype)
    q = quantize(weight)
    assert torch.equal(q.packed, quantize(weight.float()).packed)
    assert q.dequantize().dtype == torch.float32
    assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))
    assert_within_bound(weight, q)


def test_a_parameter_is_quantized_without_a_graph():
    q = quantize(torch.nn.Parameter(torch.ones(2, 8)))
    assert not q.dequantize().requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    weight = strategies.make_weight("normal", (20, 300), 0, 0)
    expected = quantize(weight)
    with default_dtype(dtype):
        q = quantize(weight)
        assert q.restore(slice(None)).dtype == torch.float32
        assert torch.equal(q.packed, expected.packed)
        assert torch.equal(q.dequantize(torch.float32), expected.dequantize(torch.float32))
        assert_within_bound(weight, q)


@covering(1, sizes=[(10, 4096), (64, 4096), (10, 64), (65, 64), (1000, 8), (4096, 64)], scales=sorted(ENCODINGS))
def test_quantizing_and_dequantizing_stay_within_the_scratch(sizes, scales):
    columns, block_size = sizes
    weight = torch.randn(2**20 // columns, columns)
    peak = measure.peak_bytes(lambda: quantize(weight, block_size=block_size, scales=scales))
    q = quantize(weight, block_size=block_size, scales=scales)
    assert peak <= q.nbytes + 2 * SCRATCH_BYTES
    assert measure.peak_bytes(q.dequantize) <= weight.nbytes + SCRATCH_BYTES


def test_dequantizing_to_integers_or_every_other_row_is_refused():
    q = quantize(torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be a floating-point dtype"):
        q.dequantize(torch.int8)
    with pytest.raises(ValueError, match=r"rows=slice\(None, None, -1\) must follow each other"):
        q.dequantize_rows(slice(None, None, -1), torch.float32)


@given(st.integers(0, 5000), st.integers(1, 2**20))
def test_chunks_cover_every_row_once_within_the_scratch(rows, columns):
    chunks = list(row_slices_within_scratch(rows, columns))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert all((c.stop - c.start) * columns * 16 <= SCRATCH_BYTES or c.stop - c.start == 1 for c in chunks)
    whole = list(
        row_slices_within_scratch(rows, columns, 4, device=torch.device("cuda"))
    )  # nothing is allocated there
    fitting = max(1, device_scratch_bytes(torch.device("cuda")) // (4 * columns))
    assert len(whole) == -(-rows // (fitting if fitting < 64 else fitting // 64 * 64))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "must be a tensor, found list"),
        (torch.ones(8, dtype=torch.int32), TypeError, "torch.int32 must be a floating-point dtype"),
        (torch.ones(8, dtype=torch.complex64), TypeError, "torch.complex64 must be a floating-point dtype"),
        (torch.ones(2, 8).to_sparse(), TypeError, "must be dense"),
        (torch.ones(8, device="meta"), ValueError, "meta device"),
        (torch.tensor(1.0), ValueError, "no last dimension"),
        (torch.ones(4, 0), ValueError, r"shape=\(4, 0\) has empty rows"),
        (torch.tensor([1.0, math.nan]), ValueError, "1 values that are NaN"),
        (torch.tensor([-math.inf, math.inf]), ValueError, "2 values that are NaN, infinite"),
        (torch.tensor([1e300], dtype=torch.float64), ValueError, "beyond float32"),
    ],
)
def test_a_wrong_weight_is_named(weight, error, message):
    with pytest.raises(error, match=message):
        quantize(weight)


@pytest.mark.parametrize(("scales", "limit"), [("float16", "65504"), ("double", "65504")])
def test_a_magnitude_that_the_scales_cannot_hold_names_the_remedy(scales, limit):
    with pytest.raises(ValueError, match=f"above {limit}.*use scales='float32'"):
        quantize(torch.tensor([2e7, 1.0]), scales=scales)


def test_bad_options_are_named():
    bad = {"scales": "float8", "block_size": 7, "format": "q4"}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} (is unknown|must be)"):
            quantize(torch.ones(8), **{name: value})
    with pytest.raises(ValueError, match="names no format"):
        quantize(torch.ones(8), ())


@pytest.mark.parametrize(
    ("name", "value"), [("packed", torch.zeros(1, 4)), ("scales", torch.ones(1, 1)), ("block_size", 16)]
)
def test_no_field_can_be_assigned(name, value):
    """The cached handle is of the fields as they were: a copy with others comes from ``dataclasses.replace``."""
    q = quantize(torch.ones(1, 8), block_size=8)
    with pytest.raises(FrozenInstanceError, match=f"cannot assign to field '{name}'"):
        setattr(q, name, value)
    assert replace(q, **{name: value}).cache is not q.cache


@pytest.mark.parametrize("rows", [slice(0, 5), slice(3, 1300), slice(1299, 1300), slice(7, 7), slice(-4, None)])
def test_plain_torch_dequantizes_the_rows_that_are_asked_for(rows):
    """Of 1,300 rows, which are two chunks: those of a slice that begins in either."""
    q = quantize(strategies.make_weight("normal", (1300, 64), 0, 0), "int4")
    expected = q.restore(slice(None))[rows]
    assert torch.equal(reference.dequantize(q, rows, torch.float32), expected)
