"""Measures the speedup of a model over a reference, in turns, until its confidence interval decides."""

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

CONFIDENCE = 0.99  # of the interval; high, since it is checked several times, and each check may err
BURST = 0.005  # least seconds of a turn: longer than the timer's resolution and most interruptions
CALIBRATING = 3  # turns per number of calls, while the calls of a burst are calibrated
FEWEST_ROUNDS = 8  # however slow the calls are: fewer pairs too often lie on one side by chance
FIRST_ROUNDS = 16  # rounds before the first check, if the time allows
MOST_ROUNDS = 128  # in all; to bootstrap more pairs would take longer than to measure them


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the reference a candidate is.

    Attributes:
        ratio: the reference's seconds divided by the candidate's: above 1, the candidate is faster.
        at_least: the required ratio.
    """

    ratio: Ratio
    at_least: float

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the interval lies on one side of ``at_least``, else "undecided"."""
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

    Pairs of times are added until the interval of the ratio lies above or below ``at_least``, there are 128 pairs, or
    more would exceed the time limit.
    Modules are called in eval mode without gradients; other callables as they are.

    Args:
        candidate: a module or another callable.
        reference: a module or another callable to compare with, called with the same inputs.
        *inputs: positional arguments of both.
        at_least: how many times as fast the candidate must be; below 1 it may be slower.
        seconds: the time limit; at least eight pairs of times are taken, even if they take longer.
        timer: returns seconds.
        **named: keyword arguments of both.

    Raises:
        ModelError: one of the two fails on the inputs, or is a module on the meta device.
        ValueError: ``at_least`` or ``seconds`` is not a positive, finite number.
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
            rounds = len(mine)  # doubles the number of pairs
            if found.verdict != "undecided" or 2 * rounds > MOST_ROUNDS or 2 * spent > seconds:
                return found


@contextmanager
def _ready(call: Callable[..., object], inputs: Any, named: Any) -> Iterator[Callable[[], object]]:
    """Yield a call without arguments; a module is put in eval mode meanwhile, and computes no gradients."""
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
    """Warm up a call, and return a function that times it: seconds per call, in bursts of ``BURST`` or more."""
    with model_errors(name):
        run()

    def burst() -> None:
        for _ in range(calls):
            run()
        if torch.cuda.is_initialized():  # CUDA kernels may still run after the call
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)

    def turn() -> float:
        with model_errors(name):
            return seconds_per_call(burst, timer=timer)

    calls = 1
    # Disturbances only add time, so the shortest of several turns is the best estimate.
    while (taken := min(turn() for _ in range(CALIBRATING))) < BURST and calls < 10_000_000:
        calls = calls * 10 if taken < BURST / 10 else math.ceil(calls * BURST / taken * 1.1)
    return lambda: turn() / calls
