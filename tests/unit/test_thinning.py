"""Thinned curves: small whatever comes, with every extreme, in order; and the records that are read into them."""

from __future__ import annotations

import math
import statistics
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridpar.report.history import WARM_UP_STEPS, Evaluated, Evaluations, Step, Steps
from hybridpar.report.thinning import MOST_POINTS, Point, Thinned


def thinned(points: Iterable[tuple[float, float | None]], most: int = MOST_POINTS) -> tuple[Point, ...]:
    curve = Thinned(most)
    for x, y in points:
        curve.add(x, y)
    return curve.points


def test_extremes_stay_and_order_too() -> None:
    points = [(float(i), math.sin(i)) for i in range(10**5)]
    points[777], points[54_321] = (777.0, 99.0), (54_321.0, -99.0)
    found = thinned(points, 200)
    assert 60 < len(found) <= 200
    assert {(777.0, 99.0), (54_321.0, -99.0), points[-1]} <= set(found)
    assert all(a[0] < b[0] for a, b in pairwise(found))


@given(st.lists(st.one_of(st.none(), st.floats(-9, 9)), max_size=400), st.integers(12, 60))
def test_any_curve(values: list[float | None], most: int) -> None:
    found = thinned([(float(i), v) for i, v in enumerate(values)], most)
    known = [v for v in values if v is not None]
    assert len(found) <= most
    kept = [y for _, y in found if not math.isnan(y)]
    assert all(values[int(x)] == y for x, y in found if not math.isnan(y)), "every point is one of those given"
    assert [x for x, _ in found] == sorted({x for x, _ in found})
    if known:
        assert (min(kept), max(kept)) == (min(known), max(known))
    else:
        assert not kept


def test_a_few_points_stay_as_they_are_and_what_is_unknown_breaks_the_curve() -> None:
    found = thinned([(0.0, 1.0), (1.0, None), (2.0, math.inf), (3.0, 2.0)])
    assert found[0] == (0.0, 1.0)
    assert [x for x, y in found if math.isnan(y)] == [1.0, 2.0]
    assert found[-1] == (3.0, 2.0)
    assert thinned([]) == ()


def test_a_long_break_is_one_when_thinned() -> None:
    found = thinned([(float(i), None if 4000 <= i < 6000 else 1.0) for i in range(10_000)], 100)
    breaks = [x for x, y in found if math.isnan(y)]
    assert breaks
    assert all(4000 <= x < 6000 for x in breaks)


def test_a_curve_holds_little() -> None:
    tracemalloc.start()
    curve = Thinned(200)
    for i in range(20_000):
        curve.add(float(i), float(i % 97))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 200_000


def test_steps_have_the_median_of_the_full_ones_after_the_warm_up() -> None:
    times = [9.0] * WARM_UP_STEPS + [0.1 * (i % 7) + 0.5 for i in range(100)]
    steps = [Step(i, 1.0, 24, t, 1000.0 + i) for i, t in enumerate(times)]
    steps.insert(50, Step(50, 1.0, 7, 100.0))
    found = Steps.of(steps)
    assert found.step_s == pytest.approx(statistics.median(times[WARM_UP_STEPS:]))
    assert found.count == len(steps)
    assert found.last == steps[-1]
    assert max(found.seconds, key=lambda p: p[1]) == (50, 100.0), "a partial step shows in the curve"
    assert found.ends[-1] == (1000.0 + len(times) - 1, len(times))
    assert Steps.of(()).step_s is None


def test_evaluations_know_the_last_and_the_first_best() -> None:
    given = [Evaluated(10, 1.0, 0.5), Evaluated(20, 0.9, 0.7), Evaluated(30, 0.8, 0.7), Evaluated(40, 1.5, 0.6)]
    found = Evaluations.of(given)
    assert (found.count, found.last, found.best) == (4, given[3], given[1])
    assert found.accuracies == ((10, 0.5), (20, 0.7), (30, 0.7), (40, 0.6))
