"""Converting a model of a library imports its integration, and says so where that fails."""

import sys
from types import MappingProxyType, ModuleType

import pytest
from torch import nn

import lowmem
from lowmem.transforms import libraries


@pytest.fixture
def model(monkeypatch):
    """Return a model that holds a module of a library called ``some_library``."""
    kind = type("Layer", (nn.Linear,), {"__module__": "some_library.layers"})
    monkeypatch.setattr(
        libraries, "INTEGRATIONS", MappingProxyType({"some_library": "some_integration", "absent": "nothing"})
    )
    monkeypatch.setitem(sys.modules, "some_library", ModuleType("some_library"))
    return nn.Sequential(kind(8, 8), nn.Linear(8, 8))


def test_it_is_imported(model, monkeypatch):
    integration, given = ModuleType("some_integration"), []
    integration.after_conversion = given.append
    monkeypatch.setitem(sys.modules, "some_integration", integration)
    lowmem.convert(model, lowmem.FourBit(block_size=8))
    assert given == [model]
    lowmem.convert(nn.Linear(8, 8), lowmem.FourBit(block_size=8))


def test_what_cannot_be_imported_is_said_and_the_model_converted(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_integration", None)
    with pytest.warns(
        UserWarning, match="Sequential.save_pretrained would write what nothing can load: .*lowmem.save"
    ):
        lowmem.convert(model, lowmem.FourBit(block_size=8))
    assert isinstance(model[0], lowmem.nn.stored_module.StoredModule)
