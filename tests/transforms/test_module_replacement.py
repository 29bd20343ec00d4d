"""Modules stay the objects that they were, and another thread's changes are seen."""

import copy
import os
import signal
import sys
import threading
from types import MappingProxyType, ModuleType

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FourBit, Half, Linear4Bit, LoRA, LoRALinear, add_adapter, convert
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms import converted_copies as store_module
from lowmem.transforms import module_replacement as commit_module
from lowmem.transforms.module_replacement import commit_replacements_and_freeze_if_adapted
from tests.transforms.models import Odd
from tests.transforms.test_named_adapters import make_adapted

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # which has its own test


def test_a_layer_that_left_the_model_is_not_replaced():
    kept, gone = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(kept)
    with pytest.raises(RuntimeError, match="^a Linear to convert left Sequential meanwhile"):
        commit_replacements_and_freeze_if_adapted(
            model, {layer: convert(copy.deepcopy(layer), Half()) for layer in (kept, gone)}
        )
    assert type(model[0]) is torch.nn.Linear


def test_a_module_converted_in_place_stays_the_object_that_others_hold():
    model = Odd()
    held = [model.shared, model.list[0], model.inner[0][0]]
    calls = []
    held[0].register_forward_hook(lambda module, *_: calls.append(type(module)))
    assert convert(model, FourBit()) is model
    assert [model.shared, model.list[0], model.inner[0][0]] == held
    model(torch.ones(2, 8))
    assert calls == [Linear4Bit] * 3


def test_convert_refuses_a_model_that_another_thread_has_adapted_meanwhile(monkeypatch):
    model, store = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), store_module.copy_with_stored_parameters

    def adapting(*args):
        if type(model[1]) is nn.Linear:
            thread = threading.Thread(target=lambda: add_adapter(model, "one", LoRA(2), skip="0"))
            thread.start()
            thread.join()
        return store(*args)

    monkeypatch.setattr(store_module, "copy_with_stored_parameters", adapting)
    with pytest.raises(RuntimeError, match="another thread has converted a Linear of Sequential"):
        convert(model, FourBit())
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], LoRALinear)
    assert not isinstance(model[1], Linear4Bit)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_was_forked_while_another_thread_changed_a_model_can_read_one():
    model, held, done = make_adapted("a"), threading.Event(), threading.Event()

    def change():
        with commit_module._LOCK:
            held.set()
            done.wait()

    thread = threading.Thread(target=change)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a child that waits for ever
        os._exit(0 if lowmem.adapter_names(model) == ["a"] else 1)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0


@pytest.fixture
def of_some_library(monkeypatch):
    """Return a model that holds a module of a library called ``some_library``."""
    kind = type("Layer", (nn.Linear,), {"__module__": "some_library.layers"})
    monkeypatch.setattr(
        commit_module, "INTEGRATIONS", MappingProxyType({"some_library": "some_integration", "absent": "nothing"})
    )
    monkeypatch.setitem(sys.modules, "some_library", ModuleType("some_library"))
    return nn.Sequential(kind(8, 8), nn.Linear(8, 8))


def test_the_integration_of_a_model_s_library_is_given_the_converted_model(of_some_library, monkeypatch):
    adopted, integration = [], ModuleType("some_integration")
    integration.adopt = lambda made: adopted.append((made, type(made[0])))
    monkeypatch.setitem(sys.modules, "some_integration", integration)
    convert(of_some_library, FourBit(block_size=8))
    assert [(made is of_some_library, issubclass(kind, StoredModule)) for made, kind in adopted] == [(True, True)]
    convert(nn.Linear(8, 8), FourBit(block_size=8))
    assert len(adopted) == 1


def test_an_integration_that_cannot_be_imported_is_named_and_the_model_converted(of_some_library, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_integration", None)
    with pytest.warns(
        UserWarning, match="Sequential.save_pretrained would write what nothing can load: .*lowmem.save"
    ):
        convert(of_some_library, FourBit(block_size=8))
    assert isinstance(of_some_library[0], StoredModule)
