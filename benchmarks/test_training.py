"""One training step of every variant of BigNet under a float32 classifier, beside the float32 one."""

import pytest
import torch

from benchmarks.cases import Training
from lowmem import VARIANTS, measure

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3, group="training")


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
