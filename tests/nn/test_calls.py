"""Calls that a layer cannot take are named with their remedy, and torch.fx records a call of a converted layer."""

import pytest
import torch

from lowmem import FourBit, Half, LoRA, LoRALinear, convert
from lowmem.nn.stored_module import StoredModule
from tests.selection import rows_in_one_case

NESTED = {
    "strided": torch.strided,
    "jagged": torch.jagged,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@rows_in_one_case("layout", sorted(NESTED))
@rows_in_one_case("techniques", [(FourBit(),), (Half(),), (LoRA(2),), (FourBit(), LoRA(2)), (Half(), LoRA(2))])
def test_a_nested_input_is_named_with_its_remedy(layout, techniques):
    layer = convert(torch.nn.Linear(8, 4), *techniques)
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    x = torch.nested.nested_tensor(parts, layout=NESTED[layout])
    for trains in (False, True):
        with torch.set_grad_enabled(trains):
            message = (
                rf"input is a nested tensor \(layout=torch.{layout}\): pad it with torch.nested.to_padded_tensor"
            )
            with pytest.raises(TypeError, match=message):
                layer(x)
    layer(torch.nested.to_padded_tensor(x, 0.0))
    for part in x.unbind():
        layer(part)
    rows = torch.nested.nested_tensor([part[0] for part in parts], layout=NESTED[layout])
    if not isinstance(layer, LoRALinear) or isinstance(layer, StoredModule):  # a dense one refuses it itself
        with pytest.raises(TypeError, match="input is a nested tensor"):
            layer(rows)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["half", "4-bit"])
def test_a_nested_input_of_other_layers_is_named_with_its_remedy(kind):
    technique = Half() if kind == "half" else FourBit(block_size=8)
    conv, embedding = convert(torch.nn.Conv1d(4, 4, 1), technique), convert(torch.nn.Embedding(9, 8), technique)
    for layout in NESTED.values():
        ragged = [torch.randn(4, 3), torch.randn(4, 5)]
        with pytest.raises(TypeError, match="input is a nested tensor.*to_padded_tensor"):
            conv(torch.nested.nested_tensor(ragged, layout=layout))
        indices = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)], layout=layout)
        if kind == "half" and layout is torch.jagged:
            assert [part.shape for part in embedding(indices).unbind()] == [(3, 8), (5, 8)]
        else:
            with pytest.raises(TypeError, match="input is a nested tensor.*to_padded_tensor"):
                embedding(indices)


LAYERS = {
    "linear": (lambda: torch.nn.Linear(16, 16), torch.randn(2, 16)),
    "convolution": (lambda: torch.nn.Conv1d(16, 16, 3), torch.randn(2, 16, 9)),
    "embedding": (lambda: torch.nn.Embedding(16, 16), torch.arange(3)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("stored", [(), (FourBit(),), (Half(),)], ids=["dense", "4-bit", "half"])
def test_torch_fx_takes_converted_layers_as_leaves(layer, stored):
    make, x = LAYERS[layer]
    for techniques in filter(None, (stored, (*stored, LoRA(2)))):
        model = convert(torch.nn.Sequential(make()), *techniques, where=lambda *_: True)
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(parameter)
        traced = torch.fx.symbolic_trace(model)
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
        assert torch.equal(traced(x), model(x))


def test_torch_fx_cannot_look_into_a_converted_layer():
    for techniques in ((FourBit(),), (LoRA(2),)):
        layer = convert(torch.nn.Linear(8, 8), *techniques)
        with pytest.raises(RuntimeError, match=f"look into a {type(layer).__name__}.*: trace a module that holds it"):
            torch.fx.symbolic_trace(layer)
