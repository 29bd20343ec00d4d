"""Linear4Bit is nn.Linear with the dequantized weight, and stores 4 bits of it."""

import collections
import copy
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import Conv4Bit, FourBit, convert, measure, quantize
from lowmem.nn.techniques import blockwise
from tests import strategies
from tests.rounding import OF_4_BITS, assert_product, assert_sum
from tests.selection import rows_in_one_case


@st.composite
def techniques(draw):
    return blockwise(draw(strategies.formats), draw(strategies.small_blocks), draw(strategies.encodings))


@given(strategies.linears(), techniques(), strategies.leading_shapes, strategies.seeds)
def test_outputs_and_gradients_equal_those_of_the_dequantized_weight(linear, technique, leading, seed):
    layer = convert(linear, technique)
    weight = layer.quantized.dequantize()
    x = strategies.make_input(leading, layer.in_features, seed)
    out = layer(x)
    assert_product(out, x, weight, layer.bias, more=OF_4_BITS)
    grad = strategies.make_input(leading, layer.out_features, seed + 1).detach()
    out.backward(grad)
    assert_product(x.grad, grad, weight.t(), more=OF_4_BITS)
    if layer.bias is not None:
        rows = grad.reshape(-1, layer.out_features).double()
        assert_sum(layer.bias.grad, rows.sum(0), rows.abs().sum(0), len(rows))


@given(strategies.linears(torch.float64, strategies.GRADCHECKED), techniques())
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


@rows_in_one_case("compute", [None, torch.bfloat16, torch.float64])
@rows_in_one_case("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_input_s_dtype_and_compute_dtype_decides_the_product(dtype, compute):
    layer = convert(torch.nn.Linear(64, 32), FourBit("int4", compute_dtype=compute))
    x = torch.randn(3, 64).to(dtype)
    wide = compute or dtype
    out = layer(x)
    assert out.dtype == dtype
    # The weight, the input, the product, and its sum with the bias may each be rounded to what it is computed in; the
    # output and the bias to the input's dtype.
    rounded = [] if dtype == wide == torch.float64 else [wide, wide, wide, wide, dtype, dtype]
    sums = torch.float64 if wide == torch.float64 else torch.float32
    assert_product(out, x, layer.quantized.dequantize(), layer.bias, sums, rounded, OF_4_BITS)


@rows_in_one_case(
    ("compute", "rounds"),
    [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False), (torch.float64, False), (None, False)],
)
@rows_in_one_case("layer", [torch.nn.Linear(64, 32), torch.nn.Conv1d(64, 32, 1)])
def test_the_compute_dtype_rounds_the_input_before_the_product(layer, compute, rounds):
    """1 + 2^-12 is 1 in 16 bits, and not in float32; 1e6 is infinite in float16 alone."""
    layer = convert(copy.deepcopy(layer), FourBit("int4", compute_dtype=compute))
    ones = torch.ones(64, 4) if isinstance(layer, Conv4Bit) else torch.ones(4, 64)
    assert torch.equal(layer(ones * (1 + 2**-12)), layer(ones)) == rounds
    assert bool(layer(ones * 1e6).isfinite().all()) == (compute is not torch.float16)


def test_autocast_gives_its_dtype_as_for_a_dense_layer():
    layer = convert(torch.nn.Linear(16, 8), FourBit())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(2, 16, requires_grad=True))
        assert out.dtype == torch.nn.Linear(16, 8)(torch.randn(2, 16)).dtype == torch.bfloat16
    out.sum().backward()
    assert layer.bias.grad.dtype == torch.float32


@rows_in_one_case("cast", [torch.float16, torch.bfloat16, torch.float64])
@rows_in_one_case("scales", ["float16", "float32", "double"])
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
    assert "stored in bof4s, block_size=32, scales=double" in repr(layer)


def test_state_dict_round_trips_strictly():
    one, two = (convert(torch.nn.Linear(16, 8), FourBit()) for _ in range(2))
    assert set(one.state_dict()) == {"weight_packed", "weight_scales", "bias", "_extra_state"}
    two.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(2, 16)
    assert torch.equal(two(x), one(x))
    with pytest.raises(
        RuntimeError, match="weight is dense in the state, and stored in bof4s.*load it before convert"
    ):
        two.load_state_dict(torch.nn.Linear(16, 8).state_dict(), strict=True)


def make_net(*technique) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(9, 32), torch.nn.Conv1d(6, 6, 1), torch.nn.Linear(32, 8)]
    return convert(torch.nn.Sequential(*layers), *technique)


NF4 = FourBit("nf4", 16, "float16", embeddings="4bit")
OTHERS = {
    "format": FourBit("int4", 16, "float16", embeddings="4bit"),
    "block size": FourBit(
        "nf4", 32, "float16", embeddings="4bit"
    ),  # scales of another shape, for the embedding and the linear layer
    "encoding": FourBit("nf4", 16, "float32", embeddings="4bit"),
}


def through_safetensors(state: dict) -> dict:
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


def through_a_plain_dict(state: dict) -> dict:
    return {name: tensor.clone() for name, tensor in state.items()}


@rows_in_one_case("way", [through_safetensors, through_a_plain_dict])
@rows_in_one_case("assign", [False, True])
@rows_in_one_case("other", sorted(OTHERS))
def test_a_plain_dict_of_tensors_says_the_format_and_another_one_is_refused(way, assign, other):
    model, same, wrong = make_net(NF4), make_net(NF4), make_net(OTHERS[other])
    x = torch.randint(9, (2, 6))
    state = way(model.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(same.load_state_dict(state, assign=assign))  # no key is missing, none unexpected
        with torch.no_grad():
            assert torch.equal(same(x), model(x))
        before = copy.deepcopy(wrong.state_dict())
        stored = "int4, block_size=16" if other == "format" else "nf4, block_size="
        with pytest.raises(
            RuntimeError, match=f"2 stores {stored}.*; the state holds nf4, block_size=16, scales=float16"
        ):
            wrong.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, before[name]) for name, value in wrong.state_dict().items())


def without_formats(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}


def test_a_state_of_before_loads_and_one_that_says_no_format_warns():
    model, other = make_net(NF4), make_net(NF4)
    before = collections.OrderedDict(without_formats(model.state_dict()))
    before._metadata = model.state_dict()._metadata  # what torch.save keeps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(other.load_state_dict(before))
    wrong = make_net(OTHERS["format"])
    with pytest.raises(RuntimeError, match="2 stores int4.*; the state holds nf4"):
        wrong.load_state_dict(before)
    with pytest.warns(
        UserWarning, match="how its 4-bit codes are stored: they are taken for nf4, block_size=16.*lowmem.load"
    ):
        assert not any(other.load_state_dict(dict(before)))
    x = torch.randint(9, (2, 6))
    assert torch.equal(other(x), model(x))


@rows_in_one_case("value", [torch.tensor(1.0), torch.zeros(3), "nf4", torch.tensor([255, 254], dtype=torch.uint8)])
def test_a_format_that_is_none_is_refused(value):
    model = make_net(NF4)
    with pytest.raises(RuntimeError, match="2 stores nf4.*; the state holds"):
        model.load_state_dict({**model.state_dict(), "2._extra_state": value})


def test_the_format_in_a_state_is_neither_a_parameter_nor_a_buffer():
    model = make_net(NF4)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert [name for name in model.state_dict() if name not in names] == [f"{i}._extra_state" for i in range(3)]
    with torch.device("meta"):
        assert bytes(model[2].get_extra_state().tolist()) == b"nf4, block_size=16, scales=float16"
    x = torch.randint(9, (2, 6))
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), model(x))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), x), model(x))


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
        linear = torch.nn.Linear(8, 0)  # which has nothing to store
    model = convert(torch.nn.Sequential(torch.nn.Linear(16, 8), linear), FourBit())
    assert model[1] is linear
    assert model(torch.randn(3, 16)).shape == (3, 0)


def test_a_state_without_values_loads_as_its_version_says():
    layer = convert(torch.nn.Linear(32, 8), FourBit())
    state = layer.state_dict()
    empty = collections.OrderedDict((name, value.to("meta")) for name, value in state.items())
    empty._metadata = state._metadata
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(torch.nn.Linear(32, 8), FourBit()).load_state_dict(empty, assign=True)
    with pytest.raises(RuntimeError, match=r"stores int4.*the state holds bof4s"):
        convert(torch.nn.Linear(32, 8), FourBit("int4")).load_state_dict(empty, assign=True)


def test_what_a_functional_call_puts_in_place_is_not_kept():
    layer = convert(torch.nn.Linear(32, 8), FourBit())
    other = {name: value.detach().clone() for name, value in layer.named_parameters()}
    torch.func.functional_call(layer, other, (torch.randn(2, 32),))
    assert layer.quantized.packed is layer.weight_packed is not other["weight_packed"]
    assert layer.weight.packed is layer.weight_packed


@rows_in_one_case("name", ["packed", "scales"])
@rows_in_one_case("by_data", [False, True])
def test_what_takes_the_place_of_one_stored_tensor_is_read(name, by_data):
    layer = convert(torch.nn.Linear(16, 8), FourBit("int4"))
    x = torch.randn(2, 16)
    layer(x), layer.weight.dequantize()
    own = getattr(layer, f"weight_{name}")
    assert getattr(layer.quantized, name).data_ptr() == own.data_ptr()
    other = torch.nn.Parameter(torch.ones_like(own), requires_grad=False)
    if by_data:
        own.data = other.data
    else:
        setattr(layer, f"weight_{name}", other)
    assert getattr(layer.quantized, name).data_ptr() == other.data_ptr()
    expected = layer.quantized.dequantize()
    assert torch.equal(layer.weight.dequantize(), expected)
    assert_product(layer(x), x, expected, layer.bias, more=OF_4_BITS)
