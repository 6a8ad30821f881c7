"""The arithmetic of a comparison: spreads and intervals against the standard library and known tables, steps on curves."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.studies import measures

FINITE = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.lists(FINITE, min_size=2, max_size=40))
def test_mean_and_spread_are_those_of_the_standard_library(values: list[float]) -> None:
    assert measures.mean(values) == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert measures.spread(values) == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)


def test_the_interval_is_students_not_the_normal_distributions() -> None:
    """# T23 three seeds: 4.303 standard errors to either side, not 1.96."""
    values = [0.30, 0.34, 0.38]
    assert measures.interval(values) == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3), rel=1e-9)
    many = [float(number % 2) for number in range(100)]
    assert measures.interval(many) == pytest.approx(2.045 * statistics.stdev(many) / 10, rel=1e-9)


def test_the_table_of_t_holds_95_percent() -> None:
    """Each entry against the density itself, integrated by Simpson's rule from 0: 0.475 lie on either side."""
    for freedom, limit in enumerate(measures.T_975, start=1):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        heights = [scale * (1 + (limit * number / 4000) ** 2 / freedom) ** (-(freedom + 1) / 2) for number in range(4001)]
        inside = limit / 4000 / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
        assert inside == pytest.approx(0.475, abs=6e-5)  # the table has three decimals


def test_one_seed_has_no_spread_rather_than_none_of_it() -> None:
    assert measures.spread([1.0]) is None and measures.interval([1.0]) is None
    assert measures.spread([2.0, 2.0]) == 0.0


def test_a_curve_reaches_a_loss_between_its_points_once() -> None:
    curve = [(0, 3.0), (10, 2.0), (20, 2.2), (30, 1.0)]
    assert measures.steps_to_reach(curve, 3.0) == 0.0
    assert measures.steps_to_reach(curve, 2.5) == 5.0
    assert measures.steps_to_reach(curve, 2.1) == pytest.approx(9.0)  # the first time, though it rises again
    assert measures.steps_to_reach(curve, 1.6) == pytest.approx(25.0)
    assert measures.steps_to_reach(curve, 0.5) is None
    assert measures.steps_to_reach([], 0.5) is None


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.floats(0.1, 10))
def test_the_curve_is_at_or_below_the_loss_where_it_is_said_to_be(losses: list[float], target: float) -> None:
    curve = [(4.0 * number, loss) for number, loss in enumerate(losses)]
    found = measures.steps_to_reach(curve, target)
    assert (found is None) == (min(losses) > target)
    if found is not None:
        assert all(loss > target for step, loss in curve if step < found - 1e-9)
        assert any(loss <= target for step, loss in curve if step >= found - 1e-9 and step < found + 4)


def test_curves_are_averaged_at_the_steps_they_share() -> None:
    assert measures.mean_curve([[(0, 4.0), (2, 2.0)], [(0, 2.0), (3, 9.0)]]) == [(0, 3.0)]
    assert measures.mean_curve([]) == []
