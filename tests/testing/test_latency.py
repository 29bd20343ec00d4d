"""A speedup is decided by its interval, measured in turns on a clock that tests turn themselves."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from lowmem.testing import latency
from lowmem.testing.latency import FEWEST_ROUNDS, FIRST_ROUNDS, MOST_ROUNDS, Speedup, measure_speedup
from lowmem.testing.ratios import Ratio
from lowmem.testing.user_model import ModelError
from tests.testing.test_disturbance import Machine


class Clock(Machine):
    """A clock that moves during calls only."""

    def __call__(self):
        return self.now

    def call(self, seconds, noise=0.0, seed=0):
        draw = np.random.default_rng(seed)
        return lambda *inputs, **named: self.work(seconds * math.exp(noise * draw.standard_normal()))


@pytest.fixture(autouse=True)
def a_quiet_machine(monkeypatch):
    """Let no test depend on what else the machine does."""
    monkeypatch.setattr(latency, "Watch", lambda: Clock().watch())


@pytest.mark.parametrize(("at_least", "verdict"), [(1.9, "faster"), (2.1, "slower")])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_half_the_seconds_are_twice_as_fast(at_least, verdict, scale):
    clock = Clock()
    found = measure_speedup(clock.call(1 * scale), clock.call(2 * scale), at_least=at_least, seconds=30, timer=clock)
    assert found.ratio.value == pytest.approx(2)
    assert found.verdict == verdict
    assert found.ratio.pairs == (8 if scale == 1 else FIRST_ROUNDS)


def test_noise_is_measured_for_longer_before_a_verdict():
    clock = Clock()
    found = measure_speedup(clock.call(2e-2, 0.4), clock.call(2.4e-2, 0.4, seed=1), timer=clock)
    assert FIRST_ROUNDS < found.ratio.pairs <= MOST_ROUNDS
    assert found.verdict == "faster"


@pytest.mark.parametrize(("seconds", "pairs"), [(1e9, 128), (1.0, 8)])
def test_what_cannot_be_decided_ends_when_the_time_or_the_pairs_are_up(seconds, pairs):
    clock = Clock()
    candidate, reference = clock.call(0.2, 0.3), clock.call(0.4, 0.3, seed=1)
    found = measure_speedup(candidate, reference, at_least=2.0, seconds=seconds, timer=clock)
    assert (found.verdict, found.ratio.pairs) == ("undecided", pairs)


class Load:
    """Other work that interrupts calls: each takes longer by its share, in regimes of some calls."""

    def __init__(self, clock, slowdowns):
        self.clock, self.slowdowns = clock, slowdowns
        self.calls = 0

    def call(self, seconds, longer):
        def run():
            slowdown, waits = self.slowdowns[self.calls // 24 % len(self.slowdowns)]
            self.calls += 1
            taken = seconds * (slowdown if longer else 1)
            self.clock.work(taken, waits)

        return run


def beside(slowdowns, at_least, others=1.0, seconds=10, candidate=1e-3):
    """Compare with a reference of 2 ms that other work does not slow."""
    clock = Clock(others)
    load = Load(clock, slowdowns)
    sides = load.call(candidate, True), load.call(2e-3, False)
    return measure_speedup(*sides, at_least=at_least, seconds=seconds, timer=clock, watch=clock.watch())


@pytest.mark.parametrize(
    ("slowdowns", "at_least", "verdict"),
    [
        ([(4, 0.7)], 1.5, "undecided"),  # never undisturbed: the ratio would be 0.5, with a narrow interval
        ([(4, 0.7), (4, 0.7), (1, 0)], 1.5, "faster"),  # a third of the time is quiet
        ([(4, 0.7), (4, 0.7), (1, 0)], 2.5, "slower"),
        ([(1, 0)], 1.9, "undecided"),  # no thread waits, but the ratio is too close to what is asked for
        ([(1, 0)], 2.1, "undecided"),
        ([(3, 0)] * 4 + [(1, 0)], 1.5, "undecided"),  # slower by most times, and faster by the fastest ones
    ],
)
def test_beside_other_work_only_undisturbed_and_clear_times_decide(slowdowns, at_least, verdict):
    found = beside(slowdowns, at_least, seconds=1 if verdict == "undecided" else 10)
    assert found.verdict == verdict
    if verdict == "undecided":
        assert re.search(r"other work took (0.9|1.0) of 2 cores, and", str(found))
    else:
        assert found.ratio.pairs >= FEWEST_ROUNDS
        assert found.ratio.value == pytest.approx(2)
        assert not found.disturbance


def test_a_candidate_that_other_work_hides_never_passes():
    """It is 30% slower than its reference, which other work slows down even more."""
    for waits in (0.0, 0.5):
        assert beside([(1, waits), (2, 0.9)], 0.95, seconds=2, candidate=2.6e-3).verdict != "faster"


def test_threads_of_one_s_own_that_wait_for_each_other_are_no_other_work():
    """More threads than cores: each call waits, and nothing else takes a core."""
    found = beside([(1, 0.5)], 1.5, others=0.0)
    assert (found.verdict, found.ratio.pairs) == ("faster", FIRST_ROUNDS)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.5, 2.0, "faster"), (1.4999, 2.0, "undecided"), (1.0, 1.5, "undecided"), (1.0, 1.4999, "slower")],
)
def test_the_interval_has_to_lie_on_one_side(low, high, verdict):
    found = Speedup(Ratio(1.5, low, high, 0.5, 16), 1.5)
    assert found.verdict == verdict
    assert str(found).startswith(
        f"1.50 times as fast as the reference (99% interval {low:.2f} to {high:.2f}, 16 pairs"
    )


@pytest.mark.parametrize("disturbed", [0, 1], ids=["candidate", "reference"])
def test_a_disturbed_call_does_not_settle_how_many_make_a_turn(disturbed):
    """A turn of few calls is mostly the reading of the clock, and what disturbs falls into it less often."""
    clock, sides = Clock(), []

    def timer():
        clock.now += 1e-4  # it takes some time to read a clock
        return clock.now

    for number in range(2):
        first = iter([1e-4, 1.0 if number == disturbed else 1e-4])  # the second call is the first that is timed
        sides.append(lambda first=first: clock.call(next(first, 1e-4))())
    found = measure_speedup(*sides, at_least=0.5, timer=timer)
    assert found.ratio.value == pytest.approx(1, rel=0.01)


class Seen(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.layer, self.clock, self.seen = nn.Linear(4, 4), clock, set()

    def forward(self, x, *, more):
        self.clock.work(1e-2)
        out = self.layer(x) + more
        self.seen.add((self.training, out.requires_grad))
        return out


def test_a_module_runs_in_eval_mode_without_gradients_and_gets_its_mode_back():
    clock = Clock()
    model, calls = Seen(clock), clock.call(1e-2)
    model.layer.eval()
    measure_speedup(model, calls, torch.ones(2, 4), more=1, at_least=0.5, timer=clock)
    assert model.seen == {(False, False)}
    assert (model.training, model.layer.training) == (True, False)
    model.seen.clear()
    measure_speedup(lambda x, more: model(x, more=more), calls, torch.ones(2, 4), more=1, timer=clock)
    assert model.seen == {(True, True)}  # another callable keeps its gradients


@pytest.mark.parametrize("name", ["at_least", "seconds"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1.5", None, True])
def test_what_is_asked_for_must_be_a_positive_number(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a positive, finite number"):
        measure_speedup(len, len, [], **{name: value})


@pytest.mark.parametrize("broken", [0, 1])
def test_who_fails_is_named(broken):
    clock = Clock()
    model = nn.Linear(4, 4)
    sides = [clock.call(1.0), clock.call(1.0)]
    sides[broken] = model
    with pytest.raises(
        ModelError, match=f"the {('candidate', 'reference')[broken]} fails on the example input: Runt"
    ):
        measure_speedup(*sides, torch.ones(2, 5), timer=clock)
    assert model.training
