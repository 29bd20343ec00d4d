"""Training steps of BigNet under a float32 classifier, beside the float32 one: each variant, and ways to train."""

import pytest
import torch

from benchmarks.cases import Training
from lowmem import VARIANTS, measure, training_memory
from lowmem.training.step_memory import NAMED_OPTIMIZERS

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
def test_training_step(memory_gate, timed, float32, variant):
    training = Training(variant)
    memory_gate(training.model, training.x)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    # The first step is the largest: it also makes the optimizer's state.
    memory_gate.counted(lambda: {"peak_bytes": measure.peak_bytes(training.step)}, name="first step")

    loss = timed(training.step, reference=float32.step)

    assert loss.isfinite()
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("way", list(WAYS), ids=str)
def test_training_memory(memory_gate, timed, float32, way):
    """Where the memory of a step of ``qlora_4bit`` goes: as it trains, prepared, and with 8-bit moments."""
    memory, optimizer = WAYS[way]
    training = Training("qlora_4bit", memory, NAMED_OPTIMIZERS[optimizer], batch=256)

    def count():
        found = training_memory(
            training.model,
            training.x,
            loss=lambda logits: torch.nn.functional.cross_entropy(logits, training.labels),
            optimizer=optimizer,
        )
        parts = {**found.parts, "activations": sum(found.activations.values())}
        names = ("weights", "adapters", "gradients", "optimizer", "activations", "scratch")
        return {f"{name}_bytes": parts[name] for name in names} | {"step_bytes": found.step_bytes}

    memory_gate.counted(count)

    loss = timed(training.step, reference=float32.step)

    assert loss.isfinite()
