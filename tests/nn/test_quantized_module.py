"""Modules in 4 or 8 bits: their state_dict names the formats, and another format is an error."""

import collections
import copy
import pickle
import warnings

import pytest
import torch

from lowmem import FourBit, convert
from tests.rounding import OF_4_BITS, assert_product


def make_net(*technique) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(9, 32), torch.nn.Conv1d(6, 6, 1), torch.nn.Linear(32, 8)]
    return convert(torch.nn.Sequential(*layers), *technique)


NF4 = FourBit("nf4", 16, "float16", embeddings="4bit")


def without_formats(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}


def test_a_version_that_says_the_format_loads_and_a_state_that_says_none_warns():
    model, other = make_net(NF4), make_net(NF4)
    before = collections.OrderedDict(without_formats(model.state_dict()))
    before._metadata = model.state_dict()._metadata  # what torch.save keeps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(other.load_state_dict(before))
    wrong = make_net(FourBit("int4", 16, "float16", embeddings="4bit"))
    with pytest.raises(RuntimeError, match="2 stores int4.*; the state holds nf4"):
        wrong.load_state_dict(before)
    with pytest.warns(
        UserWarning, match="how its 4-bit codes are stored: they are taken for nf4, block_size=16.*lowmem.load"
    ):
        assert not any(other.load_state_dict(dict(before)))
    x = torch.randint(9, (2, 6))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    "value", [torch.tensor(1.0), torch.zeros(3), "nf4", torch.tensor([255, 254], dtype=torch.uint8)]
)
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


@pytest.mark.parametrize("name", ["packed", "scales"])
@pytest.mark.parametrize("by_data", [False, True])
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


def test_the_compute_dtype_of_a_layer_is_that_of_its_form():
    layer = convert(torch.nn.Linear(64, 8), FourBit(compute_dtype=torch.bfloat16))
    assert layer.weight.form.compute_dtype is layer.compute_dtype is torch.bfloat16
    layer.compute_dtype = torch.float64
    assert layer.weight.form.compute_dtype is layer.compute_dtype is torch.float64
    assert "compute_dtype" not in vars(layer)
