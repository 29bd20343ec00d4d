"""Calls that a layer cannot take are named with their remedy, and torch.fx records a call of a converted layer."""

import pytest
import torch

from lowmem import FourBit, Half, LoRA, convert

LAYERS = {
    "linear": (lambda: torch.nn.Linear(16, 16), torch.randn(2, 16)),
    "convolution": (lambda: torch.nn.Conv1d(16, 16, 3), torch.randn(2, 16, 9)),
    "embedding": (lambda: torch.nn.Embedding(16, 16), torch.arange(3)),
}
RAGGED = {
    "linear": [torch.randn(3, 16), torch.randn(5, 16)],
    "convolution": [torch.randn(16, 3), torch.randn(16, 5)],
    "embedding": [torch.arange(3), torch.arange(5)],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("techniques", [(FourBit(),), (Half(),), (LoRA(2),), (FourBit(), LoRA(2)), (Half(), LoRA(2))])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_nested_input_is_named_with_its_remedy(kind, layout, techniques):
    if (kind != "linear" and len(techniques) == 2) or techniques == (LoRA(2),):
        return  # torch's own refusals
    layer, parts = convert(LAYERS[kind][0](), *techniques), RAGGED[kind]
    x = torch.nested.nested_tensor(parts, layout=layout)
    for part in parts:
        layer(part)
    if kind == "embedding" and techniques == (Half(),) and layout is torch.jagged:
        assert [part.shape for part in layer(x).unbind()] == [(3, 16), (5, 16)]
        return
    rows = [torch.nested.nested_tensor([part[0] for part in parts], layout=layout)] if kind == "linear" else []
    message = rf"input is a nested tensor \(layout={layout}\): pad it with torch.nested.to_padded_tensor"
    for given in (x, *rows):
        for trains in (False, True):
            with torch.set_grad_enabled(trains), pytest.raises(TypeError, match=message):
                layer(given)


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
