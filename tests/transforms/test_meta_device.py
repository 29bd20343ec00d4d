"""A model is made without its weights, or an error says what stands in the way."""

import pytest
import torch
from torch import nn

from lowmem.transforms.meta_device import make_model_with_meta_parameters
from tests.models import Small


def test_parameters_are_on_meta_and_buffers_as_they_were():
    model = make_model_with_meta_parameters(Small)
    assert all(p.is_meta for p in model.parameters())
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in Small().named_parameters()
    ]
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.offset, torch.arange(24.0))
    there = nn.Parameter(torch.empty(4, 4, device="meta"))  # another object may hold it, too

    def with_it():
        layer = nn.Linear(4, 4)
        layer.weight = there
        return layer

    assert make_model_with_meta_parameters(with_it).weight is there


def test_the_generator_stays_as_it_was():
    before = torch.get_rng_state()
    make_model_with_meta_parameters(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(torch.rand(1).item())))
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_were_there_before_keep_their_values():
    shared = nn.Linear(4, 4)
    model = make_model_with_meta_parameters(lambda: nn.Sequential(shared, nn.Linear(4, 2)))
    assert all(p.is_meta for p in model.parameters())
    assert not shared.weight.is_meta


EXISTING = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("factory", "error", "text"),
    [
        (lambda: 3, TypeError, "factory returned a int, not a torch.nn.Module"),
        (lambda: EXISTING, ValueError, "a model that was there before"),
        (lambda: nn.Linear(4, 4).to("cpu"), ValueError, "needs the values of its parameters"),
        (lambda: nn.Linear(4, int(nn.Linear(4, 4).weight.sum())), ValueError, "needs the values of its parameters"),
    ],
)
def test_invalid_factories_are_one_clear_error(factory, error, text):
    with pytest.raises(error, match=text):
        make_model_with_meta_parameters(factory)
    assert not EXISTING.weight.is_meta


def test_errors_of_the_factory_pass():
    with pytest.raises(ValueError, match="^its own$"):
        make_model_with_meta_parameters(lambda: (_ for _ in ()).throw(ValueError("its own")))
