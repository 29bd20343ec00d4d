"""What a stored copy of a module holds, and computes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowmem import (
    Embedding8Bit,
    FourBit,
    Half,
    HalfLinear,
    Linear4Bit,
    LoRA,
    LoRALinear,
    adapter_layers,
    convert,
    measure,
    summary,
)
from lowmem.nn.adapted_forward import LINEAR
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.registry import made_by
from tests.rounding import OF_4_BITS, assert_sum, unit
from tests.selection import rows_in_one_case
from tests.transforms.models import Odd, dense_twin

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # which has its own test


INPUTS = {
    nn.Linear: (lambda: nn.Linear(16, 8), lambda: torch.randn(3, 16)),
    nn.Embedding: (lambda: nn.Embedding(16, 8), lambda: torch.arange(3)),
    nn.Conv1d: (lambda: nn.Conv1d(4, 8, 3), lambda: torch.randn(3, 4, 9)),
    nn.Conv2d: (lambda: nn.Conv2d(4, 8, 3), lambda: torch.randn(3, 4, 9, 9)),
}

SOURCES = {HalfLinear: (nn.Linear, (Half(),)), Linear4Bit: (nn.Linear, (FourBit(),))}

MADE = {
    **{(Half, kind): Half for kind in INPUTS},
    **{(FourBit, kind): FourBit for kind in INPUTS},
    **{(LoRA, kind): LoRA for kind in LINEAR if kind in (*INPUTS, *SOURCES)},  # not those that only files make
}


@rows_in_one_case(("technique", "source"), MADE)
def test_every_entry_of_the_registry_builds_a_layer_that_replaces_its_source(technique, source):
    kind, before = SOURCES.get(source, (source, ()))
    make, make_input = INPUTS[kind]
    dense, x = make(), make_input()
    made = FourBit(embeddings="4bit") if technique is FourBit else technique()
    layer = convert(copy.deepcopy(dense), *before, made)
    assert made_by(layer) is technique
    assert isinstance(layer, kind)
    assert measure.weight_count(layer) == measure.weight_count(dense)
    # What it stores is the dense layer's, but for the rounding that its technique promises.
    twin = dense_twin(nn.ModuleList([dense]), nn.ModuleList([layer]))[0]
    if hasattr(layer, "quantized"):
        allowed = layer.quantized.error_bound().view_as(dense.weight)
    else:
        stored = getattr(layer, "weight_rounded", dense.weight).dtype
        allowed = unit(stored) * dense.weight.abs() + torch.finfo(stored).smallest_normal
    assert ((twin.weight - dense.weight).abs() <= allowed).all()
    # What it computes is the sum of that in float32: rows of an embedding as they are, else of one weight for each
    # input of an output, and the bias.
    exact, sizes = twin.double(), copy.deepcopy(twin).double()
    with torch.no_grad():
        for parameter in sizes.parameters():
            parameter.abs_()
    wide, magnitudes = (x, x) if kind is nn.Embedding else (x.double(), x.double().abs())
    terms = 0 if kind is nn.Embedding else dense.weight[0].numel() + 1 + OF_4_BITS
    assert_sum(layer(x), exact(wide), sizes(magnitudes), terms)


@rows_in_one_case(
    ("spoil", "error", "message"),
    [
        (
            lambda layer: nn.init.constant_(layer.weight, float("nan")),
            ValueError,
            "inner.0.0: weight holds 64 values",
        ),
        (lambda layer: layer.to("meta"), ValueError, "inner.0.0: weight is on the meta device"),
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
        (
            lambda layer: setattr(layer, "weight", nn.UninitializedParameter()),
            ValueError,
            r"inner.0.0 is lazy and has no shape yet: call the model once before convert, or .*skip=",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@rows_in_one_case("technique", [FourBit(scales="float16"), FourBit()])
def test_a_weight_that_cannot_be_stored_is_named_and_nothing_changes(spoil, error, message, technique):
    model = Odd()
    spoil(model.inner[0][0])
    layers, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        convert(model, technique, LoRA(2))
    assert list(model.modules()) == layers
    assert [p.requires_grad for p in model.parameters()] == flags


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


def test_a_later_technique_passes_over_what_it_does_not_take():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8))
    convert(model, FourBit(), LoRA(2))
    assert type(model[0]) is Embedding8Bit
    assert isinstance(model[1], LoRALinear)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "1.adapters.default.weight.lora_a",
        "1.adapters.default.weight.lora_b",
    ]


def test_a_later_technique_that_takes_no_layer_is_refused():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Conv1d(8, 8, 1))
    layers = list(model.modules())
    with pytest.raises(ValueError, match="0: LoRA cannot follow .* made a Embedding8Bit; it takes Linear"):
        convert(model, FourBit(), LoRA(2))
    assert list(model.modules()) == layers


def test_techniques_that_do_not_compose_are_refused():
    with pytest.raises(ValueError, match="0: FourBit cannot follow .* made a HalfLinear; it takes Linear"):
        convert(nn.Sequential(nn.Linear(4, 4)), Half(), FourBit())
    with pytest.raises(ValueError, match="Half cannot follow .* made a Linear; it takes"):
        convert(nn.Linear(4, 4), LoRA(), Half())
