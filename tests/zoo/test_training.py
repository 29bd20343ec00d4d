"""Prepared for training, real architectures learn what they learned before: ``tox -e zoo`` runs these."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e zoo")
pytest.importorskip("torchvision", reason="torchvision is not installed: tox -e zoo")

from lowmem import FourBit, LoRA, convert, prepare_training, release_training, training_report
from lowmem.training import activations
from lowmem.training.logits import LazyLogits
from tests.zoo.architectures import ARCHITECTURES

# Rows of logits are multiplied a chunk at a time, and a softmax is summed in another order: float32 rounding.
CLOSE = 1e-5
# Models whose forward needs the logits themselves: those with a cap, tanh(logits / cap) * cap.
CAPPED = ("gemma2", "recurrent_gemma")
# Models that draw what they mask or drop in forward, or take other inputs in training.
OTHER = ("wav2vec2", "hubert", "speecht5", "tv_faster_rcnn")


def step(model, inputs):
    """Return the loss of a training step and its gradients as one vector."""
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**inputs)
    loss = getattr(out, "loss", None)
    if loss is None:
        values = [one + 0 for one in tree_leaves(out) if isinstance(one, torch.Tensor) and one.is_floating_point()]
        loss = sum(one.float().square().mean() for one in values if one.requires_grad)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def with_labels(model, inputs):
    takes = "labels" in inspect.signature(type(model).forward).parameters
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if "input_ids" not in inputs or not takes or head is None:
        return inputs
    return inputs | {"labels": inputs.get("decoder_input_ids", inputs["input_ids"])}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in OTHER])
def test_a_prepared_model_learns_the_same(name, monkeypatch):
    architecture = ARCHITECTURES[name]
    model = convert(architecture.make(), FourBit()).train()
    try:
        convert(model, LoRA(4))
    except ValueError as reason:
        pytest.skip(f"no layer takes an adapter: {reason}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = with_labels(model, architecture.inputs())
    loss, gradient = step(model, inputs)
    monkeypatch.setattr(activations, "_LEAST", 64)  # tensors of these tiny models are small
    prepare_training(model, "lean")
    found, near = step(model, inputs)
    assert abs(found - loss) <= CLOSE * abs(loss)
    assert near.isfinite().all()
    assert (near - gradient).norm() < gradient.norm() / 2
    prepare_training(model)
    if "labels" in inputs and name not in CAPPED:
        assert any("in chunks" in one for one in training_report(model).values())
        monkeypatch.setattr(LazyLogits, "values", lambda _: pytest.fail("all logits were computed"))
    found, same = step(model, inputs)
    assert abs(found - loss) <= CLOSE * abs(loss)
    assert (same - gradient).norm() <= CLOSE * gradient.norm()
    release_training(model)


FAMILY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3")


@pytest.mark.parametrize("name", [name for name in FAMILY if name in ARCHITECTURES])
def test_norms_and_mlps_of_the_family_are_fused(name):
    """Every one, in float32 and bfloat16, and nothing in their reports is as before."""
    model = prepare_training(convert(ARCHITECTURES[name].make(), LoRA(2)).train())
    report = training_report(model)
    fused = [text for text in report.values() if "fused" in text]
    layers = model.config.num_hidden_layers
    assert sum("gated MLP" in text for text in fused) == layers
    assert sum("RMS norm" in text for text in fused) >= 2 * layers + 1
    assert not any("as before: on" in text for text in report.values())
