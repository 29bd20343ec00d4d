"""From times to verdicts: pure functions of numbers. docs/benchmarking.md says what makes a workload slower.

The unit of all statistics is a round, which starts processes of its own: layout, allocator and hash seed stay the
same as long as a process lives, so that calls of one process are no independent witnesses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lowmem.testing.gate_verdicts import FigureComparison
from lowmem.testing.ratios import Ratio, hodges_lehmann, ratio_of_times

FEWEST_FIRST = 0.5  # share of the first rounds that have to be undisturbed
FEWEST_AGAIN = 6  # rounds after which a workload whose estimate is within the threshold is the same
ALPHA = 0.01  # of a false alarm anywhere in one run, before threshold and floor make it rarer


@dataclass
class Times:
    """Seconds per call of one workload in the rounds that no other work disturbed: base, head, and base again.

    ``disturbed`` counts the other rounds.
    """

    clock: str
    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)  # of base, in another process
    disturbed: int = 0

    @property
    def of_base(self) -> list[float]:
        """The geometric mean of base's two times in each round."""
        return [math.sqrt(one * other) for one, other in zip(self.base, self.again, strict=True)]

    def ratio(self) -> Ratio:
        """Estimate head against base, which ran twice as often."""
        return ratio_of_times(self.head, self.of_base)

    def estimate(self) -> float:
        logs = [math.log(head / base) for head, base in zip(self.head, self.of_base, strict=True)]
        return math.exp(hodges_lehmann(logs))

    def floor(self) -> float:
        """Return the noise floor: the ratio that base against base may have, by the far end of its interval."""
        noise = ratio_of_times(self.again, self.base)
        return max(noise.high, 1 / noise.low)


def needs_second_look(times: Times, threshold: float) -> bool:
    """Whether a workload has to be measured again: it looks different, or other work disturbed too many rounds."""
    undisturbed = len(times.head)
    return undisturbed < FEWEST_FIRST * (undisturbed + times.disturbed) or looks_different(times, threshold)


def looks_different(times: Times, threshold: float) -> bool:
    """Whether head lies beyond the threshold on either side."""
    return abs(math.log(times.estimate())) > math.log1p(threshold)


def settled(times: Times, threshold: float) -> bool:
    """Whether a second look needs no further round: head is within the threshold, or every round is disturbed."""
    if len(times.head) < FEWEST_AGAIN:
        return not times.head and times.disturbed >= FEWEST_AGAIN
    return not looks_different(times, threshold)


def judge(first: dict[str, Times], second: dict[str, Times], threshold: float) -> list[FigureComparison]:
    """Return a row for each workload; ``second`` is what those took that needed a second look."""
    rows = []
    for name, looked in first.items():
        times = second.get(name, looked)
        verdict, says = ("same", "") if name not in second else _second_look(looked, times, threshold, len(first))
        row = FigureComparison(name, f"{times.clock} seconds", verdict=verdict, says=says)
        if len(times.head) >= 2:
            ratio, base, head = times.ratio(), _center(times.of_base), _center(times.head)
            row = FigureComparison(name, row.figure, base, head, ratio.value, ratio.low, ratio.high, verdict, says)
        rows.append(row)
    return rows


def _second_look(first: Times, second: Times, threshold: float, workloads: int) -> tuple[str, str]:
    """Return the verdict on what was measured again, and what it rests on."""
    beside = f"other work disturbed {second.disturbed} of {second.disturbed + len(second.head)} fresh rounds"
    if len(second.head) < FEWEST_AGAIN:
        return "undecided", f"{beside}: measure on a quieter machine"
    looked = f"{_percent(first.estimate())} at first, " if first.head else ""
    found, floor = second.estimate(), second.floor()
    again = f"{looked}{_percent(found)} in {len(second.head)} fresh rounds"
    change = max(found, 1 / found)
    if change <= 1 + threshold:
        return "same", f"{again}: within the threshold"
    unproven = "undecided" if second.disturbed else "same"
    again = f"{again}, and {beside}" if second.disturbed else again
    if change <= floor:
        return unproven, f"{again}: no more than base differs from base ({_percent(floor)})"
    slower, faster = (second.head, second.of_base) if found > 1 else (second.of_base, second.head)
    # Bonferroni's correction: any of the workloads may be a false alarm.
    p_value = min(1.0, workloads * ratio_of_times(slower, faster).p_value)
    if p_value >= ALPHA:
        return unproven, f"{again}: the rounds do not agree (corrected p = {p_value:.2g})"
    word = "slower" if found > 1 else "faster"
    return word, f"{again}; base against base {_percent(floor)}, corrected p = {p_value:.1g}"


def _center(seconds: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, seconds)) / len(seconds))


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"
