"""Linear4Bit is nn.Linear with the dequantized weight, and stores 4 bits of it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import FourBit, Half, Linear4Bit, convert, kernels, measure, quantize
from lowmem.nn.techniques import blockwise_technique
from tests import strategies
from tests.rounding import OF_4_BITS, assert_product, assert_sum, stored_weight


@st.composite
def techniques(draw):
    return blockwise_technique(draw(strategies.formats), draw(strategies.small_blocks), draw(strategies.encodings))


@given(
    strategies.linears(),
    st.one_of(techniques(), st.builds(Half, st.sampled_from([torch.float16, torch.bfloat16]))),
    strategies.leading_shapes,
    strategies.seeds,
)
def test_outputs_and_gradients_equal_those_of_the_stored_weight(linear, technique, leading, seed):
    layer = convert(linear, technique)
    weight, more = stored_weight(layer), 0 if isinstance(technique, Half) else OF_4_BITS
    x = strategies.make_input(leading, layer.in_features, seed)
    out = layer(x)
    assert out.dtype == x.dtype
    assert_product(out, x, weight, layer.bias, more=more)
    grad = strategies.make_input(leading, layer.out_features, seed + 1).detach()
    out.backward(grad)
    assert_product(x.grad, grad, weight.t(), more=more)
    if layer.bias is not None and layer.bias.requires_grad:
        rows = grad.reshape(-1, layer.out_features).double()
        assert_sum(layer.bias.grad, rows.sum(0), rows.abs().sum(0), len(rows))


@pytest.mark.parametrize("batch", [1, 64])
def test_no_restored_weight_outlives_its_chunk_forward_or_backward(batch):
    layer = convert(torch.nn.Linear(1024, 4096, bias=False), FourBit())
    x = torch.randn(batch, 1024, requires_grad=True)
    activations = 4 * batch * (1024 + 2 * 4096)
    assert measure.peak_bytes(lambda: layer(x).sum().backward()) <= 2**20 + activations


@given(
    st.one_of(strategies.linears(), strategies.convolutions().map(lambda drawn: drawn[0])),
    techniques(),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_layers_store_what_quantize_gives_or_rounds_and_are_frozen(dense, technique, half):
    bias, rows, count = dense.bias, dense.weight.flatten(1), measure.weight_count(dense)
    rounded = convert(copy.deepcopy(dense), Half(half))
    for name, one in dense.named_parameters():
        assert torch.equal(getattr(rounded, f"{name}_rounded"), one.to(half))
    assert not any(p.requires_grad for p in rounded.parameters())
    q = quantize(rows, technique.format, block_size=technique.block_size, scales=technique.scales)
    layer = convert(dense, technique)
    assert torch.equal(layer.quantized.packed, q.packed)
    assert torch.equal(layer.quantized.scales, q.scales)
    assert layer.bias is bias
    assert layer.weight_count == count
    trains = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trains == (["bias"] if bias is not None and bias.requires_grad else [])
    assert torch.equal(layer.quantized.dequantize(), q.dequantize())
    assert layer.quantized.packed is layer.weight_packed


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("technique", "dtype", "wide"),
    [
        *(
            (FourBit("int4", compute_dtype=one), x, one or x)
            for one in (None, BF16, F64)
            for x in (F32, BF16, F16, F64)
        ),
        *((Half(F16), *dtypes) for dtypes in ((F32, F32), (F16, F16), (BF16, F32))),
        *((Half(BF16), *dtypes) for dtypes in ((F16, F32), (F64, F64))),
    ],
)
def test_output_has_the_input_s_dtype_and_the_technique_decides_that_of_the_product(technique, dtype, wide):
    layer, x = convert(torch.nn.Linear(64, 32), technique), torch.randn(3, 64).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    # The weight, the input, the product, and its sum with the bias may each be rounded to what it is computed in; the
    # output and the bias to the input's dtype.
    rounded = [] if dtype == wide == F64 else [wide, wide, wide, wide, dtype, dtype]
    sums = F64 if wide == F64 else F32
    assert_product(out, x, stored_weight(layer), layer.bias, sums, rounded, OF_4_BITS)


@pytest.mark.parametrize(
    ("compute", "rounds"), [(F16, True), (BF16, True), (F32, False), (F64, False), (None, False)]
)
def test_the_compute_dtype_rounds_the_input_before_the_product(compute, rounds):
    """1 + 2^-12 is 1 in 16 bits, and not in float32; 1e6 is infinite in float16 alone."""
    for dense, ones in (
        (torch.nn.Linear(64, 32), torch.ones(4, 64)),
        (torch.nn.Conv1d(64, 32, 1), torch.ones(64, 4)),
    ):
        layer = convert(dense, FourBit("int4", compute_dtype=compute))
        assert torch.equal(layer(ones * (1 + 2**-12)), layer(ones)) == rounds
        assert bool(layer(ones * 1e6).isfinite().all()) == (compute is not F16)


def test_a_float16_input_is_multiplied_with_weights_beyond_float16():
    layer, x = convert(torch.nn.Linear(8, 3, bias=False), Half(BF16)), torch.full((2, 8), 2.0**-10, dtype=F16)
    layer.weight_rounded.fill_(2.0**20)
    for name in ("reference", kernels.available_cpu_backend_names()[-1]):
        with kernels.temporary_cpu_backend(name):
            for out in (layer(x), torch.nn.functional.linear(x, layer.weight), x @ layer.weight.half().t()):
                assert torch.equal(out, torch.full((2, 3), 2.0**13, dtype=F16))


@pytest.mark.parametrize(
    ("weight", "bias", "error", "said"),
    [
        (torch.ones(8, 8), None, TypeError, "weight=Tensor of shape .* must be what lowmem.quantize returns"),
        (quantize(torch.ones(8, 8)), True, TypeError, "bias=True must be an nn.Parameter or None"),
        (quantize(torch.ones(8, 8)), torch.ones(8), TypeError, "bias=Tensor of shape .* must be an nn.Parameter"),
        (quantize(torch.ones(8, 4)), nn.Parameter(torch.ones(4)), ValueError, r"bias.shape=\(4,\) must be \(8,\)"),
    ],
)
def test_a_layer_made_of_the_wrong_parts_names_them(weight, bias, error, said):
    with pytest.raises(error, match=said):
        Linear4Bit(weight, bias)


def test_a_layer_made_of_its_weight_alone_has_no_bias():
    weight, x = quantize(torch.randn(8, 32)), torch.randn(3, 32)
    assert_product(Linear4Bit(weight)(x), x, weight.dequantize())
