"""The config is JSON, and refuses what it does not know."""

import json

import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from lowmem import Budget, EightBit, FourBit, Half, LoRA
from lowmem.integrations.transformers import METHOD, LowmemConfig
from lowmem.version import install_command
from tests.integrations.transformers.folders import assert_same, load, write

TECHNIQUES = [
    Half(),
    Half(torch.bfloat16),
    FourBit("bof4s", 32, "double", torch.bfloat16, True),
    FourBit(("nf4", "int4"), compute_dtype=torch.int8, search=False),
    FourBit("nf4", embeddings="4bit"),
    FourBit("iq4_nl", embeddings="q8_0"),
    FourBit(),
    EightBit(32),
]


def test_json_holds_it():
    for technique in TECHNIQUES:
        config = LowmemConfig(technique, skip=["lm_head", "*.o_proj"], train_dense=True)
        again = AutoQuantizationConfig.from_dict(json.loads(config.to_json_string()))
        assert type(again) is LowmemConfig
        assert (again.technique, again.skip, again.train_dense) == (technique, ["lm_head", "*.o_proj"], True)
        assert again.to_dict() == config.to_dict()
    saved = LowmemConfig(layers=[{"technique": "Half", "dtype": "float16", "names": ["a"]}], adapters={"a": []})
    assert LowmemConfig.from_dict(saved.to_dict()).to_dict() == saved.to_dict()
    assert install_command("transformers") in saved.to_dict()["notice"]


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({}, TypeError, r"technique=None: name Half\(\), EightBit\(\), FourBit\(\) or Budget\(\)"),
        ({"technique": LoRA(4)}, TypeError, "adapters come afterwards, with lowmem.add_adapter"),
        ({"technique": "nf4"}, TypeError, r"technique='nf4' must be Half\(\), .* or Budget\(\)"),
        ({"technique": "exact"}, TypeError, "transformers.from_exact keeps other programs' codes"),
        ({"technique": {"technique": "Third"}}, ValueError, "technique='Third' is none of Half, EightBit, FourBit"),
        ({"technique": {"technique": "Half", "rank": 3}}, ValueError, "'rank' is unknown"),
        ({"technique": {"technique": "Half", "dtype": "float33"}}, ValueError, "dtype='float33' must be"),
        ({"technique": {"technique": "FourBit", "block_size": [1]}}, (TypeError, ValueError), "block_size"),
        ({"technique": Half(), "skip": [3]}, TypeError, r"skip=\[3\] must be glob patterns"),
        ({"technique": Half(), "skip": 5}, TypeError, "skip=5 must be glob patterns"),
        ({"technique": Half(), "version": 3}, ValueError, "version=3, and this lowmem reads 2: upgrade lowmem"),
        ({"technique": Half(), "version": 1}, ValueError, "version=1, .* reads 2: make the folder again with this"),
        ({"layers": 2**63}, ValueError, "layers=9223372036854775808 must be a list of objects"),
        ({"layers": [None]}, ValueError, r"layers=\[None\] must be a list of objects"),
        ({"technique": Half(), "adapters": [1]}, ValueError, r"adapters=\[1\] must be an object"),
        ({"technique": Half(), "rotations": 1}, ValueError, "has 'rotations', which this lowmem does not know"),
        ({"technique": Half(), "train_dense": 1}, TypeError, "train_dense=1 must be True or False"),
    ],
)
def test_it_refuses_what_it_does_not_know(arguments, kind, says):
    with pytest.raises(kind, match=says):
        LowmemConfig.from_dict({"quant_method": METHOD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"format": "nf4"},
            r"^format='nf4' belongs to FourBit and EightBit: write LowmemConfig\(lowmem.FourBit\(format='nf4'\)\)$",
        ),
        ({"block_size": 8}, r"belongs to FourBit and EightBit: write LowmemConfig\(lowmem.FourBit\(block_size=8\)\)"),
        ({"load_in_4bit": True}, r"load_in_4bit=True is no argument .*: write LowmemConfig\(lowmem.FourBit\(\)\)"),
        ({"rank": 8}, r"^rank=8 belongs to LoRA: .*lowmem.add_adapter\(model, name, lowmem.LoRA\(rank=8\)\)$"),
        ({"skip_modules": ["a"]}, r"write LowmemConfig\(lowmem.FourBit\(\), skip=\['a'\]\)$"),
        ({"technique": FourBit(), "llm_int8_skip_modules": ["a"]}, r"FourBit\(\), skip=\['a'\]\)$"),
    ],
)
def test_a_field_of_a_technique_says_where_it_belongs(arguments, says):
    with pytest.raises(ValueError, match=says):
        LowmemConfig(**arguments)


@pytest.mark.parametrize("technique", [Half(), EightBit(), FourBit(), Budget(4.4)], ids=str)
def test_a_technique_in_place_of_a_config_is_short_for_it(technique, tmp_path):
    folder = write(tmp_path / "dense")
    model = load(folder, quantization_config=technique)
    assert_same(model, load(folder, quantization_config=LowmemConfig(technique)))
    assert type(model.config.quantization_config) is LowmemConfig
    assert model.config.quantization_config.technique == technique
    model.save_pretrained(tmp_path / "stored")
    assert_same(load(tmp_path / "stored"), model)


@pytest.mark.parametrize("given", [LoRA(), FourBit], ids=str)
def test_what_is_no_way_to_store_is_refused_as_in_a_config(given, tmp_path):
    with pytest.raises(TypeError, match=r"must be Half\(\), EightBit\(\), FourBit\(\) or Budget\(\)"):
        load(write(tmp_path), quantization_config=given)


@pytest.mark.parametrize("given", [(Half(),), "exact"], ids=str)
def test_other_objects_in_place_of_a_config_are_an_error_of_transformers(given, tmp_path):
    with pytest.raises(AttributeError, match="has no attribute 'quant_method'"):
        load(write(tmp_path), quantization_config=given)
