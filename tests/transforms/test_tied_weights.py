"""Modules that share a parameter are stored together, or stay dense together."""

import copy

import pytest
import torch
from torch import nn

from lowmem import FourBit, Half, HalfLinear, Linear4Bit, LoRA, StoredTensor, convert, load, measure, save
from lowmem.nn.adapter_bank import unadapted_parameter
from tests.refusing import refused
from tests.test_any_model import Tied
from tests.transforms.models import EVERY, SharedBias, dense_twin, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # which has its own test


@pytest.mark.parametrize("techniques", EVERY)
def test_tied_weights_stay_tied(techniques):
    dense, untied = Tied(), Tied()
    untied.head.weight = nn.Parameter(untied.tokens.weight.detach().clone())
    everywhere = {"where": lambda *_: True}  # adapters over both ends, too
    model = convert(copy.deepcopy(dense), *techniques, **everywhere)
    for one in (model, copy.deepcopy(model)):
        assert all(a is b for a, b in zip(tensors_of(one.tokens), tensors_of(one.head), strict=True))
    torch.testing.assert_close(model(torch.arange(50)), dense_twin(dense, model)(torch.arange(50)))
    convert(untied, *techniques, **everywhere)
    once = sum(t.numel() * t.element_size() for t in tensors_of(untied.head))
    assert measure.theoretical_bytes(model) == measure.theoretical_bytes(untied) - once
    assert measure.weight_count(model) == measure.weight_count(dense)
    twin = convert(Tied(), *techniques, **everywhere)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(torch.arange(50)), model(torch.arange(50)))
    assert tensors_of(twin.tokens)[0] is tensors_of(twin.head)[0]


@pytest.mark.parametrize("techniques", EVERY)
@pytest.mark.parametrize("skip", ["tokens", "head"])
def test_tied_weights_are_left_alone_together(techniques, skip):
    model = convert(Tied(), *techniques, skip=skip)
    assert (type(model.tokens), type(model.head)) == (nn.Embedding, nn.Linear)
    assert model.tokens.weight is model.head.weight
    assert type(model.mix) is not nn.Linear


def test_an_adapter_over_a_tied_layer_leaves_the_tie():
    model = convert(Tied(), LoRA(2), where=lambda path, _: path == "head")
    assert unadapted_parameter(model.head, "weight") is model.tokens.weight
    model.more = nn.Linear(4, 4)
    convert(model, FourBit())
    assert type(model.more) is Linear4Bit
    assert type(model.tokens) is nn.Embedding  # the adapted layer holds its weight


@pytest.mark.parametrize("techniques", EVERY)
def test_a_tie_with_a_layer_that_another_tie_leaves_is_left_alone(techniques):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_parameter("own", model[0].weight)  # held by the model itself
    model[0].register_parameter("other", model[1].weight)
    convert(model, *techniques)
    assert [type(layer) is nn.Linear for layer in model] == [True, True, False]


def test_weights_that_are_parts_of_one_storage_are_two_weights():
    for starts in (0, 4), (4, 0), (0, 8), (8, 0):  # side by side or apart, in either order
        whole = torch.randn(12, 16)
        parts = [whole[start : start + 4] for start in starts]
        layers = [torch.nn.Linear(16, 4, bias=False) for _ in parts]
        for layer, part in zip(layers, parts, strict=True):
            layer.weight = torch.nn.Parameter(part)
        model = convert(torch.nn.Sequential(*layers), Half())
        for layer, part in zip(model, parts, strict=True):
            assert torch.equal(layer.weight, part.half())


def test_a_weight_that_is_a_view_of_another_is_refused():
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(16, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:4])
    with refused(model, ValueError, "1 and 0 are views of one tensor: .*clone"):
        convert(model, FourBit())
    norm = nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(16))  # it stays dense, and all bytes with it
    norm[1].weight = nn.Parameter(norm[0].weight.detach()[0])
    with refused(norm, ValueError, "1 and 0 are views of one tensor: .*clone"):
        convert(norm, FourBit())
    flat = torch.randn(16 * 8 + 16)  # views that do not overlap are independent
    norm[0].weight, norm[1].weight = nn.Parameter(flat[:128].view(8, 16)), nn.Parameter(flat[128:])
    convert(norm, FourBit())


def test_a_weight_in_the_memory_of_one_that_stays_dense_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())  # tied in memory, by two parameters
    with pytest.raises(ValueError, match="b and a are views of one tensor"):
        convert(model, FourBit(), skip="b")
    assert convert(model, FourBit())["a"].quantized is model["b"].quantized


@pytest.mark.parametrize("techniques", [(Half(torch.bfloat16),), (Half(torch.bfloat16), LoRA(2))])
def test_a_bias_that_a_dense_module_has_too_stays_that_module_s(techniques, tmp_path):
    dense = SharedBias()
    model = convert(copy.deepcopy(dense), *techniques)
    layer = model.a
    assert isinstance(layer, HalfLinear)
    assert layer.bias is model.norm.bias
    assert layer.bias.dtype == torch.float32
    assert layer.weight_error is not None
    assert model.b.bias is model.c.bias
    assert isinstance(model.b.bias, StoredTensor)
    x = torch.randn(3, 8)
    assert (model(x) - dense(x)).norm() < 0.05 * dense(x).norm()
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", SharedBias)
    assert torch.equal(loaded(x), model(x))
    assert loaded.a.bias is loaded.norm.bias
    assert model(x.bfloat16()).dtype == torch.bfloat16 or techniques[1:]  # adapters stay float32
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
