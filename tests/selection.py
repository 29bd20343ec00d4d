"""Which tests run, and which cases of a cross product: a selection by default, and all of them every night."""

import os
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product

import pytest

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
FULL = PROFILE in ("full", "nightly")
"""Whether all tests run, with whole cross products, and at every ISA of the processor."""

MARKERS = {
    "processes": "starts processes",
    "compile": "waits for torch.compile",
    "distributed": "runs in several processes of torch.distributed",
    "gates": "runs a gate or a benchmark",
    "thorough": "takes many cases of what another test takes a few of",
}
"""Markers of tests that are left out by default, but for a few of each kind (``tests/conftest.py``)."""


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


def _rows(strength: int, axes: dict[str, Iterable]) -> list[tuple]:
    unordered = [name for name, values in axes.items() if isinstance(values, (set, frozenset))]
    if unordered:  # of strings, whose order is another one in each process: pytest-xdist refuses to run such tests
        raise TypeError(f"{unordered} must have an order: pass a tuple or a list, not a set")
    if FULL or len(axes) == 1:
        return list(product(*axes.values()))
    return selection(axes.values(), strength if PROFILE == "faults" else 1)


def covering(strength: int = 2, **axes: Iterable) -> pytest.MarkDecorator:
    """Parametrize a test with each value of each axis at least once; where ``FULL`` is true, with the cross product.

    Args:
        strength: of the selection that planted faults and mutants are tried with: 2 for every pair of values.
        axes: the values of each argument, which can be hashed; not a set, whose order differs between processes.
    """
    return pytest.mark.parametrize(tuple(axes), _rows(strength, axes))
