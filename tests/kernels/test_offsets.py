"""Weights with offsets: w = levels[code] * scale + offset, from quantizing to products, layers and files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowmem
from lowmem import FourBit, kernels, quantize
from lowmem.kernels.cpu import OFFSETS_SCRATCH
from lowmem.kernels.int8_rounding import round_inputs_to_int8_grid, step_count_and_rounded_levels
from lowmem.quant.formats import FORMATS, IMPORTED, get_format
from lowmem.quant.scale_encodings import OFFSETS
from lowmem.quant.scale_search import block_range_offsets, block_sums, least_unclipped_scales
from tests import strategies
from tests.compiled import ISAS, needs_kernel
from tests.rounding import unit

formats = st.sampled_from([*FORMATS, *IMPORTED])
encodings = st.sampled_from(sorted(OFFSETS))


sizes = st.sampled_from([8, 10, 32])


@given(strategies.weights(max_exponent=0), formats, sizes, encodings, st.booleans(), st.booleans())
def test_every_weight_is_within_its_bound_and_bytes_depend_on_values_alone(weight, form, size, scales, search, far):
    weight = weight + 50 * far  # far from zero, where offsets matter
    how = {"block_size": size, "scales": scales, "search": search}
    stored = quantize(weight, form, **how)
    stored.check_layout()
    values = stored.dequantize()
    assert ((weight.double() - values).abs() <= stored.error_bound()).all()
    assert torch.equal(stored.scales, quantize(weight.clone(), form, **how).scales)
    restored = stored.as_matrix().restore(slice(None)).view(values.shape)
    assert torch.equal(values, restored)


def test_a_block_far_from_zero_loses_no_more_than_its_spread():
    """Without offsets its own size counts, not its spread."""
    weight = 100 + torch.rand(8, 64)
    error = {}
    for scales in ("float32", "float32_offsets"):
        stored = quantize(weight, "int4", block_size=32, scales=scales)
        error[scales] = float((weight - stored.dequantize()).abs().max())
    assert error["float32_offsets"] < 1 / 29
    assert error["float32"] > 0.9


def test_offsets_and_scales_bring_both_ends_of_a_block_to_the_end_levels():
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0, -2.0, 0.0, 7.0, 7.0]])
    for form in (*FORMATS.values(), IMPORTED["uint4"]):
        offsets = block_range_offsets(rows, form, 8)
        scales = least_unclipped_scales(rows - offsets, form, 8)
        ends = torch.tensor([form.levels[0], form.levels[-1]]) * scales[0] + offsets[0]
        torch.testing.assert_close(ends, torch.tensor([-2.0, 7.0]), rtol=0, atol=1e-5)


@given(
    st.sampled_from(["int4", "nf4", "bof4s", "uint4", "iq4_nl"]),
    encodings,
    st.sampled_from([8, 10, 16, 32, 64]),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([1, 3, 30, 600]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    strategies.seeds,
)
def test_products_are_those_of_the_weight(form, scales, size, rows, columns, batch, dtype, biased, seed):
    """In every ISA, held against float64: parts are added in float32, and the sum is rounded once to the dtype.

    Kernels of bfloat16 inputs may round a level before an offset is added, as they do without offsets.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + 3 * torch.randn(rows, 1, generator=generator)
    stored = quantize(weight, form, block_size=size, scales=scales)
    dense = stored.dequantize().double()
    offsets = stored.offsets().repeat_interleave(size, -1)[:, :columns].double()
    parts = (dense - offsets).abs() + offsets.abs()  # what is added, before terms cancel
    x, grad = (torch.randn(batch, n, generator=generator).to(dtype) for n in (columns, rows))
    bias = torch.randn(rows, generator=generator) if biased else None
    for name in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            out, back = kernels.linear(x, stored, dtype, bias), kernels.input_grad(grad, stored, dtype)
        if name == "reference" and dtype != torch.float32:
            continue  # it rounds weights to the dtype first
        assert (out.dtype, back.dtype) == (dtype, dtype)
        exact = x.double() @ dense.T + (0 if bias is None else bias.double())
        sizes = x.double().abs() @ parts.T + (0 if bias is None else bias.double().abs())
        allowed = bound(sizes, exact, columns, dtype) + rounding_in(name, x, dense - offsets)
        assert ((out.double() - exact).abs() <= allowed).all()
        exact, sizes = grad.double() @ dense, grad.double().abs() @ parts
        assert ((back.double() - exact).abs() <= bound(sizes, exact, rows, dtype)).all()


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_of_wide_inputs_are_added_once(batch, dtype):
    """Where an input has more than 49,152 numbers, it is packed in parts of its columns."""
    rows, columns = 5, 49152 // batch + 300
    generator = torch.Generator().manual_seed(0)
    stored = quantize(
        torch.randn(rows, columns, generator=generator) + 3, "int4", block_size=32, scales="float16_offsets"
    )
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    dense, offsets = stored.dequantize().double(), stored.offsets().repeat_interleave(32, -1)[:, :columns].double()
    sizes, exact = x.double().abs() @ ((dense - offsets).abs() + offsets.abs()).T, x.double() @ dense.T
    for name in kernels.available_cpu_backend_names()[1:]:
        with kernels.temporary_cpu_backend(name):
            out = kernels.linear(x, stored, dtype)
        allowed = bound(sizes, exact, columns, dtype) + rounding_in(name, x, dense - offsets)
        assert ((out.double() - exact).abs() <= allowed).all()


def rounding_in(isa, x, without_offsets):
    """What levels in bfloat16, or inputs of 14 bits, change of a product, at an ISA that has them for few inputs."""
    if x.dtype != torch.bfloat16 or isa not in ("avx2", "avxvnni", "avx512bf16", "avx512amx"):
        return 0
    inputs, weights = x.double().abs(), without_offsets.abs().T
    of_levels, of_inputs = unit(x.dtype) * inputs @ weights, 2.0**-14 * inputs.amax(1, keepdim=True) * weights.sum(0)
    return (1 + unit(x.dtype)) * (of_levels + of_inputs)


def bound(sizes, exact, terms, dtype):
    sums = (2 * terms + 8) * unit(torch.float32) * sizes
    return sums + unit(dtype) * (exact.abs() + sums) + (2.0**-24 if dtype == torch.float16 else 2.0**-126)


@given(
    st.sampled_from(["int4", "nf4", "uint4"]),
    st.sampled_from([8, 10, 32, 64]),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([1, 3, 30]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strategies.seeds,
)
def test_products_in_8_bit_integers_round_what_offsets_do_not_touch(form, size, rows, columns, batch, dtype, seed):
    """Inputs and levels are rounded in the product without offsets; sums of inputs times offsets are exact."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + 30 * torch.randn(rows, 1, generator=generator)
    stored = quantize(weight, form, block_size=size, scales="float16_offsets")
    x, bias = torch.randn(batch, columns, generator=generator).to(dtype), torch.randn(rows, generator=generator)
    base = (
        stored.without_offsets()
        .restore(slice(None), step_count_and_rounded_levels(get_format(form).levels)[1])
        .double()
    )
    offsets = stored.offsets().repeat_interleave(size, -1)[:, :columns].double()
    rounded = round_inputs_to_int8_grid(x, size).double()
    exact = rounded @ base.T + x.double() @ offsets.T + bias.double()
    sizes = rounded.abs() @ base.abs().T + x.double().abs() @ offsets.abs().T + bias.double().abs()
    for name in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            out = kernels.linear(x, stored, torch.int8, bias)
        assert out.dtype == dtype
        assert ((out.double() - exact).abs() <= bound(sizes, exact, columns, dtype)).all()


@needs_kernel
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_c_adds_offsets_to_few_products_in_8_bit_integers(size, monkeypatch):
    """Also of wide inputs, which are packed in parts of their columns: else each token took several times as long."""
    columns = 49152 // 4 + 300
    stored = quantize(torch.randn(20, columns) + 3, "int4", block_size=size, scales="float16_offsets")
    x, bias = torch.randn(8, columns), torch.randn(20)
    offsets = stored.offsets().repeat_interleave(size, -1)[:, :columns]
    parts = (stored.dequantize().abs() + 2 * offsets.abs()).double()
    for name in kernels.available_cpu_backend_names()[1:]:
        with kernels.temporary_cpu_backend(name):
            kernel = kernels.backend_for()
            for batch in (1, 3, 8):
                expected = kernel._product_with_offsets_or_none(x[:batch], stored, torch.int8, False, bias)
                with monkeypatch.context() as patch:
                    patch.delattr(type(kernel), "_product_with_offsets_or_none")
                    got = kernels.linear(x[:batch], stored, torch.int8, bias)
                sizes = x[:batch].double().abs() @ parts.T + bias.abs()
                allowed = 2 * bound(sizes, expected.double(), columns, torch.float32)
                assert ((got.double() - expected).abs() <= allowed).all()


@pytest.mark.thorough
@needs_kernel
def test_products_take_no_more_scratch_than_is_said():
    stored = quantize(torch.randn(1024, 2048) + 1, "int4", block_size=8, scales="float16_offsets")
    with kernels.temporary_cpu_backend(ISAS[-1]):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            given = torch.float32 if dtype == torch.int8 else dtype
            x, grad = torch.randn(4000, 2048).to(given), torch.randn(4000, 1024).to(given)
            kernels.linear(x[:2], stored, dtype)
            with lowmem.measure.PeakMemory() as peak:
                kernels.linear(x, stored, dtype)
            assert peak.peak - 4000 * 1024 * given.itemsize <= OFFSETS_SCRATCH
            if dtype != torch.int8:
                kernels.input_grad(grad[:2], stored, dtype)
                with lowmem.measure.PeakMemory() as peak:
                    kernels.input_grad(grad, stored, dtype)
                assert peak.peak - 4000 * 2048 * given.itemsize <= OFFSETS_SCRATCH


@needs_kernel
def test_explain_says_that_offsets_are_added():
    stored = quantize(torch.randn(8, 64), "int4", scales="float16_offsets")
    with kernels.temporary_cpu_backend(ISAS[-1]):
        text = kernels.explain(stored, 4)
        assert text.startswith("linear: few")
        assert "offsets: added in plain torch, to products in float32 without them:\ninput_grad:" in text
        text = kernels.explain(stored, 64)
        assert text.startswith("offsets: added in plain torch, to products in float32 without them:\nlinear:")
        assert kernels.explain(stored, 4, torch.int8).startswith("linear_inputs8: few_inputs8")
        text = kernels.explain(stored, 64, torch.int8)
    assert text.startswith("offsets: added in plain torch, to products in 8-bit integers")
    assert "linear_inputs8: tiled_inputs8" in text


def test_block_sums_of_a_row_that_ends_in_a_short_block():
    assert block_sums(torch.arange(10.0)[None], 4).tolist() == [[6.0, 22.0, 17.0]]


def test_the_technique_names_its_encoding_and_refuses_scales_without_offsets():
    assert FourBit("int4", offsets=True) == FourBit("int4", scales="float16_offsets")
    assert FourBit("int4", scales="float32", offsets=True).scales == "float32_offsets"
    assert FourBit("nf4", scales="float16_offsets").offsets
    with pytest.raises(ValueError, match="scales='double' has no offsets"):
        FourBit("nf4", scales="double", offsets=True)


OFFSET = FourBit("int4", block_size=8, offsets=True, embeddings="4bit")


def test_calibrating_and_gptq_take_offsets_into_account():
    weight, x = torch.randn(24, 32) + 0.5, torch.randn(400, 32) @ torch.randn(32, 32)
    layer = nn.Linear(32, 24, bias=False)
    layer.weight.data = weight
    plain = quantize(weight, "int4", block_size=8, scales="float16_offsets").dequantize()
    calibrated = lowmem.calibrate(nn.Sequential(layer), [x], technique=OFFSET)[0].quantized
    assert calibrated.has_offsets
    lost = [float(((weight - stored) @ x.T).norm()) for stored in (calibrated.dequantize(), plain)]
    assert lost[0] < lost[1]
