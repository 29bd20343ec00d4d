"""What the two commands share: a number in their arguments, tests without a change, and how they end on bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Container, Iterable, Sequence
from typing import TypeVar

from tests.faults.copies import Outcome

Tests = TypeVar("Tests")
LINES = 30  # of the output of tests that fail


def natural(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def refuse(command: str, reason: str) -> int:
    """Say in one line why a command cannot run, and return its exit code."""
    print(f"{command}: {' '.join(reason.split())[:280]}", file=sys.stderr)
    return 2


def clean_outcomes(
    runs: Iterable[tuple[Tests, Outcome]], fine: Container[str]
) -> tuple[dict[Tests, Outcome], list[Tests]]:
    """Return how tests end without a change, and those that fail, which could not tell a change: print these."""
    ended, broken = {}, []
    for tests, outcome in runs:
        ended[tests] = outcome
        if outcome.verdict not in fine:
            broken.append(tests)
            print(f"FAILED    without a change: {tests} {outcome.verdict}: {outcome.first}")
            print(*outcome.output.splitlines()[-LINES:], sep="\n", flush=True)
    return ended, broken


def refuse_broken(broken: Sequence[object], left: int) -> None:
    """Raise a ValueError where tests fail without a change, which so many changes need that were not tried."""
    if broken:
        count = f"{len(broken)} sets of tests fail, and {left} were not tried"
        raise ValueError(f"without a change {count}: first {broken[0]}")
