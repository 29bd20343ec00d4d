"""Real architectures, tiny and with random weights: each converts, and is then what it was, but smaller.

``tox -e zoo`` runs these.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers", reason="transformers is not installed: tox -e zoo")
pytest.importorskip("torchvision", reason="torchvision is not installed: tox -e zoo")

from tests.zoo.architectures import ARCHITECTURES


def tensors(outputs):
    """Return the tensors of what a model returns, in order; caches are none of them."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def call(architecture, model):
    return tensors(model(**architecture.inputs()))


@torch.no_grad()
def generate(architecture, model):
    """Return the tokens of a greedy continuation, with those that it continues: (batch, length)."""
    inputs = {name: value for name, value in architecture.inputs().items() if not name.startswith("decoder_")}
    return model.generate(**inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4)


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys(), scope="module")
def architecture(request):
    return request.param


def test_an_architecture_is_small_and_the_same_each_time(architecture):
    first, second = architecture.make(), architecture.make()
    assert sum(parameter.numel() for parameter in first.parameters()) < 400_000
    assert not any(module.training for module in first.modules())
    outputs = call(architecture, first)
    assert outputs
    assert all(torch.isfinite(output).all() for output in outputs)
    assert_equal(call(architecture, second), outputs)
    if architecture.generates:
        assert torch.equal(generate(architecture, first), generate(architecture, second))
