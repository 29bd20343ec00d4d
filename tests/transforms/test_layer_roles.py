"""Output layers and routers are found, as models name them and by what they share."""

import copy

import pytest
import torch
from torch import nn

from lowmem import FourBit, LoRA, convert
from lowmem.transforms.layer_roles import output_layer_reason_by_module
from tests.transforms.test_adapter_placement import Body, Causal, adapted


class Without(nn.Module):
    """Models without an output layer say so in several ways."""

    def __init__(self, returned):
        super().__init__()
        self.body, self.returned = Body(), returned

    def get_output_embeddings(self):
        if isinstance(self.returned, type):
            raise self.returned
        return self.returned


@pytest.mark.parametrize("returned", [None, AttributeError, NotImplementedError, torch.ones(1)])
def test_a_model_without_an_output_layer_has_none_left_out(returned):
    assert output_layer_reason_by_module(Without(returned)) == {}
    assert adapted(convert(Without(returned), LoRA(2))) == ["body.q", "body.v"]


def test_a_layer_that_shares_a_bias_alone_is_no_output_layer():
    model = Causal()
    model.more = nn.Linear(4, 50)
    model.lm_head.bias = model.more.bias
    assert model.more not in output_layer_reason_by_module(model)


def test_an_embedding_tied_to_another_is_no_output_layer():
    model = Body()
    model.twin = nn.Embedding(50, 16)
    model.twin.weight = model.tokens.weight
    assert output_layer_reason_by_module(model) == {}


def test_copies_know_their_output_layers():
    model = copy.deepcopy(convert(Causal(), FourBit(), LoRA(2)))
    assert {type(module).__name__ for module in output_layer_reason_by_module(model)} == {"Linear8Bit"}
