"""Compares two durations by the ratio of times measured in turns, in which the state of the machine cancels, with an
interval and a p-value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

RESAMPLES = 2000  # of the bootstrap: another seed moves the ends of a 95% interval by a few hundredths of its width
# Most Walsh averages that exist at once: 32 MB
BATCH_VALUES = 4_000_000
# The p-value is exact up to this many pairs
EXACT_PAIRS = 50


@dataclass(frozen=True)
class Ratio:
    """How many times as long one duration is as another.

    Attributes:
        value: the Hodges-Lehmann estimate.
        low: lower end of the bootstrap interval.
        high: upper end of it.
        p_value: one-sided, of the hypothesis that the ratio is at most ``bound``.
        pairs: the number of pairs of times.
    """

    value: float
    low: float
    high: float
    p_value: float
    pairs: int


def hodges_lehmann(values: npt.ArrayLike, axis: int = -1) -> Any:
    """Return the median of the Walsh averages, ``median((x_i + x_j) / 2, i <= j)``.

    It estimates the center of a symmetric distribution almost as efficiently as the mean (95% for normal noise), and
    is robust: its breakdown point is 29%.

    Args:
        values: (..., n, ...), finite.
        axis: of the n values.

    Returns:
        A float64, or an array of the other axes.

    Raises:
        ValueError: no values, or one that is not finite.

    Source: Hodges and Lehmann, Estimates of location based on rank tests (1963), equation 1.1.
    """
    x = np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1)
    if x.shape[-1] == 0 or not np.isfinite(x).all():
        raise ValueError("the shift is estimated from finite numbers, of which there is at least one")
    first, second = np.triu_indices(x.shape[-1])
    return np.median((x[..., first] + x[..., second]) / 2, axis=-1)


def ratio_of_times(
    numerator: Sequence[float], denominator: Sequence[float], *, bound: float = 1.0, confidence: float = 0.95
) -> Ratio:
    """Estimate ``numerator / denominator`` from pairs of times.

    The estimate is ``exp(hodges_lehmann(log(numerator / denominator)))``, the interval is a percentile bootstrap over
    the pairs, and the p-value is that of Wilcoxon's signed-rank test. All assume independent pairs, which those from
    one process are only nearly, since its memory layout never changes.

    Args:
        numerator: n seconds, each measured next to its partner in ``denominator``.
        denominator: n seconds.
        bound: the largest ratio under the null hypothesis of ``p_value``.
        confidence: of the interval.

    Raises:
        ValueError: fewer than two pairs, a time that is not positive and finite, or a bad bound or confidence.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"bound={bound} must be a positive, finite ratio")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does")
    top, bottom = _checked_times(numerator), _checked_times(denominator)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} times against {len(bottom)}: each needs its partner, measured next to it")
    if len(top) < 2:
        many = "1 pair of times is" if len(top) else "0 pairs of times are"
        raise ValueError(f"{many} too few: give at least 2")
    logs = np.log(top) - np.log(bottom)
    for log, above, below in zip(logs, top, bottom, strict=True):
        # Exp would overflow or underflow
        if abs(log) > 700:
            raise ValueError(f"the ratio of {above} to {below} seconds is not a finite number that can be compared")
    shift = float(hodges_lehmann(logs))
    interval = stats.bootstrap(
        (logs,),
        hodges_lehmann,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_VALUES // (len(logs) * (len(logs) + 1) // 2)),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",  # other methods divide by zero where all pairs are equal
        random_state=np.random.default_rng(0),  # the same times give the same verdict
    ).confidence_interval
    # Where most pairs are equal, rounding may put the estimate just outside an interval of width 0.
    low, high = min(float(interval.low), shift), max(float(interval.high), shift)
    return Ratio(
        math.exp(shift), math.exp(low), math.exp(high), _one_sided_wilcoxon_p_value(logs - math.log(bound)), len(logs)
    )


def take_turns(sides: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Measure sides in turns, forwards then backwards: ABBA, or ABCCBA.

    A machine that slows down steadily during a round slows all sides equally.

    Args:
        sides: each measures once and returns seconds.
        rounds: how often.

    Returns:
        For each side, ``rounds`` times in seconds, each the mean of its two turns in a round.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        forwards = [side() for side in sides]
        backwards = [side() for side in reversed(sides)][::-1]
        for side_times, first, second in zip(times, forwards, backwards, strict=True):
            side_times.append((first + second) / 2)
    return times


def _checked_times(seconds: Sequence[float]) -> npt.NDArray[np.float64]:
    try:
        times = np.asarray(seconds, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"times must be numbers of seconds: {error}") from error
    if times.ndim != 1:
        raise ValueError(f"times of shape {times.shape}: give one list of numbers")
    for time in times:
        if not 0 < time < math.inf:
            raise ValueError(f"time {time} is not a positive, finite number of seconds")
    return times


def _one_sided_wilcoxon_p_value(log_ratios: npt.NDArray[np.float64]) -> float:
    """Return the one-sided p-value of Wilcoxon's signed-rank test that the center of ``log_ratios`` is at most 0."""
    moved = log_ratios[log_ratios != 0]
    if len(moved) == 0:
        return 1.0
    method = "exact" if len(moved) <= EXACT_PAIRS else "approx"
    return float(stats.wilcoxon(moved, alternative="greater", method=method).pvalue)
