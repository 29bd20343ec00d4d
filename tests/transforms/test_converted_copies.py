"""What a stored copy of a module holds, and computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem import (
    FourBit,
    Half,
    LoRA,
    adapter_layers,
    convert,
    summary,
)
from lowmem.nn.stored_module import StoredModule
from tests.refusing import refused
from tests.transforms.models import Odd

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # which has its own test


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda layer: nn.init.constant_(layer.weight, float("nan")),
            ValueError,
            "inner.0.0: weight holds 64 values",
        ),
        (lambda layer: layer.to(torch.complex64), TypeError, "inner.0.0: weight.dtype=torch.complex64"),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(8, 8).int(), False)),
            TypeError,
            "torch.int32",
        ),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.eye(8).to_sparse(), False)),
            ValueError,
            r"inner.0.0 has layout=torch.sparse_coo: make it dense",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("technique", [FourBit(scales="float16"), FourBit()])
def test_a_weight_that_cannot_be_stored_is_named_and_nothing_changes(spoil, error, message, technique):
    model = Odd()
    spoil(model.inner[0][0])
    with refused(model, error, message):
        convert(model, technique, LoRA(2))


def test_a_class_with_slots_and_its_own_setattr_converts():
    class Slots(nn.Linear):
        __slots__ = ("factor",)

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.factor = 3.0

        def __setattr__(self, name, value):
            if name == "weight" and "bias" in self._parameters:
                raise RuntimeError("its weight is set once")
            super().__setattr__(name, value)

        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * self.factor

    for technique in (FourBit(), Half()):
        layer, x = Slots(8, 8), torch.randn(2, 8)
        dense = layer(x)
        convert(layer, technique)
        assert isinstance(layer, StoredModule)
        assert layer.factor == 3.0
        assert (layer(x) - dense).norm() < 0.2 * dense.norm()
        assert summary(layer)[0].computed == "as stored"


def test_stored_layers_with_a_stored_bias_get_adapters_later():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(8, 8))
    convert(model, Half(torch.bfloat16))
    bias = model[0].bias
    convert(model, LoRA(2), where=lambda path, _: path != "")
    assert list(adapter_layers(model, "default")) == ["0", "1", "2"]
    assert model[0].bias.dtype == bias.dtype


@pytest.mark.parametrize(
    ("layer", "techniques", "message"),
    [
        (nn.Embedding(16, 8), (FourBit(), LoRA(2)), "0: LoRA cannot follow .* made a Embedding8Bit; it takes Linear"),
        (nn.Conv1d(4, 4, 3), (FourBit(), LoRA(2)), "LoRA leaves convolutions out: where= takes them"),
        (nn.LSTM(4, 4), (FourBit(), LoRA(2)), "LoRA leaves recurrent layers out: where= takes them"),
        (nn.Linear(4, 4), (Half(), FourBit()), "0: FourBit cannot follow .* made a HalfLinear; it takes Linear"),
        (nn.Linear(4, 4), (LoRA(), Half()), "Half cannot follow .* made a Linear; it takes"),
    ],
)
def test_a_technique_that_cannot_follow_is_refused_and_the_model_stays(layer, techniques, message):
    model = nn.Sequential(layer)
    with refused(model, ValueError, f"cannot follow the techniques before it.*{message}|{message}"):
        convert(model, *techniques)
