"""Quantizing again, measuring the error, and rounding to 16 bits; test_tensor.py has what is stored."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FourBit, Half, quantize
from lowmem.quant.quantize_tensor import (
    checked_rounded_copy,
    recorded_or_measured_squares,
    relative_error,
    requantize_changed_rows,
)
from tests import strategies
from tests.compiled import assert_same_bytes


@given(strategies.weights(), strategies.formats, strategies.block_sizes, strategies.encodings)
def test_quantizing_again_does_it_the_same_way(weight, format, block_size, scales):
    for search in (False, True):
        q = quantize(weight, format, block_size=block_size, scales=scales, search=search)
        again = requantize_changed_rows(q, weight)
        assert torch.equal(again.packed, q.packed)
        assert again.method == q.method


@given(
    strategies.weights(min_dims=2, max_dims=2),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
    st.booleans(),
)
def test_rows_that_are_what_was_stored_keep_their_bytes(weight, format, block_size, scales, search):
    q = quantize(weight, format, block_size=block_size, scales=scales, search=search)
    again = requantize_changed_rows(q, q.dequantize(torch.float64))
    assert_same_bytes(again, q)
    assert again.method == q.method
    changed = q.dequantize()
    changed[0] += 1
    again = requantize_changed_rows(q, changed)
    first = quantize(changed[:1], format, block_size=block_size, scales=scales, search=search)
    assert_same_bytes(replace(again, packed=again.packed[:1], scales=again.scales[:1]), first)
    assert torch.equal(again.packed[1:], q.packed[1:])
    assert torch.equal(again.scales[1:].view(torch.uint8), q.scales[1:].view(torch.uint8))


def test_the_default_is_that_of_four_bit():
    weight = strategies.make_weight("normal", (4, 200), 0, 0)
    for options in ({}, {"block_size": 64}, {"scales": "float16"}, {"search": False}):
        made = quantize(weight, **options)
        assert_same_bytes(made, FourBit(**options).store(weight))
        assert (made.format, made.block_size) == ("bof4s", options.get("block_size", 32))
    assert quantize(weight, "bof4s").block_size == 64  # a format that is named has its own


@pytest.mark.parametrize("row", [0, 150, 299])
def test_a_weight_has_changed_wherever_it_has(row):
    """Rows are compared a chunk at a time: the first, one in the middle, and the last chunk of five."""
    q = replace(quantize(strategies.make_weight("normal", (300, 1000), 0, 0), search=True), method="calibrated")
    weight = q.dequantize()
    assert requantize_changed_rows(q, weight).method == "calibrated"
    weight[row] += 1
    assert requantize_changed_rows(q, weight).method == "search"
    eight = replace(quantize(torch.randn(2, 64), "q8_0"), method="imported")
    assert requantize_changed_rows(eight, eight.dequantize()).method == "imported"
    assert requantize_changed_rows(eight, torch.randn(2, 64)).method == "absmax"


@given(strategies.weights(), strategies.formats)
def test_the_relative_error_is_that_of_all_weights(weight, format):
    q, half = quantize(weight, format, scales="float32"), weight.half()
    norm = float(weight.double().norm())
    for stored, restored in ((q, q.dequantize()), (half, half)):
        expected = float((weight.double() - restored.double()).norm()) / norm if norm else 0.0
        # Four digits are kept: that is off by half a unit of the fourth, 5e-4 of the smallest first digit.
        # What float64 loses of the sums is 1e-12 of them (Higham, section 3.1).
        assert relative_error(weight, stored) == pytest.approx(expected, rel=5.001e-4, abs=0)


@given(
    strategies.weights(),
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_quantizing_measures_the_error_that_it_makes(weight, format, block_size, scales, search, dtype):
    weight = weight.to(dtype)
    q = quantize(weight, format, block_size=block_size, scales=scales, search=search)
    norm = float(weight.double().norm())
    expected = float((weight.double() - q.dequantize().double()).norm()) / norm if norm else 0.0
    assert (
        q.squares.relative_error
        == recorded_or_measured_squares(weight, q).relative_error
        == relative_error(weight, q)
    )
    assert q.squares.relative_error == pytest.approx(
        expected, rel=5.001e-4, abs=0
    )  # as above, and 2^-24 of each error


def test_a_measured_error_is_of_these_weights_alone():
    """What is not the result of quantizing the weight is compared with it."""
    weight, other = torch.randn(4, 64), torch.randn(4, 64)
    q = quantize(weight, "int4")
    assert relative_error(other, q) > 1 > relative_error(weight, q) == q.squares.relative_error
    assert requantize_changed_rows(q, q.dequantize()).squares is None  # of which rows may keep their bytes
    assert quantize(weight.double(), "int4").squares is None  # which was rounded before
    assert recorded_or_measured_squares(
        weight.double(), quantize(weight.double(), "int4")
    ).relative_error == pytest.approx(q.squares.relative_error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_relative_error_is_of_any_shape_and_leaves_the_weight_as_it_is(dtype):
    weight = torch.arange(1.0, 17.0).view(2, 8).to(dtype)
    before = weight.clone()
    assert relative_error(weight, weight * 2) == 1
    assert relative_error(weight, weight) == 0
    assert torch.equal(weight, before)
    conv = strategies.make_weight("normal", (300, 10, 10, 10), 0, 0).to(dtype)
    assert relative_error(conv, quantize(conv.flatten(1))) == relative_error(
        conv.flatten(1), quantize(conv.flatten(1))
    )


@pytest.mark.parametrize("exponent", [-120, -80, 0, 60, 120])
def test_the_relative_error_has_no_magnitude(exponent):
    weight = strategies.make_weight("normal", (3, 4, 64), 0, 0)
    expected = relative_error(weight, quantize(weight, "nf4", scales="float32"))
    scaled = weight * 2.0**exponent
    assert relative_error(scaled, quantize(scaled, "nf4", scales="float32")) == expected > 0
    tried = [quantize(scaled, name, scales="float32") for name in ("fp4", "nf4")]
    best = min(tried, key=lambda q: relative_error(scaled, q))
    assert quantize(scaled, ("fp4", "nf4"), scales="float32").format == best.format


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_named_with_its_remedy(layout):
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    for refusing in (quantize, Half().store):
        with pytest.raises(TypeError, match=rf"weight is a nested tensor \(layout={layout}\).*weight.unbind"):
            refusing(nested)
    with pytest.raises(TypeError, match="importance is a nested tensor"):
        quantize(torch.randn(3, 8), search=True, importance=nested)


SIXTEEN = [torch.float16, torch.bfloat16]


@given(st.sampled_from(SIXTEEN), st.lists(st.floats(-6e4, 6e4), min_size=1, max_size=20))
def test_it_is_the_nearest_value_of_the_dtype_in_memory_of_its_own(dtype, values):
    weight = torch.tensor([values], dtype=torch.float32)
    rounded = checked_rounded_copy(weight, dtype, "weight")
    assert torch.equal(rounded, weight.to(dtype))
    assert rounded.is_contiguous()
    again = checked_rounded_copy(rounded, dtype, "weight")
    assert torch.equal(again, rounded)
    assert again.data_ptr() != rounded.data_ptr()


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(dtype, value):
    with pytest.raises(ValueError, match="gate holds 1 values that are NaN or infinite; repair them first"):
        checked_rounded_copy(torch.tensor([[value, 1.0]]), dtype, "gate")


def test_a_magnitude_that_float16_does_not_hold_is_named_with_the_remedy():
    weight = torch.tensor([[65536.0]])
    with pytest.raises(ValueError, match=r"up holds the magnitude 65536, above 65504.*Half\(torch.bfloat16\)"):
        checked_rounded_copy(weight, torch.float16, "up")
    assert checked_rounded_copy(weight, torch.bfloat16, "up") == 65536
