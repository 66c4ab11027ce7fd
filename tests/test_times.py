"""What is said of times: ratios of times taken side by side, and how far times spread."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convdispatch.times import median_ratio, paired_ratios, ratio, spread

#: Times, some of them too short for the clock.
TIMES = st.one_of(st.just(0.0), st.floats(1e-9, 1e3))


@given(TIMES, TIMES)
def test_a_ratio_says_who_is_slower_whatever_the_clock_can_tell(one: float, other: float) -> None:
    told, back = ratio(one, other), ratio(other, one)
    assert (told > 1, told == 1) == (one > other, one == other) or told == pytest.approx(1)
    if one and other:
        assert told * back == pytest.approx(1)
    else:
        assert {told, back} in ({1.0}, {0.0, math.inf})


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1), st.lists(TIMES))
def test_ratios_are_of_what_was_taken_side_by_side(pairs: list[tuple[float, float]], more: list[float]) -> None:
    ones, others = [one for one, _ in pairs], [other for _, other in pairs]
    assert paired_ratios([*ones, *more], others) == [ratio(one, other) for one, other in pairs]
    assert median_ratio(ones, ones) == 1


@given(drift=st.lists(st.floats(0.5, 4), min_size=3, max_size=30), slower=st.floats(0.2, 5))
def test_paired_ratios_do_not_see_what_slows_both(drift: list[float], slower: float) -> None:
    assert median_ratio([each * slower for each in drift], drift) == pytest.approx(slower)


@given(st.lists(TIMES, max_size=30), st.floats(0.1, 10))
def test_a_spread_is_a_share_whatever_the_unit(values: list[float], unit: float) -> None:
    told = spread(values)
    assert 0 <= told < math.inf
    assert spread([value * unit for value in values]) == pytest.approx(told)
    assert told == 0 or len(set(values)) > 1


def test_a_spread_is_the_interquartile_range_over_the_median() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([4.0]) == spread([]) == spread([0.0, 0.0, 1.0]) == 0
