"""What the strategies draw: properties prove nothing about shapes that hardly ever occur."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lowmem.quant.formats import FORMATS
from lowmem.quant.scales import ENCODINGS
from tests.compiled import given_stored

DRAWS = 1000


def drawn(*strategies: st.SearchStrategy) -> list[tuple]:
    """Return what hypothesis draws in so many examples: the same in every run, whatever the profile."""
    found = []

    @settings(
        derandomize=True,
        max_examples=DRAWS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def take(example):
        found.append(example)

    take()
    return found


@pytest.mark.thorough
def test_stored_matrices_have_tiles_long_rows_and_every_remainder():
    stored = [(*weight.shape, block) for weight, _, block, _ in drawn(*given_stored)]
    assert len(stored) >= 0.9 * DRAWS

    def share(holds):
        return sum(holds(*one) for one in stored) / len(stored)

    assert share(lambda rows, columns, block: rows >= 16) > 0.5
    assert share(lambda rows, columns, block: rows % 16 == 0) > 0.1
    assert share(lambda rows, columns, block: columns > 256) > 0.5
    assert share(lambda rows, columns, block: columns > block) > 0.5
    assert share(lambda rows, columns, block: rows >= 16 and columns > block) > 0.4
    assert share(lambda rows, columns, block: columns > block and columns % block) > 0.4  # the last block is short
    assert share(lambda rows, columns, block: rows < 16 or columns <= block) > 0.2  # small ones stay common
    assert {columns % 8 for _, columns, block in stored if block == 8} == set(range(8))
    for vector in (8, 16):  # what a vector of so many leaves over, in rows of several blocks
        assert {columns % vector for _, columns, block in stored if columns > block} == set(range(vector))


@pytest.mark.thorough
def test_stored_matrices_are_of_every_format_scale_and_layout():
    examples = drawn(*given_stored)
    for position, values in ((1, FORMATS), (3, ENCODINGS)):
        drawn_values = [example[position] for example in examples]
        assert min(drawn_values.count(value) for value in values) > 0.05 * len(examples)
    assert sum(not weight.is_contiguous() for weight, *_ in examples) > 0.1 * len(examples)
