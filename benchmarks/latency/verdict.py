"""From times to verdicts: pure functions of numbers. docs/benchmarking.md says what makes a workload slower.

The unit of all statistics is a round, which starts processes of its own: layout, allocator and hash seed stay the
same as long as a process lives, so that calls of one process are no independent witnesses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import compress

from statsmodels.stats.multitest import multipletests

from lowmem.testing.ratios import Ratio, hodges_lehmann, ratio_of_times
from lowmem.testing.verdicts import Row

FEWEST_FIRST = 0.5  # share of the first rounds that have to be undisturbed
FEWEST_AGAIN = 6  # rounds after which a workload whose estimate is within the threshold is the same
ALPHA = 0.01  # of a false alarm anywhere in one run, before threshold and floor make it rarer


@dataclass
class Times:
    """Seconds per call of one workload, one entry a round: base, head, and base again in another process.

    ``undisturbed`` says of each round whether no other work disturbed it.
    """

    clock: str
    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    undisturbed: list[bool] = field(default_factory=list)

    def clean(self) -> Times:
        if all(self.undisturbed):
            return self
        base, head, again = (list(compress(own, self.undisturbed)) for own in (self.base, self.head, self.again))
        return Times(self.clock, base, head, again)

    def disturbed(self) -> int:
        return self.undisturbed.count(False)

    def ratio(self) -> Ratio:
        """Estimate head against base, which ran twice as often."""
        return ratio_of_times(self.head, self.of_base())

    def estimate(self) -> float:
        logs = [math.log(head / base) for head, base in zip(self.head, self.of_base(), strict=True)]
        return math.exp(hodges_lehmann(logs))

    def inverse(self) -> Ratio:
        """Estimate base against head, whose p-value is that of an improvement."""
        return ratio_of_times(self.of_base(), self.head)

    def of_base(self) -> list[float]:
        """Return the geometric mean of base's two times in each round."""
        return [math.sqrt(one * other) for one, other in zip(self.base, self.again, strict=True)]

    def floor(self) -> float:
        """Return the noise floor: the ratio that base against base may have, by the far end of its interval."""
        noise = ratio_of_times(self.again, self.base)
        return max(noise.high, 1 / noise.low)


def needs_second_look(times: Times, threshold: float) -> bool:
    """Whether a workload has to be measured again: it looks different, or other work disturbed too many rounds."""
    clean = times.clean()
    return len(clean.head) < FEWEST_FIRST * len(times.head) or looks_different(clean, threshold)


def looks_different(times: Times, threshold: float) -> bool:
    """Whether head lies beyond the threshold on either side."""
    return abs(math.log(times.estimate())) > math.log1p(threshold)


def judge(first: dict[str, Times], second: dict[str, Times], threshold: float) -> list[Row]:
    """Return a row for each workload; ``second`` is what those took that needed a second look."""
    p_values = dict.fromkeys(first, 1.0)
    for name, times in second.items():
        if len((clean := times.clean()).head) >= FEWEST_AGAIN:
            ratio = clean.ratio()
            p_values[name] = ratio.p_value if ratio.value > 1 else clean.inverse().p_value
    corrected = multipletests(list(p_values.values()), method="holm")[1] if p_values else []
    adjusted = dict(zip(p_values, map(float, corrected), strict=True))
    return [_row(name, times, second.get(name), threshold, adjusted[name]) for name, times in first.items()]


def _row(name: str, first: Times, second: Times | None, threshold: float, p_value: float) -> Row:
    times = second or first
    if len(times.clean().head) >= 2:
        times = times.clean()
    ratio = times.ratio()
    verdict, says = ("same", "") if second is None else _of_second_look(first.estimate(), second, threshold, p_value)
    base, head = _center(times.of_base()), _center(times.head)
    return Row(name, f"{times.clock} seconds", base, head, ratio.value, ratio.low, ratio.high, verdict, says)


def _of_second_look(looked: float, second: Times, threshold: float, p_value: float) -> tuple[str, str]:
    """Return the verdict on what was measured again, and what it rests on."""
    disturbed, second = second.disturbed(), second.clean()
    beside = f"other work disturbed {disturbed} of {disturbed + len(second.head)} fresh rounds"
    if len(second.head) < FEWEST_AGAIN:
        return "undecided", f"{beside}: measure on a quieter machine"
    found, floor = second.estimate(), second.floor()
    change = max(found, 1 / found)
    again = f"{_percent(looked)} at first, {_percent(found)} in {len(second.head)} fresh rounds"
    if change <= 1 + threshold:
        return "same", f"{again}: within the threshold"
    unproven = "undecided" if disturbed else "same"
    again = f"{again}, and {beside}" if disturbed else again
    if change <= floor:
        return unproven, f"{again}: no more than base differs from base ({_percent(floor)})"
    if p_value >= ALPHA:
        return unproven, f"{again}: the rounds do not agree (corrected p = {p_value:.2g})"
    word = "slower" if found > 1 else "faster"
    return word, f"{again}; base against base {_percent(floor)}, corrected p = {p_value:.1g}"


def _center(seconds: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, seconds)) / len(seconds))


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"
