"""How many times as fast as a reference a model is, measured in turns until the answer is sure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lowmem.testing.call import check_model, model_errors
from lowmem.testing.ratios import Ratio, ratio_of_times, seconds_per_call, take_turns

__all__ = ["CONFIDENCE", "Speedup", "measure_speedup"]

CONFIDENCE = 0.99  # of the interval: it is looked at a few times, and each look may err
BURST = 0.005  # seconds that a turn takes at least: longer than a timer's step and most interruptions
FEWEST_ROUNDS = 8  # however slow the calls are: with fewer pairs, all lie on one side by chance too often
FIRST_ROUNDS = 16  # before the first look, where there is time
MOST_ROUNDS = 128  # in all; more pairs would take longer to bootstrap than to measure


@dataclass(frozen=True)
class Speedup:
    """The verdict on a candidate.

    Attributes:
        ratio: the reference's seconds over the candidate's: above 1 the candidate is faster.
        at_least: what is asked for.
    """

    ratio: Ratio
    at_least: float

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the interval lies on one side of what is asked for; else "undecided"."""
        if self.ratio.low >= self.at_least:
            return "faster"
        return "slower" if self.ratio.high < self.at_least else "undecided"

    def __str__(self) -> str:
        ratio = self.ratio
        return (
            f"{ratio.value:.2f} times as fast as the reference ({CONFIDENCE:.0%} interval {ratio.low:.2f} to "
            f"{ratio.high:.2f}, {ratio.pairs} pairs of times), and {self.at_least:g} times are asked for"
        )


def measure_speedup(
    candidate: Callable[..., object],
    reference: Callable[..., object],
    *inputs: Any,
    at_least: float = 1.0,
    seconds: float = 60.0,
    timer: Callable[[], float] = perf_counter,
    **named: Any,
) -> Speedup:
    """Measure ``reference's seconds / candidate's seconds`` in turns (ABBA).

    Pairs of times are added until the interval of the ratio lies wholly above or below ``at_least``, or the time is
    up. Modules are called in eval mode and without gradients; other callables are called as they are.

    Args:
        candidate: a module or another callable.
        reference: what it is compared with, called with the same inputs.
        *inputs: for both.
        at_least: how many times as fast the candidate has to be; below 1 it may be slower.
        seconds: to spend; eight pairs of times are taken even where they need more.
        timer: returns seconds.
        **named: further inputs.

    Raises:
        ModelError: one of the two fails on the inputs.
        ValueError: ``at_least`` or ``seconds`` is no positive, finite number.
    """
    for name, value in (("at_least", at_least), ("seconds", seconds)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be a positive, finite number")
    start = timer()
    with _ready(candidate, inputs, named) as run, _ready(reference, inputs, named) as against:
        sides = [_turn(run, timer, "the candidate"), _turn(against, timer, "the reference")]
        mine: list[float] = []
        theirs: list[float] = []
        before = timer()
        take_turns(sides, 1)
        affordable = int(seconds / max(timer() - before, BURST))
        rounds = max(FEWEST_ROUNDS, min(affordable, FIRST_ROUNDS))
        while True:
            for own, times in zip((mine, theirs), take_turns(sides, rounds), strict=True):
                own += times
            found = Speedup(ratio_of_times(theirs, mine, bound=at_least, confidence=CONFIDENCE), at_least)
            spent = timer() - start
            rounds = len(mine)  # as many again
            if found.verdict != "undecided" or 2 * rounds > MOST_ROUNDS or 2 * spent > seconds:
                return found


@contextmanager
def _ready(call: Callable[..., object], inputs: Any, named: Any) -> Iterator[Callable[[], object]]:
    """Give a call without arguments; a module is in eval mode meanwhile, and takes no gradients."""
    if not isinstance(call, nn.Module):
        yield lambda: call(*inputs, **named)
        return
    check_model(call, inputs, named)
    modes = {module: module.training for module in call.modules()}

    def run() -> object:
        with torch.no_grad():
            return call(*inputs, **named)

    call.eval()
    try:
        yield run
    finally:
        for module, mode in modes.items():
            module.training = mode


def _turn(run: Callable[[], object], timer: Callable[[], float], name: str) -> Callable[[], float]:
    """Warm a call up, and return what takes its seconds in a burst that is long enough to be timed."""
    with model_errors(name):
        run()

    def burst() -> None:
        for _ in range(calls):
            run()
        if torch.cuda.is_initialized():  # which works on while Python goes on, whatever the call returns
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)

    def turn() -> float:
        with model_errors(name):
            return seconds_per_call(burst, timer=timer)

    calls = 1
    while (taken := turn()) < BURST and calls < 10_000_000:
        calls = calls * 10 if taken < BURST / 10 else math.ceil(calls * BURST / taken * 1.1)
    return lambda: turn() / calls
