"""What PEFT cannot do with stored modules of any model is refused by name and remedy, each time."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")

import peft

import lowmem
from lowmem import EightBit, FourBit, Half

pytestmark = pytest.mark.filterwarnings(  # of PEFT: a model that was adapted before, parameters that it does not find
    "default::UserWarning", "default::RuntimeWarning"
)
TECHNIQUES = pytest.mark.parametrize("technique", [Half(), EightBit(), FourBit()], ids=lambda one: type(one).__name__)
OPTIONS = pytest.mark.parametrize(
    ("options", "named"),
    [
        *[
            ({"modules_to_save": [name]}, rf"ModulesToSaveWrapper of PEFT trains a (Half)?{kind}\w* whole, .*skip=")
            for name, kind in {
                "linear": "Linear",
                "embed": "Embedding",
                "conv": "Conv2d",
                "attention": "(MultiheadAttention|Linear|NonDynamicallyQuantizableLinear)",
                "block": "Linear",
            }.items()
        ],
        (
            {"trainable_token_indices": {"embed": [1]}},
            r"TrainableTokensWrapper of PEFT trains a (Half)?Embedding.*skip=",
        ),
        ({"target_parameters": ["linear.weight"]}, r"names linear.weight, which is stored: .*skip='\*linear'"),
        ({"target_parameters": ["attention.in_proj_weight"]}, r"names attention.in_proj_weight.*skip='\*attention'"),
        ({"target_parameters": ["block.0.weight"]}, r"names block.0.weight, which is stored: .*skip='block.0'"),
    ],
    ids=str,
)


def parts():
    return nn.ModuleDict(
        {
            "adapted": nn.Linear(16, 16),
            "linear": nn.Linear(16, 16),
            "embed": nn.Embedding(16, 16),
            "conv": nn.Conv2d(16, 16, 3),
            "attention": nn.MultiheadAttention(16, 2),
            "block": nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
        }
    )


def stored(technique):
    return lowmem.convert(parts(), technique, where=lambda path, module: True)


@TECHNIQUES
@OPTIONS
def test_what_names_a_stored_layer_is_refused_each_time(technique, options, named):
    model = stored(technique)
    for _ in range(2):
        with pytest.raises(ValueError, match=named):
            peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["adapted"], **options))
    peft.get_peft_model(stored(technique), peft.LoraConfig(r=2, target_modules=["adapted"]))


@OPTIONS
def test_dense_layers_beside_stored_ones_are_left_to_peft(options, named):
    model = lowmem.convert(parts(), FourBit(), skip=["linear", "embed", "conv", "attention*", "block*"])
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["adapted"], **options))
    assert sum(one.requires_grad for one in made.parameters()) > 2


def test_biases_in_16_bits_are_not_left_out_in_silence():
    """PEFT finds biases by their names; in 8 and 4 bits they are dense, and it trains them."""
    config = peft.LoraConfig(r=2, target_modules=["adapted"], bias="all")
    model = stored(Half())
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"bias='all' of PEFT names adapted.bias, .*skip='\*adapted'.*bias='none'"
        ):
            peft.get_peft_model(model, config)
    trained = {
        name for name, one in peft.get_peft_model(stored(EightBit()), config).named_parameters() if one.requires_grad
    }
    dense = {name for name, one in peft.get_peft_model(parts(), config).named_parameters() if one.requires_grad}
    assert trained == dense
    later = peft.get_peft_model(
        lowmem.convert(nn.Sequential(nn.Linear(8, 8)), Half()), peft.LoraConfig(r=2, target_modules=["0"])
    )
    later(torch.ones(1, 8))
    later.add_adapter("later", peft.LoraConfig(r=2, target_modules=["0"]))
    later(torch.ones(1, 8))
    injected = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["0"], bias="all"), lowmem.convert(nn.Sequential(nn.Linear(8, 8)), Half())
    )
    for _ in range(2):
        with pytest.raises(ValueError, match="bias='all' of PEFT names 0.bias"):
            injected(torch.ones(1, 8))


@pytest.mark.parametrize("safe", [False, True])
@TECHNIQUES
def test_a_merge_into_stored_weights_is_refused_or_warns_and_works_with_dense_ones(technique, safe):
    """PEFT adds a LoRA to the weight in place, and sets the data of the weight to what it computes for a DoRA."""
    torch.manual_seed(0)
    model = lowmem.convert(nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 64, 1)), technique)
    x = torch.randn(3, 64, 64)
    for dora in (False, True):
        config = peft.LoraConfig(r=2, target_modules=["0", "1"], use_dora=dora)
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) / 50)
        expected = adapted(x)
        merged = copy.deepcopy(adapted)
        if not dora:
            with pytest.raises(RuntimeError, match=r"would write to a weight .* lowmem.restore\(model\)"):
                merged.merge_adapter(safe_merge=safe)
        elif isinstance(technique, Half):  # rounded once, as data of a dense weight in 16 bits
            merged.merge_adapter(safe_merge=safe)
        else:
            with pytest.warns(UserWarning, match=r"quantized again.*PEFT's merge of DoRA.*lowmem.restore") as warned:
                merged.merge_adapter(safe_merge=safe)
            assert len(warned) == 2
        dense = lowmem.restore(adapted).merge_and_unload(safe_merge=safe)
        torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-4)
