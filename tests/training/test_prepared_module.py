"""Modules get their class back, whatever was done to it in layers; or an error, and nothing changes."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lowmem import LoRA, convert, prepare_training, release_training
from lowmem.training.logits import LazyLogits
from lowmem.training.prepared_module import PreparedModule, check_prepared, release_module
from tests.refusing import refused


def test_all_classes_that_a_module_was_given_are_undone():
    model = prepare_training(nn.Linear(8, 40), "lean", output="*")
    assert isinstance(model, PreparedModule)
    assert issubclass(type(model).plain_class, PreparedModule)  # lazy logits, and compressed activations over them
    with pytest.raises(RuntimeError, match="the model itself is prepared for training: call lowmem.release_training"):
        convert(model, LoRA(2))
    release_module(model)
    assert type(model) is nn.Linear
    assert not {"logits_chunk", "logits_dtype", "fused_as"} & set(vars(model))
    release_module(model)
    assert type(model) is nn.Linear


def test_a_class_that_was_changed_since_is_an_error():
    model = prepare_training(convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 40)), LoRA(2), skip="1"), output="1")
    assert isinstance(model(torch.ones(1, 8)), LazyLogits)
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    for call in (check_prepared, release_module):
        with refused(model, RuntimeError, "was made of the prepared module since, as a parametrization does"):
            call(model[1])
    with refused(model, RuntimeError, "undo that first"):
        release_training(model)
    parametrize.remove_parametrizations(model[1], "weight")
    release_training(model)
    assert type(model[1]) is nn.Linear
    assert model(torch.ones(1, 8)).shape == (1, 40)
