"""Which layers get an adapter, and of which rank."""

from torch import nn

from lowmem import FourBit, LoRA
from lowmem.transforms.placement import place_adapters, techniques_by_layer


def test_each_layer_has_the_technique_of_its_patterns():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    placed = place_adapters(model, LoRA(2, ranks={"1": 3}), model)
    assert placed == {model[0]: LoRA(2), model[1]: LoRA(3)}


def test_only_layers_that_an_adapter_can_follow_have_one_placed():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))
    technique = LoRA(2, ranks={"1": 3})
    chosen = techniques_by_layer(model, (FourBit(), technique), model)
    assert chosen == {model[0]: (FourBit(), technique), model[1]: (FourBit(), LoRA(3))}
