"""Ratios of times: the estimate's symmetries, what spoils a list of times, and the order of turns."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.testing.ratios import Ratio, hodges_lehmann, ratio_of_times, take_turns

seconds = st.floats(1e-6, 1e3)
times = st.lists(st.tuples(seconds, seconds), min_size=4, max_size=12)


def estimate(pairs, **options):
    numerator, denominator = zip(*pairs, strict=True)
    return ratio_of_times(numerator, denominator, **options)


def test_the_shift_is_the_median_of_the_walsh_averages():
    batch = np.array([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]])
    assert hodges_lehmann(batch[0]) == 1.75  # of 0, 0.5, 1, 2.5, 3, 5
    assert hodges_lehmann(batch, axis=1).tolist() == [1.75, 2.0]
    assert hodges_lehmann(batch.T, axis=0).tolist() == [1.75, 2.0]
    assert hodges_lehmann([1.0] * 9 + [1000.0]) == 1.0  # one outlier


@given(times)
def test_exchanging_the_sides_inverts_the_ratio_and_its_interval(pairs):
    forth, back = estimate(pairs), estimate([(b, a) for a, b in pairs])
    assert math.isclose(forth.value * back.value, 1, rel_tol=1e-9)
    assert math.isclose(forth.low * back.high, 1, rel_tol=1e-9)
    assert math.isclose(forth.high * back.low, 1, rel_tol=1e-9)


@given(times, st.sampled_from([0.5, 2.0, 1024.0]))
def test_one_side_k_times_as_slow_has_k_times_the_ratio(pairs, factor):
    once, scaled = estimate(pairs), estimate([(a * factor, b) for a, b in pairs])
    for before, after in zip((once.value, once.low, once.high), (scaled.value, scaled.low, scaled.high), strict=True):
        assert math.isclose(after, before * factor, rel_tol=1e-9)


@given(times)
def test_the_ratio_lies_in_its_interval_and_among_the_ratios(pairs):
    ratio = estimate(pairs)
    ratios = [a / b for a, b in pairs]
    assert min(ratios) * (1 - 1e-9) <= ratio.low <= ratio.high <= max(ratios) * (1 + 1e-9)
    assert ratio.low <= ratio.value <= ratio.high
    assert 0 < ratio.p_value <= 1
    assert ratio.pairs == len(pairs)
    assert estimate(pairs) == ratio
    assert math.isclose(estimate(pairs[::-1]).value, ratio.value, rel_tol=1e-9)


@given(st.lists(seconds, min_size=2, max_size=12))
def test_identical_times_have_the_ratio_one_exactly(same):
    assert ratio_of_times(same, same) == Ratio(1.0, 1.0, 1.0, 1.0, len(same))


def test_the_p_value_is_of_a_ratio_at_most_the_bound():
    slower = [(1.2 + i / 1000, 1.0) for i in range(10)]
    assert estimate(slower).p_value == pytest.approx(2**-10)  # all ten signs agree
    assert estimate(slower, bound=1.1).p_value == pytest.approx(2**-10)
    assert estimate(slower, bound=1.5).p_value == 1.0
    assert estimate([(b, a) for a, b in slower]).p_value == 1.0
    assert estimate([(1.0, 1.0)] * 9 + [(1.5, 1.0)]).p_value > 0.05  # times tied at the bound are no evidence


def test_more_confidence_is_a_wider_interval():
    pairs = [(1 + i % 7 / 10, 1.0) for i in range(20)]
    narrow, wide = estimate(pairs, confidence=0.5), estimate(pairs, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("numerator", "denominator", "says"),
    [
        ([], [], "0 pairs of times are too few: give at least 2"),
        ([1.0], [1.0], "1 pair of times is too few: give at least 2"),
        ([1.0, 2.0], [1.0], "2 times against 1: each needs its partner"),
        ([1.0, math.nan], [1.0, 1.0], "time nan is not a positive, finite number of seconds"),
        ([1.0, 1.0], [1.0, 0.0], "time 0.0 is not"),
        ([1e308, 1e308], [1e-308, 1e-308], "the ratio of 1e.308 to 1e-308 seconds is not a finite number"),
        ([[1.0, 2.0]], [[1.0, 2.0]], r"times of shape \(1, 2\): give one list of numbers"),
        (["a", "b"], [1.0, 1.0], "times must be numbers"),
    ],
)
def test_bad_times_are_refused(numerator, denominator, says):
    with pytest.raises(ValueError, match=says):
        ratio_of_times(numerator, denominator)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *(("bound", value, "must be a positive, finite ratio") for value in (0.0, -1.0, math.nan, math.inf)),
        *(("confidence", value, "must lie between 0 and 1") for value in (0.0, 1.0, 95.0, math.nan)),
    ],
)
def test_a_bad_bound_or_confidence_is_refused(name, value, says):
    with pytest.raises(ValueError, match=f"{name}={value} {says}"):
        ratio_of_times([1.0, 2.0], [1.0, 2.0], **{name: value})


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf]])
def test_a_shift_of_nothing_or_of_no_numbers_is_refused(values):
    with pytest.raises(ValueError, match="finite"):
        hodges_lehmann(values)


def test_turns_go_there_and_back():
    order = []

    def side(name, own):
        return lambda: order.append(name) or next(own)

    first, second = side("A", iter([1.0, 3.0, 5.0, 5.0])), side("B", iter([2.0, 2.0, 4.0, 6.0]))
    assert take_turns([first, second], rounds=2) == [[2.0, 5.0], [2.0, 5.0]]
    assert "".join(order) == "ABBAABBA"


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        take_turns([lambda: 1.0], rounds=0)
