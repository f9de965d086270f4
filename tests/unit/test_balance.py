"""Runs of layers with about equal work."""

from __future__ import annotations

import itertools
import random

import pytest

from scripts.bench.balance import balanced, counted, measured
from scripts.bench.runtime.models import work_of


def worst(costs: list[float], bounds: list[tuple[int, int]]) -> float:
    return max(sum(costs[a:b]) for a, b in bounds)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cuts_have_a_cheaper_worst_run(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - has to be repeatable
    costs = [float(dice.choice([0, 0, 1, 2, 5, 9])) for _ in range(9)]
    parts = dice.randint(1, 5)
    bounds = balanced(costs, parts)
    assert [a for a, _ in bounds] == [0, *(b for _, b in bounds[:-1])]
    assert bounds[-1][1] == len(costs)
    assert all(a < b for a, b in bounds)
    choices = itertools.combinations(range(1, len(costs)), parts - 1)
    best = min(worst(costs, list(itertools.pairwise([0, *cuts, len(costs)]))) for cuts in choices)
    assert worst(costs, bounds) == best


def test_more_parts_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 parts"):
        balanced([1.0, 1.0], 3)


def test_layers_are_counted_and_measured_one_by_one() -> None:
    work = work_of("linears", 8)
    assert counted(work) == [2.0 * 8 * 8] * 4
    assert all(s > 0 for s in measured(work, micro_batch=4, micro_batches=2))
