"""Bad settings are refused before anything is done; learning rates are those of torch's own schedulers."""

import json

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lowmem import FineTuning
from lowmem.finetuning.settings import DECAYS, LARGEST_LR, OPTIMIZERS

NONE = (0, -1, 1.5, True, "3")


def test_values_out_of_their_range_are_named():
    bad = [(name, value) for name in ("steps", "epochs", "batch_size", "accumulate", "save_every") for value in NONE]
    bad += [
        ("warmup", -1),
        ("warmup", 1.0),
        ("seed", -1),
        ("seed", 2**63),
        ("decay", "exp"),
        ("optimizer", "none"),
        ("weight_decay", -0.1),
        ("warmup_ratio", -0.1),
        ("warmup_ratio", 1),
    ]
    bad += [(name, value) for name in ("lr", "clip") for value in (0, -1, float("nan"), float("inf"), "1", True)]
    bad += [("lr", LARGEST_LR * 1.01), ("patience", 3), ("eval_every", 0)]
    for name, value in bad:
        with pytest.raises(ValueError, match=f"^{name}="):
            FineTuning(**{name: value})
    with pytest.raises(ValueError, match="leave one out"):
        FineTuning(steps=3, epochs=1)
    assert FineTuning(lr=LARGEST_LR, clip=None, patience=1, eval_every=1).clip is None


def test_the_rows_of_all_steps_are_those_of_the_epochs_or_steps():
    assert FineTuning(batch_size=3, accumulate=2, epochs=2).total_rows(10) == 20
    assert FineTuning(batch_size=3).total_rows(10) == 10
    assert FineTuning(batch_size=3, accumulate=2, steps=5).total_rows(10, 2) == 60
    assert FineTuning(batch_size=4, warmup=2).total_rows(9) == 9
    with pytest.raises(ValueError, match="warmup=3 must be below the 3 steps"):
        FineTuning(batch_size=4, warmup=3).total_rows(9)


def rates_of(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_decays_and_the_warm_up_are_those_of_torch():
    made = {
        "none": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 20),
        "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    }
    assert made.keys() == DECAYS.keys()
    for decay, theirs in made.items():
        ours = FineTuning(lr=1.0, decay=decay)
        assert [ours.lr_at(step, 20) for step in range(20)] == pytest.approx(rates_of(theirs, 20), abs=1e-12)
    rising = rates_of(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1 / 5, 1.0, 4), 4)
    warms = FineTuning(lr=2.0, warmup=4, decay="linear")
    expected = [2 * rate for rate in [*rising, *(n / 6 for n in range(6, 0, -1))]]
    assert [warms.lr_at(step, 10) for step in range(10)] == pytest.approx(expected)


def test_every_step_has_a_rate_above_zero_and_none_above_the_peak():
    for decay in DECAYS:
        for warmup in (0, 1, 6):
            found = [FineTuning(lr=1.0, warmup=warmup, decay=decay).lr_at(step, 7) for step in range(7)]
            assert 0 < min(found) <= max(found) <= 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_called_steps_and_is_saved_as_the_loop_does(name):
    """Each step reads the rate of its only group. Weight decay is decoupled: it does not need a gradient."""
    assert FineTuning(optimizer=name).optimizer == name
    parameter = nn.Parameter(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    OPTIMIZERS[name]([parameter])
    optimizer = OPTIMIZERS[name]([parameter], lr=1.0, weight_decay=0.25)
    (group,) = optimizer.param_groups
    before = parameter.detach().clone()
    for rate, left in ((0.0, 1.0), (0.5, 0.875)):
        group["lr"], parameter.grad = rate, torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(parameter, left * before)
    parameter.grad = before.clone()
    optimizer.step()
    assert ((parameter.detach() - 0.875**2 * before) * before < 0).all()
    for key, value in optimizer.state[parameter].items():
        assert "." not in key
        assert torch.is_tensor(value) or json.loads(json.dumps(value)) == value
