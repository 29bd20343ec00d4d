"""Linear4Bit is nn.Linear with the dequantized weight, and stores 4 bits of it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FourBit, Linear4Bit, convert, measure, quantize
from tests import strategies


@st.composite
def techniques(draw):
    return FourBit(draw(strategies.formats), draw(strategies.small_blocks), draw(strategies.encodings))


def dense_twin(layer: Linear4Bit, dtype: torch.dtype) -> torch.nn.Linear:
    twin = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype)
    with torch.no_grad():
        twin.weight.copy_(layer.quantized.dequantize())
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


@given(strategies.linears(), techniques(), strategies.leading_shapes, strategies.seeds)
def test_outputs_and_gradients_equal_those_of_the_dequantized_weight(linear, technique, leading, seed):
    layer = convert(linear, technique)
    twin = dense_twin(layer, torch.float64)
    x = strategies.make_input(leading, layer.in_features, seed)
    exact = x.detach().double().requires_grad_()
    out, expected = layer(x), twin(exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-4)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad.double(), twin.bias.grad, rtol=1e-5, atol=1e-4)


@given(strategies.linears(torch.float64), techniques())
def test_input_and_bias_gradients_pass_gradcheck_in_float64(linear, technique):
    layer = convert(linear, technique)
    x = strategies.make_input((2,), layer.in_features, 0, torch.float64)
    parameters = [layer.bias] if layer.bias is not None else []
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


@given(strategies.linears(), techniques())
def test_it_stores_what_quantize_gives_and_keeps_the_bias(linear, technique):
    bias = linear.bias
    q = quantize(linear.weight, technique.format, block_size=technique.block_size, scales=technique.scales)
    layer = convert(linear, technique)
    assert torch.equal(layer.packed, q.packed)
    assert torch.equal(layer.scales, q.scales)
    assert layer.bias is bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == (["bias"] if bias is not None else [])
    assert torch.equal(layer.quantized.dequantize(), q.dequantize())
    assert layer.quantized.packed.data_ptr() == layer.packed.data_ptr()


def test_a_frozen_bias_stays_frozen():
    linear = torch.nn.Linear(16, 8).requires_grad_(False)
    assert not convert(linear, FourBit()).bias.requires_grad


@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_input_s_dtype_and_compute_dtype_decides_the_product(dtype, compute):
    layer = convert(torch.nn.Linear(64, 32), FourBit("int4", compute_dtype=compute))
    x = torch.randn(3, 64).to(dtype)
    wide = compute or dtype
    expected = (x.to(wide) @ layer.quantized.dequantize(wide).t()).to(dtype) + layer.bias.to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 if torch.bfloat16 in (dtype, compute) else 1e-3)


def test_autocast_gives_its_dtype_as_for_a_dense_layer():
    layer = convert(torch.nn.Linear(16, 8), FourBit())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(2, 16, requires_grad=True))
        assert out.dtype == torch.nn.Linear(16, 8)(torch.randn(2, 16)).dtype == torch.bfloat16
    out.sum().backward()
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scales", ["float16", "float32", "double"])
def test_casting_the_model_never_changes_a_stored_bit(cast, scales):
    layer = convert(torch.nn.Linear(48, 8), FourBit("nf4", 16, scales))
    packed, stored = layer.packed.clone(), layer.scales.clone()
    layer.to(cast)
    layer.type(cast)  # also casts integers
    assert layer.packed.dtype == torch.uint8
    assert layer.scales.dtype == stored.dtype
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.scales, stored)
    assert layer.bias.dtype == cast
    assert layer(torch.randn(2, 48).to(cast)).dtype == cast


def test_it_moves_copies_and_pickles_like_a_layer():
    layer = convert(torch.nn.Linear(16, 8), FourBit())
    x = torch.randn(3, 16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert layer.to("meta").packed.is_meta
    assert layer(torch.empty(2, 16, device="meta")).shape == (2, 8)
    assert "format=nf4, block_size=64, scales=double" in repr(layer)


def test_state_dict_round_trips_strictly():
    one, two = (convert(torch.nn.Linear(16, 8), FourBit()) for _ in range(2))
    assert set(one.state_dict()) == {"packed", "scales", "bias"}
    two.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(2, 16)
    assert torch.equal(two(x), one(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        two.load_state_dict(torch.nn.Linear(16, 8).state_dict(), strict=True)


@pytest.mark.parametrize("batch", [1, 64])
def test_no_restored_weight_outlives_its_chunk_forward_or_backward(batch):
    layer = convert(torch.nn.Linear(1024, 4096, bias=False), FourBit())
    x = torch.randn(batch, 1024, requires_grad=True)
    activations = 4 * batch * (1024 + 2 * 4096)
    assert measure.peak_bytes(lambda: layer(x).sum().backward()) <= 2**20 + activations


def test_empty_layers_and_batches_work():
    layer = convert(torch.nn.Linear(16, 8), FourBit())
    assert layer(torch.empty(0, 16)).shape == (0, 8)
    assert layer(torch.empty(2, 0, 16)).shape == (2, 0, 8)
    with pytest.warns(UserWarning, match="zero-element"):  # from nn.Linear itself
        linear = torch.nn.Linear(16, 0)
    none = convert(linear, FourBit())
    assert none(torch.randn(3, 16)).shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int3"}, "format='int3' is unknown: choose from int4, nf4, fp4"),
        ({"block_size": 0}, "block_size=0 must be"),
        ({"block_size": -16}, "block_size=-16 must be"),
        ({"block_size": 16.0}, "block_size=16.0 must be an integer"),
        ({"scales": "e4m3"}, "scales='e4m3' is unknown: choose from float32, float16, double"),
        ({"compute_dtype": torch.int16}, "compute_dtype=torch.int16 must be"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype='bfloat16' must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FourBit(**options)
