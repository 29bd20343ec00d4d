"""Classes that are made at run time, and modules that change their class."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from lowmem import EightBit, FourBit, Half, LoRA, convert, prepare_training, release_training, restore
from lowmem.nn.adapted_module import AdaptedModule, adapted_module_class
from lowmem.nn.module_class import (
    change_class_and_attributes,
    derived_class,
    hookless_shallow_copy,
    replace_class_and_parameters,
)
from lowmem.nn.module_copy import stored_module_class
from lowmem.nn.stored_module import StoredModule
from lowmem.training.prepared_module import PreparedModule


class Base(nn.Module):
    def answer(self):
        return ["base", *super().answer()]


class Behind(nn.Linear):
    def answer(self):
        return ["behind"]


class Owner:
    class Inner(nn.Linear):
        """A class inside another one."""

        def answer(self):
            return ["own", *super().answer()]


def test_a_class_is_made_once_under_the_name_of_the_modules_class():
    made = derived_class(Owner.Inner, Base, Behind, bits=4)
    assert made is derived_class(Owner.Inner, Base, Behind, bits=4)
    assert made is not derived_class(Owner.Inner, Base, Behind, bits=8)
    names = "__name__", "__qualname__", "__module__", "__doc__"
    assert [getattr(made, name) for name in names] == [getattr(Owner.Inner, name) for name in names]
    assert made(2, 2).answer() == ["base", "own", "behind"]
    assert made.bits == 4
    assert derived_class(Owner.Inner).__bases__ == (Owner.Inner,)


NAMES = "module_class", "base", "behind", "module", "attributes", "kind"


@pytest.mark.parametrize(
    "derive",
    [lambda: stored_module_class(nn.Module, NAMES, 4), lambda: adapted_module_class(nn.Module, NAMES)],
    ids=["stored", "adapted"],
)
def test_parameters_may_have_the_names_of_arguments(derive):
    made = derive()
    assert {*NAMES} <= {*vars(made)}
    assert made is derive()


class Slots(nn.Module):
    __slots__ = ("factor",)


def attributes(module):
    return type(module), {**vars(module)}


def test_a_class_that_python_refuses_leaves_the_module_as_it_was():
    module = nn.Linear(2, 2)
    before = attributes(module)
    with pytest.raises(TypeError, match="layout"):
        change_class_and_attributes(module, Slots, {**vars(module), "added": 1, "_parameters": {}})
    assert attributes(module) == before
    with pytest.raises(TypeError, match="layout"):
        replace_class_and_parameters(module, hookless_shallow_copy(Slots(), Slots))
    assert attributes(module) == before


def test_the_dictionary_of_attributes_stays_the_same_one():
    """Blocks of ``prepare_inference`` watch it."""
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    held = {module: vars(module) for module in model.modules()}
    convert(model, FourBit(), LoRA(2))
    prepare_training(model, "lean")
    assert all(vars(module) is held[module] for module in held)
    restore(release_training(model))
    assert all(vars(module) is held[module] for module in held)


def test_a_module_is_given_back_as_it_was():
    module = nn.Linear(2, 2)
    before = attributes(module)
    own, parameters = vars(module), module._parameters
    change_class_and_attributes(module, Behind)
    assert attributes(module) == (Behind, before[1])
    change_class_and_attributes(module, Base, {"training": False, "_parameters": {}})
    assert not isinstance(module, nn.Linear)
    assert vars(module) == {"training": False, "_parameters": {}}
    change_class_and_attributes(module, *before)
    assert attributes(module) == before
    assert vars(module) is own
    assert module._parameters is parameters


class Loose(nn.Linear):
    """Sets all attributes itself, as classes do that speed this up."""

    def __setattr__(self, name, value):
        if "bias" in self.__dict__.get("_parameters", ()):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class Strict(nn.Linear):
    """Refuses attributes that it does not know."""

    def __setattr__(self, name, value):
        if "bias" in self.__dict__.get("_parameters", ()) and name not in {*vars(self), "weight_error"}:
            raise AttributeError(f"{name} is not known")
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [Loose, Strict])
@pytest.mark.parametrize("technique", [Half(), FourBit(), LoRA(2)], ids=str)
def test_a_class_with_a_setattr_of_its_own_changes(kind, technique):
    model, x = nn.Sequential(kind(32, 32)), torch.randn(2, 32)
    dense = model(x)
    convert(model, technique)
    assert isinstance(model[0], AdaptedModule if isinstance(technique, LoRA) else StoredModule)
    assert (model(x) - dense).norm() < 0.2 * dense.norm()
    if not isinstance(technique, LoRA):
        assert type(restore(model)[0]) is kind


@pytest.mark.parametrize("kind", [Loose, Strict])
def test_a_class_with_a_setattr_of_its_own_is_prepared_and_released(kind):
    class Model(kind):
        pass

    model = Model(8, 8)
    prepare_training(model, "lean")
    assert isinstance(model, PreparedModule)
    release_training(model)
    assert type(model) is Model


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Outer:
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)


LAYERS = {
    "Linear": lambda: nn.Linear(32, 32),
    "a subclass": lambda: Twice(32, 32),
    "a subclass in a class": lambda: Outer.Twice(32, 32),
    "Conv2d": lambda: nn.Conv2d(4, 8, 3),
    "Embedding": lambda: nn.Embedding(8, 32),
    "EmbeddingBag": lambda: nn.EmbeddingBag(8, 32),
    "LSTM": lambda: nn.LSTM(32, 32),
    "MultiheadAttention": lambda: nn.MultiheadAttention(32, 2),
}
CHANGES = {
    "stored in 4 bits": [FourBit()],
    "stored in 8 bits": [EightBit()],
    "stored in 16 bits": [Half()],
    "adapted": [LoRA(2)],
    "adapted over 4 bits": [FourBit(), LoRA(2)],
    "adapted over 16 bits": [Half(), LoRA(2)],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_names_of_classes_and_of_their_bases_name_things_that_exist(layer, change):
    model = LAYERS[layer]()
    for technique in CHANGES[change]:
        convert(model, technique, where=lambda path, module: True)
    changed = [module for module in model.modules() if isinstance(module, StoredModule | AdaptedModule)]
    prepare_training(model, "lean") if isinstance(CHANGES[change][-1], LoRA) else None
    for module in (*changed, model):
        kinds = type(module).__mro__
        for kind in kinds:
            thing = sys.modules[kind.__module__]
            for name in kind.__qualname__.split("."):
                thing = getattr(thing, name)
            assert thing in kinds
            assert kind.__name__ == thing.__name__
    assert changed != []


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_copies_and_pickles_have_the_same_class(layer, change):
    model = LAYERS[layer]()
    for technique in CHANGES[change]:
        convert(model, technique, where=lambda path, module: True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(map(type, twin.modules())) == list(map(type, model.modules()))
        assert list(twin.state_dict()) == list(model.state_dict())
