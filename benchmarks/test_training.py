"""Training steps of BigNet under a float32 classifier, beside the float32 one: each variant, and ways to train."""

import pytest
import torch

from benchmarks.cases import Training
from lowmem import VARIANTS, measure, training_memory
from lowmem.training.memory import TRAINERS

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3, group="training")


WAYS = {
    "plain-adamw": (None, "adamw"),
    "fast-adamw": ("fast", "adamw"),
    "lean-adamw": ("lean", "adamw"),
    "plain-adamw8bit": (None, "adamw8bit"),
    "lean-adamw8bit": ("lean", "adamw8bit"),
}


@pytest.fixture(scope="module")
def float32():
    return Training("bignet")


@pytest.mark.parametrize("variant", list(VARIANTS), ids=str)
def test_training_step(benchmark, record_memory, timed, float32, variant):
    training = Training(variant)
    record_memory(training.model, training.x)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    # The first step is the largest: it also makes the optimizer's state.
    benchmark.extra_info["step_bytes"] = measure.peak_bytes(training.step)

    loss = timed(training.step, reference=float32.step)

    assert loss.isfinite()
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("way", list(WAYS), ids=str)
def test_training_memory(benchmark, timed, float32, way):
    """Where the memory of a step of the nf4 variant goes: as it trains, prepared, and with 8-bit moments."""
    memory, optimizer = WAYS[way]
    training = Training("qlora_nf4", memory, TRAINERS[optimizer], batch=256)
    found = training_memory(
        training.model,
        training.x,
        loss=lambda logits: torch.nn.functional.cross_entropy(logits, training.labels),
        optimizer=optimizer,
    )
    parts = {**found.parts, "activations": sum(found.activations.values())}
    names = ("weights", "adapters", "gradients", "optimizer", "activations", "scratch")
    benchmark.extra_info.update({f"{name}_bytes": parts[name] for name in names}, step_bytes=found.step_bytes)

    loss = timed(training.step, reference=float32.step)

    assert loss.isfinite()
