"""Codes chosen against a layer's inputs keep its output better than the nearest ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FORMATS, FourBit, kernels, quantize
from lowmem.quant.scale_encodings import get_scale_encoding
from lowmem.transforms.calibration.gptq_solver import _nearest_encoded_scales, prepare_hessian_or_none, quantize_gptq
from tests.rounding import default_dtype
from tests.selection import covering


def correlated(rows, columns, seed=0):
    """Return inputs of which a few directions have most of the size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0.05, 1, columns) ** 2
    return torch.randn(rows, columns, generator=generator) @ mix.T


def hessian_of(x, damping=0.01):
    return prepare_hessian_or_none(x.T @ x / len(x), damping)


def lost(weight, quantized, x):
    return float(((weight - quantized.dequantize()) @ x.T).norm())


@covering(
    1,
    sizes=[
        (96, 96, 16, 400),
        (5, 130, 64, 400),  # fewer outputs than inputs, and a last block of 2 columns
        (64, 129, 32, 400),  # an odd row
        (64, 300, 64, 40),  # fewer inputs than columns
        (48, 40, 4096, 400),  # a block longer than the row
    ],
    format=FORMATS,
)
def test_the_output_loses_less_than_by_the_search(sizes, format):
    out, columns, size, rows = sizes
    x = correlated(rows, columns)
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(1))
    technique = FourBit(format, block_size=size, search=True)
    found = quantize_gptq(weight, technique, hessian_of(x))
    assert found.method == "calibrated"
    assert lost(weight, found, x) < 0.75 * lost(weight, technique.store(weight), x)


@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(1, 9),
    st.integers(1, 150),
    st.sampled_from([8, 16, 50, 64]),
    st.sampled_from(["float32", "float16", "double"]),
    st.integers(0, 1000),
)
def test_the_layout_is_that_of_the_search_and_a_repeat_gives_the_same_bytes(format, out, columns, size, scales, seed):
    x = correlated(20, columns, seed)
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    hessian = hessian_of(x)
    technique = FourBit(format, size, scales, search=True)
    one, two = (quantize_gptq(weight, technique, hessian) for _ in range(2))
    assert torch.equal(one.packed, two.packed)
    expected = quantize(weight, format, block_size=size, scales=scales, search=True, importance=hessian.importance)
    assert torch.equal(one.scales, two.scales)
    assert one.stored_layout == expected.stored_layout
    one.check_layout()
    assert torch.isfinite(one.dequantize()).all()
    kept = quantize_gptq(weight, FourBit(format, size, scales, search=False), hessian)
    assert torch.equal(kept.scales, quantize(weight, format, block_size=size, scales=scales, search=False).scales)


@pytest.mark.parametrize("format", FORMATS)
def test_independent_inputs_give_the_nearest_codes(format):
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    independent = prepare_hessian_or_none(torch.eye(33), 0.01)
    found = quantize_gptq(weight, FourBit(format, block_size=8, search=False), independent)
    expected = quantize(weight, format, block_size=8, search=False)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.scales, expected.scales)
    found = quantize_gptq(weight, FourBit(format, block_size=8, search=True), independent)
    expected = quantize(weight, format, block_size=8, search=True)
    assert (weight - found.dequantize()).norm() < (weight - expected.dequantize()).norm()


def hessian_error(weight, quantized, hessian):
    """Return what each row's output loses, by the damped Hessian, in float64: (out,)."""
    back = hessian.order.argsort()
    error, matrix = (weight - quantized.dequantize()).double(), hessian.matrix[back][:, back].double()
    return ((error @ matrix) * error).sum(-1)


@pytest.mark.parametrize("scales", ["float32", "float16", "double", "float16_offsets"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_follows_gptq_lowers_the_error_of_every_row(format, scales, monkeypatch):
    x = correlated(300, 96)
    weight, hessian = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), hessian_of(x)
    technique = FourBit(format, block_size=16, scales=scales, search=True)
    found = quantize_gptq(weight, technique, hessian)
    best = hessian_error(weight, found, hessian)
    with monkeypatch.context() as patch:
        patch.setattr("lowmem.transforms.calibration.gptq_solver._ROUNDS", 0)
        without_scales = hessian_error(weight, quantize_gptq(weight, technique, hessian), hessian)
        patch.setattr(
            "lowmem.transforms.calibration.gptq_solver._GptqOptimizer.improve_codes_by_coordinate_descent",
            lambda self: None,
        )
        gptq_alone = hessian_error(weight, quantize_gptq(weight, technique, hessian), hessian)
    slack = 1e-5 * gptq_alone  # errors are compared in float32
    assert (without_scales <= gptq_alone + slack).all()
    assert (best <= without_scales + slack).all()
    assert without_scales.sum() < 0.99 * gptq_alone.sum()
    assert best.sum() < 0.97 * without_scales.sum()
    if FORMATS[format].signed and not found.has_offsets:  # negative scales are fitted as positive ones are
        assert (quantize_gptq(-weight, technique, hessian).dequantize() == -found.dequantize()).all()


@pytest.mark.parametrize("signed", [False, True])
@given(st.integers(0, 1000), st.sampled_from(["float32", "float16", "double"]))
def test_scales_are_stored_as_the_nearest_there_is(signed, seed, name):
    encoding = get_scale_encoding(name, signed)
    scales = torch.rand(4, 7, generator=torch.Generator().manual_seed(seed)) + 1e-3
    scales *= torch.where(torch.arange(7) % 2 == 1, -1, 1) if signed else 1
    stored = _nearest_encoded_scales(encoding.encode(scales), scales, encoding)
    below, chosen = encoding.decode(encoding.encode(scales)), encoding.decode(stored)
    assert torch.equal(chosen.abs().amax(-1), below.abs().amax(-1))
    step = encoding.encoding_loss_bound(encoding.encode(scales))
    # A row's largest scale stays, and what is next to it; those below the first step are raised to it.
    inner = (below.abs() + step <= below.abs().amax(-1, keepdim=True)) & (below.abs() <= scales.abs())
    off = (scales - chosen).abs()
    assert (off[inner] <= 0.5001 * step[inner] + 1e-7).all()
    assert (off <= (scales - below).abs() + 1e-7).all()


def test_columns_that_are_always_zero_get_their_nearest_codes():
    x = correlated(100, 32)
    x[:, 5:9] = 0
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    found = quantize_gptq(weight, FourBit(block_size=16), hessian_of(x))
    error = (weight - found.dequantize())[:, 5:9].abs()
    scales = found.encoding.decode(found.scales)[:, :1]
    assert (error <= scales * FORMATS["nf4"].half_gap + (weight.abs().amax() - scales).clamp_min(0)).all()


@pytest.mark.parametrize("backend", [*kernels.available_cpu_backend_names()])
def test_the_default_dtype_and_device_change_nothing(backend):
    weight, hessian = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)), hessian_of(correlated(90, 40))
    with kernels.temporary_cpu_backend(backend):
        expected = quantize_gptq(weight, FourBit(), hessian)
        found = []
        for dtype in (torch.float64, torch.bfloat16):
            with default_dtype(dtype):
                found.append(quantize_gptq(weight, FourBit(), hessian))
        with torch.device("meta"):
            found.append(quantize_gptq(weight, FourBit(), hessian))
    for one in found:
        assert torch.equal(one.packed, expected.packed)
        assert torch.equal(one.scales, expected.scales)


@pytest.mark.parametrize("backend", [*kernels.available_cpu_backend_names()])
def test_how_large_inputs_are_changes_nothing(backend):
    x = correlated(90, 40)
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    with kernels.temporary_cpu_backend(backend):
        expected = quantize_gptq(weight, FourBit(), hessian_of(x))
        # Powers of two; the moments of the smallest are 2^-130 and less, which have an inverse beyond float32.
        for size in (2.0**40, 2.0**-40, 2.0**-66):
            found = quantize_gptq(weight, FourBit(), hessian_of(x * size))
            assert lost(weight, found, x) == pytest.approx(lost(weight, expected, x), rel=0.02)


def test_zero_weights_stay_zero():
    found = quantize_gptq(torch.zeros(4, 32), FourBit(), hessian_of(correlated(50, 32)))
    assert not found.dequantize().any()


def test_the_order_is_that_of_what_columns_count():
    hessian = prepare_hessian_or_none(torch.diag(torch.tensor([1.0, 3.0, 0.0, 2.0])), 0.5)
    assert hessian.order.tolist() == [1, 3, 0, 2]
    assert (hessian.importance > 0).all()
    assert torch.equal(hessian.upper, hessian.upper.triu())


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 1000))
def test_upper_is_the_root_of_the_inverse(columns, rows, seed):
    x = correlated(rows, columns, seed).double()
    moments = (x.T @ x / rows).float()
    hessian = prepare_hessian_or_none(moments, 0.01)
    damped = moments[hessian.order][:, hessian.order].double() + 0.01 * float(moments.diagonal().mean()) * torch.eye(
        columns
    )
    upper = hessian.upper.double()
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("moments", [torch.zeros(3, 3), torch.full((3, 3), torch.inf), torch.full((3, 3), torch.nan)])
def test_zero_or_infinite_moments_have_no_hessian(moments):
    assert prepare_hessian_or_none(moments, 0.01) is None


def test_damping_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="damping=1e-30 is too small"):
        prepare_hessian_or_none(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 1e-30)


def test_the_best_format_is_that_with_the_least_weighted_error():
    weight = (torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0)) * 2 - 15) / 15.0
    found = quantize_gptq(weight, FourBit(("nf4", "int4"), scales="float32"), hessian_of(correlated(90, 32)))
    assert found.format == "int4"


@pytest.mark.parametrize("columns", [129, 300])
def test_columns_make_up_for_each_other_across_the_panels_that_are_rounded_together(columns, monkeypatch):
    """Panels are for speed alone: the output loses what it would lose with a single one, but for roundings."""
    x = correlated(400, columns)
    weight, hessian = torch.randn(64, columns, generator=torch.Generator().manual_seed(1)), hessian_of(x)
    in_panels = quantize_gptq(weight, FourBit(search=True), hessian)
    monkeypatch.setattr("lowmem.transforms.calibration.gptq_solver.PANEL", columns)
    at_once = quantize_gptq(weight, FourBit(search=True), hessian)
    assert lost(weight, in_panels, x) == pytest.approx(lost(weight, at_once, x), rel=0.01)
