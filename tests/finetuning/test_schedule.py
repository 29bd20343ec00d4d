"""The factors are those of torch's own schedulers."""

import pytest
import torch
from torch.optim import lr_scheduler

from lowmem.finetuning.schedule import DECAYS, Schedule


def factors(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_decays_are_torch_s_linear_and_cosine():
    made = {
        "none": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 20),
        "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    }
    assert made.keys() == DECAYS.keys()
    for decay, theirs in made.items():
        ours = Schedule(20, 0, decay)
        assert [ours(step) for step in range(20)] == pytest.approx(factors(theirs, 20), abs=1e-12)


def test_a_warm_up_rises_to_one_and_the_decay_follows():
    schedule = Schedule(10, 4, "linear")
    rising = factors(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1 / 5, 1.0, 4), 4)
    assert [schedule(step) for step in range(4)] == pytest.approx(rising)
    assert [schedule(step) for step in range(4, 10)] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_every_step_has_a_factor_above_zero_and_none_above_one():
    for decay in DECAYS:
        for warmup in (0, 1, 6):
            found = [Schedule(7, warmup, decay)(step) for step in range(7)]
            assert min(found) > 0
            assert max(found) <= 1
