"""Which cases of a cross product a test runs with: a selection, and in the nightly profile all."""

import os
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product

import pytest

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
"""Whether tests run with every combination of what they are parametrized with, and at every ISA of the processor."""


def selection(axes: Iterable[Iterable], strength: int) -> list[tuple]:
    """Return rows of the cross product, in its order, that hold every combination of values of ``strength`` axes.

    Greedy: the next row is the one with the most combinations that are missing, and of these the one whose values
    were taken the least often.
    """
    rows = list(product(*axes))
    held = [set(combinations(enumerate(row), strength)) for row in rows]
    missing, uses, taken = set().union(*held), Counter(), []
    while missing:
        best = max(
            range(len(rows)), key=lambda i: (len(held[i] & missing), -sum(uses[v] for v in enumerate(rows[i])))
        )
        missing -= held[best]
        uses.update(enumerate(rows[best]))
        taken.append(best)
    return [rows[i] for i in sorted(taken)]


def covering(strength: int = 2, **axes: Iterable) -> pytest.MarkDecorator:
    """Parametrize a test with values of each axis: every pair of them, and in the nightly profile the cross product.

    Args:
        strength: 1 where every value once is enough.
        axes: the values of each argument, which can be hashed.
    """
    rows = list(product(*axes.values())) if NIGHTLY else selection(axes.values(), strength)
    return pytest.mark.parametrize(tuple(axes), rows)
