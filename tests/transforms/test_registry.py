"""Which layers are taken, and why others are not."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lowmem import FourBit, Half, LoRA, convert
from lowmem.transforms.registry import MADE_BY, REGISTRY, module_paths, parameter_owners, select_modules, skip_reason


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(("technique", "kind"), REGISTRY)
def test_every_kind_of_layer_in_the_registry_says_what_makes_it(technique, kind):
    made = REGISTRY[technique, kind]
    assert MADE_BY[made] is technique
    assert callable(made.from_layer)


@pytest.mark.parametrize(("technique", "kind"), [key for key in REGISTRY if key[0] is not LoRA])
def test_a_layer_made_without_a_store_holds_what_its_technique_stores(technique, kind):
    sizes = {nn.Linear: (40, 6), nn.Embedding: (6, 40), nn.Conv1d: (8, 6, 3), nn.Conv2d: (4, 6, 3)}
    dense = kind(*sizes[kind])
    expected = convert(copy.deepcopy(dense), technique())
    made = REGISTRY[technique, kind].from_layer(dense, technique())
    assert type(made) is type(expected)
    state = made.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in expected.state_dict().items()
    }
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(4, 4), None),
        (nn.Embedding(4, 4), None),
        (Subclass(4, 4), "a subclass of Linear"),
        (nn.LayerNorm(4), "FourBit has no form of it"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "computed by a parametrization"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_left_alone_has_a_reason(module, reason):
    found = skip_reason(FourBit, module)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


@pytest.mark.parametrize(("technique", "kind"), REGISTRY)
def test_what_replaces_a_layer_is_called_as_it_is(technique, kind):
    """Models call layers by keyword, too."""
    names = [list(inspect.signature(form.forward).parameters) for form in (REGISTRY[technique, kind], kind)]
    assert names[0] == names[1]


def test_a_layer_with_tensors_of_its_own_has_a_reason():
    layer = nn.Linear(4, 4)
    layer.register_buffer("mask", torch.ones(4))
    assert "mask" in skip_reason(Half, layer)
    assert skip_reason(LoRA, nn.Embedding(4, 4)) == "LoRA has no form of it"


def test_module_paths_and_parameter_owners_know_every_path():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    model["c"].weight = shared.weight
    assert module_paths(model)[shared] == ["a", "b.0"]
    assert [path for _, path in parameter_owners(model)[id(shared.weight)]] == ["a", "c"]
    assert list(select_modules(model, None, "b*").values()) == ["", "c"]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        module_paths([shared])


def test_a_layer_whose_bias_is_no_parameter_of_its_own_is_left_alone():
    layer = nn.Linear(8, 4)
    bias = layer.bias.detach()
    del layer.bias
    layer.bias = bias  # a plain tensor, as a hook would put there before each call
    for technique in (Half, FourBit, LoRA):
        assert skip_reason(technique, layer) == "its weight or bias is computed from, or comes with, something else"
