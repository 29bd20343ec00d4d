"""Every architecture of transformers is stored while it loads as ``convert`` stores it, and loads again."""

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e zoo")
pytest.importorskip("torchvision", reason="torchvision is not installed: tox -e zoo")

import torch
from transformers import PreTrainedModel

import lowmem
from lowmem import FourBit, Half
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import assert_same
from tests.zoo.architectures import TRANSFORMERS

TECHNIQUES = {"nf4": FourBit("nf4"), "bfloat16": Half(torch.bfloat16)}


@pytest.mark.filterwarnings("ignore::UserWarning")  # much of these tiny models stays dense, which is said elsewhere
@pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=TECHNIQUES.keys())
@pytest.mark.parametrize("architecture", TRANSFORMERS, ids=lambda one: one.name)
def test_it_is_stored_while_it_loads(architecture, technique, tmp_path):
    model = architecture.make()
    if not isinstance(model, PreTrainedModel):
        pytest.skip(f"{type(model).__name__} is no PreTrainedModel, and has no folder")
    model.save_pretrained(tmp_path / "dense")
    read = type(model).from_pretrained(tmp_path / "dense", quantization_config=LowmemConfig(technique))
    converted = lowmem.convert(type(model).from_pretrained(tmp_path / "dense"), technique)
    assert_same(read, converted)
    for number, one in enumerate((read, converted)):
        one.save_pretrained(tmp_path / f"{number}")
        assert_same(type(model).from_pretrained(tmp_path / f"{number}"), one)
