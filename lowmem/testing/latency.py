"""Measures the speedup of a model over a reference, in turns, until its confidence interval decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lowmem.measure import unchanged
from lowmem.testing.disturbance import LONG, Watch
from lowmem.testing.ratios import Ratio, ratio_of_times, take_turns
from lowmem.testing.user_model import check_model_and_inputs, exceptions_as_model_errors

CONFIDENCE = 0.99  # of the interval; high, since it is checked several times, and each check may err
# Least seconds of a burst: above the timer's resolution, below what another process gets at once
BURST = 0.001
# Bursts of a turn, whose median counts; calls longer than ``LONG`` have one burst
BURSTS = 3
# Bursts per number of calls, while the calls of a burst are calibrated
CALIBRATING = 3
# However slow the calls are: fewer pairs too often lie on one side by chance
FEWEST_ROUNDS = 8
# Rounds before the first check, if the time allows
FIRST_ROUNDS = 16
# In all; to bootstrap more pairs would take longer than to measure them
MOST_ROUNDS = 128
# Quantile of the times that other work disturbed least
FASTEST = 0.1
# Beside other work: its use of caches and memory changed ratios by up to this, though no thread waited
MARGIN = 1.1


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the reference a candidate is.

    Attributes:
        ratio: the reference's seconds divided by the candidate's: above 1, the candidate is faster.
        at_least: the required ratio.
        disturbance: why the times do not decide, where other work disturbed the measurement; else empty.
    """

    ratio: Ratio
    at_least: float
    disturbance: str = ""

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the interval lies on one side of ``at_least``, else "undecided"."""
        if self.disturbance:
            return "undecided"
        if self.ratio.low >= self.at_least:
            return "faster"
        return "slower" if self.ratio.high < self.at_least else "undecided"

    def __str__(self) -> str:
        ratio = self.ratio
        return (
            f"{ratio.value:.2f} times as fast as the reference ({CONFIDENCE:.0%} interval {ratio.low:.2f} to "
            f"{ratio.high:.2f}, {ratio.pairs} pairs of times), and {self.at_least:g} times are asked for"
            f"{f'; {self.disturbance}' if self.disturbance else ''}"
        )


def measure_speedup(
    candidate: Callable[..., object],
    reference: Callable[..., object],
    *inputs: Any,
    at_least: float = 1.0,
    seconds: float = 60.0,
    timer: Callable[[], float] = perf_counter,
    watch: Watch | None = None,
    **named: Any,
) -> Speedup:
    """Measure ``reference's seconds / candidate's seconds`` in turns (ABBA).

    Pairs of times are added until the interval of the ratio lies above or below ``at_least``, there are 128 pairs, or
    more would exceed the time limit. Where other work takes part of the machine, only pairs during which no thread
    waited for a core decide.
    Modules are called in eval mode without gradients; other callables as they are.

    Args:
        candidate: a module or another callable.
        reference: a module or another callable to compare with, called with the same inputs.
        *inputs: positional arguments of both.
        at_least: how many times as fast the candidate must be; below 1 it may be slower.
        seconds: the time limit; at least eight pairs of times are taken, even if they take longer.
        timer: returns seconds.
        watch: notices other work; None: a ``Watch`` that reads the operating system's counters.
        **named: keyword arguments of both.

    Raises:
        ModelError: one of the two fails on the inputs, or is a module on the meta device.
        ValueError: ``at_least`` or ``seconds`` is not a positive, finite number.
    """
    for name, value in (("at_least", at_least), ("seconds", seconds)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be a positive, finite number")
    start = timer()
    watch = watch or Watch()
    with (
        _bound_call_in_eval_mode(candidate, inputs, named) as run,
        _bound_call_in_eval_mode(reference, inputs, named) as against,
    ):
        turns: tuple[list[float], list[float]] = ([], [])  # of the candidate, and of the reference
        sides = [
            _warm_up_and_make_timed_turn(run, timer, watch, turns[0], "the candidate"),
            _warm_up_and_make_timed_turn(against, timer, watch, turns[1], "the reference"),
        ]
        before = timer()
        take_turns(sides, 1)
        affordable = int(seconds / max(timer() - before, BURST))
        rounds = max(FEWEST_ROUNDS, min(affordable, FIRST_ROUNDS))
        while True:
            for _ in range(rounds):
                watch.round(lambda: take_turns(sides, 1))
            # Doubles the number of pairs
            rounds = len(watch.undisturbed)
            result, used = _speedup_and_pair_count(
                np.array(turns)[:, -2 * rounds :].reshape(2, rounds, 2), at_least, watch
            )
            spent = timer() - start
            if result.verdict != "undecided" or 2 * used > MOST_ROUNDS or 2 * spent > seconds:
                return result


def _speedup_and_pair_count(
    turn_seconds: npt.NDArray[np.float64], at_least: float, watch: Watch
) -> tuple[Speedup, int]:
    """Return the speedup of ``turns``, seconds (2, rounds, 2) of candidate and reference, and how many pairs it rests
    on: beside other work, the undisturbed ones."""

    def speedup_from_turns(turns: npt.NDArray[np.float64], disturbance: str = "") -> Speedup:
        mine, theirs = turns.mean(axis=2)  # (rounds,) each
        return Speedup(ratio_of_times(theirs, mine, bound=at_least, confidence=CONFIDENCE), at_least, disturbance)

    rounds = turn_seconds.shape[1]
    if not watch.disturbed():
        return speedup_from_turns(turn_seconds), rounds
    clean = turn_seconds[:, watch.undisturbed]  # (2, clean rounds, 2)
    if clean.shape[1] < FEWEST_ROUNDS:
        return speedup_from_turns(turn_seconds, watch.says()), clean.shape[1]
    undisturbed_speedup = speedup_from_turns(clean)
    mine, theirs = np.quantile(clean, FASTEST, axis=(1, 2))
    slower = max(undisturbed_speedup.ratio.high, theirs / mine) < at_least / MARGIN
    faster = min(undisturbed_speedup.ratio.low, theirs / mine) >= at_least * MARGIN
    return (
        undisturbed_speedup if slower or faster else replace(undisturbed_speedup, disturbance=watch.says())
    ), undisturbed_speedup.ratio.pairs


@contextmanager
def _bound_call_in_eval_mode(
    function: Callable[..., object], args: Any, kwargs: Any
) -> Iterator[Callable[[], object]]:
    """Yield a call without arguments; a module is put in eval mode meanwhile, and computes no gradients."""
    if not isinstance(function, nn.Module):
        yield lambda: function(*args, **kwargs)
        return
    check_model_and_inputs(function, args, kwargs)

    def call_without_gradients() -> object:
        with torch.no_grad():
            return function(*args, **kwargs)

    with unchanged(function, training=False):
        yield call_without_gradients


def _warm_up_and_make_timed_turn(
    run: Callable[[], object], timer: Callable[[], float], watch: Watch, turn_seconds: list[float], side_name: str
) -> Callable[[], float]:
    """Warm up a call; return a function that times it in bursts, and adds the seconds a call to ``turn_seconds``."""
    with exceptions_as_model_errors(side_name):
        run()

    def run_burst_and_get_seconds() -> float:
        with exceptions_as_model_errors(side_name):
            start = timer()
            for _ in range(calls):
                run()
            # CUDA kernels may still run after the call
            if torch.cuda.is_initialized():
                for device in range(torch.cuda.device_count()):
                    torch.cuda.synchronize(device)
            return timer() - start

    calls = 1
    # Disturbances only add time, so the shortest of several bursts is the best estimate.
    while (taken := min(run_burst_and_get_seconds() for _ in range(CALIBRATING))) < BURST and calls < 10_000_000:
        calls = calls * 10 if taken < BURST / 10 else math.ceil(calls * BURST / taken * 1.1)
    bursts = 1 if taken > LONG else BURSTS

    def append_and_get_turn_seconds() -> float:
        turn_seconds.append(watch.turn(run_burst_and_get_seconds, bursts) / calls)
        return turn_seconds[-1]

    return append_and_get_turn_seconds
