"""Prepared for training, real architectures learn what they learned before: ``tox -e zoo`` runs these."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e zoo")
pytest.importorskip("torchvision", reason="torchvision is not installed: tox -e zoo")

from lowmem import FourBit, LoRA, convert, prepare_training, release_training, restore, training_report
from lowmem.quant.backend import backend_of
from lowmem.training import activation_compression, fused_functions
from lowmem.training.lazy_logits import LazyLogits
from tests.rounding import unit
from tests.zoo.architectures import ARCHITECTURES

UNIT = unit(torch.float32)

# How much larger than the plain step's the prepared step's error may be. Both round about as often, and the model
# carries each rounding to its gradient alike. A fused function rounds up to twice as far as torch's, and which way a
# rounding goes is chance: another 2.
FACTOR = 4
# Units of float32 for what is rounded once more, whatever the model: rows' losses are added in another order.
FEW = 8
# In float64 the two steps are the same but for constants that models write with nine digits, as BLOOM's gelu.
SAME = 1e-9
# Models whose forward needs the logits themselves: those with a cap, tanh(logits / cap) * cap.
CAPPED = ("gemma2", "recurrent_gemma")
# Models that draw what they mask or drop in forward, or take other inputs in training.
OTHER = ("wav2vec2", "hubert", "speecht5", "tv_faster_rcnn")


def step(model, inputs):
    """Return the loss of a training step and its gradients as one vector."""
    model.zero_grad()
    torch.manual_seed(0)
    np.random.seed(0)  # VITS drops layers by it
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


class InFloat64(TorchFunctionMode):
    """Models compute in float64 where they ask for float32, as for norms, softmax and losses."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda one: torch.float64 if one is torch.float32 else one, (args, kwargs or {}))
        if function is torch.Tensor.float:
            function, args = torch.Tensor.to, (*args, torch.float64)
        return function(*args, **kwargs)


def exact_step(model, inputs):
    """Return loss and gradients of a model in float64."""
    wide = tree_map(
        lambda one: one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one, inputs
    )
    with InFloat64():
        return step(model, wide)


def adapted(model):
    """Return the model with adapters that depend on nothing but its shapes, and without what forward draws."""
    torch.manual_seed(1)
    convert(model.train(), LoRA(2))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0
    return model


def pair(name):
    """Return a quantized model with adapters, and the same one in float64, dense."""
    model = convert(ARCHITECTURES[name].make(), FourBit())
    exact = restore(copy.deepcopy(model))
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # torch has no grouped products in float64
    try:
        model, exact = adapted(model), adapted(exact).double()
    except ValueError as reason:
        pytest.skip(f"no layer takes an adapter: {reason}")
    trained = [
        [(path, p.double()) for path, p in one.named_parameters() if p.requires_grad] for one in (model, exact)
    ]
    for (path, own), (other, same) in zip(*trained, strict=True):
        assert path == other
        assert torch.equal(own, same)
    return model, exact


def distances(found, exact):
    """Return how far a loss and its gradients lie from others, relative to them."""
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


def rounding(model, exact, plain, inputs):
    """Return how far float32 may move the loss and the gradients: what it moved the plain step, or more.

    By chance the plain step may be near. So the float64 model's weights are moved by a unit of float32, up or down,
    three times: what that does to the gradient, float32 may do.
    """
    errors = [distances(plain, exact)]
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            signs = 2 * torch.randint(0, 2, parameter.shape, generator=draw) - 1
            parameter.data.mul_(1 + UNIT * signs)
        errors.append(distances(exact_step(model, inputs), exact))
        for parameter, values in zip(model.parameters(), kept, strict=True):
            parameter.data.copy_(values)
    return [FACTOR * max(column) + FEW * UNIT for column in zip(*errors, strict=True)]


def assert_within(found, exact, bounds):
    for error, bound in zip(distances(found, exact), bounds, strict=True):
        assert error <= bound


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in OTHER])
def test_a_prepared_model_learns_the_same(name, monkeypatch):
    """In float64 the step is the plain one; in float32 it is as near to that as the plain one is."""
    model, wide = pair(name)
    inputs = with_labels(model, ARCHITECTURES[name].inputs())
    plain, exact = step(model, inputs), exact_step(wide, inputs)
    bounds = rounding(wide, exact, plain, inputs)
    assert_within(exact_step(prepare_training(wide), inputs), exact, (SAME, SAME))
    monkeypatch.setattr(activation_compression, "_LEAST", 64)  # tensors of these tiny models are small
    loss, near = step(prepare_training(model, "lean"), inputs)
    assert_within([loss], exact[:1], bounds[:1])
    assert near.isfinite().all()
    assert (near - plain[1]).norm() < plain[1].norm() / 2
    prepare_training(model)
    if "labels" in inputs and name not in CAPPED:
        assert any("in chunks" in one for one in training_report(model).values())
        monkeypatch.setattr(LazyLogits, "compute_values", lambda _: pytest.fail("all logits were computed"))
    assert_within(step(model, inputs), exact, bounds)
    release_training(model)


@pytest.mark.parametrize("name", ["falcon_mamba", "switch", "mobilevit"])
def test_a_wrong_gradient_is_told_from_rounding(name, monkeypatch):
    """Of models whose gradients float32 moves most: off by a millionth in float64, or a thousandth in float32."""
    model, wide = pair(name)
    inputs = with_labels(model, ARCHITECTURES[name].inputs())
    plain, exact = step(model, inputs), exact_step(wide, inputs)
    bounds = rounding(wide, exact, plain, inputs)
    for one in (model, wide):  # before the fault: a function whose gradients are wrong is not recognized as fused
        prepare_training(one)
    assert_within(exact_step(wide, inputs), exact, (SAME, SAME))
    assert_within(step(model, inputs), exact, bounds)
    backend, wrong = backend_of(torch.zeros(1)), 1 + 1e-6
    norm_grad, gated_grad = backend.norm_grad, backend.gated_grad
    monkeypatch.setattr(backend, "norm_grad", lambda grad, *given: norm_grad(grad * wrong, *given))
    monkeypatch.setattr(backend, "gated_grad", lambda grad, *given: gated_grad(grad * wrong, *given))
    for activation, (function, of_torch) in fused_functions._OF_TORCH.items():  # torch's own, in float64

        def wrong_grad(grad, x, of_torch=of_torch):
            return of_torch(grad * wrong, x)

        monkeypatch.setitem(fused_functions._OF_TORCH, activation, (function, wrong_grad))
    with pytest.raises(AssertionError):
        assert_within(exact_step(wide, inputs), exact, (SAME, SAME))
    if name != "mobilevit":  # where float32 alone moves the gradient by a percent: float64 tells
        wrong = 1 + 1e-3
        with pytest.raises(AssertionError):
            assert_within(step(model, inputs), exact, bounds)


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
