"""Copies of modules with stored parameters, and the generated classes of these copies."""

import pytest
import torch
from torch import nn

from lowmem import EightBit, FourBit, Half, LoRA, convert
from lowmem.nn.module_copy import LAYERS, dense_shallow_copy, stored_module_class
from lowmem.nn.quantized_module import QuantizedModule


def test_a_part_of_the_stored_parameters_can_be_dense_again():
    model = convert(nn.LSTM(16, 24), FourBit("nf4", 16, "float32"))
    left = dense_shallow_copy(model, {"weight_ih_l0": nn.Parameter(model.weight_ih_l0.dequantize())})
    assert isinstance(left, nn.LSTM)
    assert [*left.forms] == ["weight_hh_l0"]
    assert left.part_parameter_names == ("weight_hh_l0_packed", "weight_hh_l0_scales")
    assert left.weight_count == model.weight_count == sum(one.numel() for one in nn.LSTM(16, 24).parameters())
    assert left.element_counts == {"weight_hh_l0_scales": 96 * 2}  # blocks of 16: 16 and 8 columns
    assert left.dequantized_by == set()
    left.weight_hh_l0.mul(1)
    assert left.dequantized_by == {"mul"}
    assert model.element_counts == {"weight_ih_l0_scales": 96, **left.element_counts}
    x = torch.randn(3, 2, 16)
    torch.testing.assert_close(left(x)[0], model(x)[0])


def test_the_class_is_generated_once():
    one = stored_module_class(nn.Bilinear, ("weight",), 4)
    assert type(convert(nn.Bilinear(4, 4, 2), FourBit())) is one
    assert issubclass(one, nn.Bilinear)
    assert one.__name__ == "Bilinear"
    assert "Bilinear(in1_features=8, in2_features=8, out_features=2, bias=True, stored in nf4" in repr(
        convert(nn.Bilinear(8, 8, 2), FourBit("nf4"))
    )


class Named(nn.Linear):
    def __init__(self):
        super().__init__(16, 8)
        self.formats_text = 7


@pytest.mark.parametrize("name", ["formats_text", "weight_packed", "set_stored_weight"])
def test_attributes_that_would_be_hidden_are_refused_by_name(name):
    layer = Named() if name == "formats_text" else nn.Linear(16, 8)
    if name == "weight_packed":
        layer.register_buffer(name, torch.ones(3))
    if name == "set_stored_weight":
        layer.set_stored_weight = lambda value: value
    model = nn.Sequential(nn.Linear(16, 16), layer)
    told = rf"1: \w+ has {name} of its own, .*rename it, or leave the module out with skip="
    with pytest.raises(ValueError, match=told):
        convert(model, FourBit())
    assert type(model[0]) is nn.Linear


def test_one_line_gives_the_generated_classes_of_a_layer_another_base(monkeypatch):
    class Doubled(nn.Bilinear):
        pass

    class Faster(QuantizedModule):
        def forward(self, input1, input2):
            return 2 * super().forward(input1, input2)

    monkeypatch.setitem(LAYERS, (Doubled, 4), Faster)
    made = stored_module_class(Doubled, ("weight",), 4)
    assert issubclass(made, Faster)
    assert issubclass(made, Doubled)
    assert not issubclass(stored_module_class(Doubled, ("weight",), 8), Faster)
    assert not issubclass(stored_module_class(Doubled, ("bias",), 4), Faster)


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [(nn.Conv2d, (4, 8, 3), {"bias": False}), (nn.Conv3d, (4, 8, 1), {"groups": 2}), (nn.Embedding, (9, 16), {})],
)
@pytest.mark.parametrize("technique", [Half(), EightBit(), FourBit()], ids=str)
def test_calling_the_class_of_a_stored_or_adapted_module_makes_a_dense_one(kind, sizes, options, technique):
    model = convert(kind(*sizes), technique)
    adapted = convert(convert(kind(*sizes), technique), LoRA(2), where=lambda path, module: True)
    for made in (model, adapted):
        new = type(made)(*sizes, **options, dtype=torch.float64)
        assert type(new) is kind
        assert repr(new) == repr(kind(*sizes, **options))
        assert new.weight.dtype is torch.float64
        assert [*vars(new)] == [*vars(kind(*sizes, **options))]
