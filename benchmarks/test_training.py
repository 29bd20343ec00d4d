"""One training step of every variant of BigNet under a float32 classifier, beside the float32 one."""

import pytest
import torch
from torch import nn

import lowmem
from lowmem import VARIANTS, measure

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3, group="training")

BATCH, CLASSES = 16, 10


class Training:
    """A variant with a head, so that each has something to train, and its optimizer."""

    def __init__(self, variant: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(BATCH, 1024, generator=generator)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        self.model = nn.Sequential(lowmem.build(variant), nn.Linear(1024, CLASSES))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


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
