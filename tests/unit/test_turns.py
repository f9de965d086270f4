"""The benches of the runtime: who comes when, and what their ratio is."""

from __future__ import annotations

from collections import Counter

import pytest

from scripts.bench.turns import compare, order


def test_everybody_comes_first_equally_often() -> None:
    rounds = [order("abc", turn) for turn in range(6)]
    assert Counter(first for first, *_ in rounds) == {"a": 2, "b": 2, "c": 2}
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)


def test_the_ratio_is_taken_round_by_round() -> None:
    """A machine that gets ten times slower does so for both."""
    theirs = [1.0, 2.0, 4.0, 8.0, 10.0]
    ratio = compare([1.1 * t for t in theirs], theirs)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    ratio = compare([1.0, 1.0, 1.0, 1.0, 3.0], [1.0] * 5)
    assert ratio.median == 1.0
    assert 1.0 == ratio.low <= ratio.high <= 3.0
