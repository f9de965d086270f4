"""The search finds the best plan there is: on small random problems, against an enumerator of all plans.

    pytest -m slow tests/unit/test_exactness.py -o log_cli=true -o log_cli_level=INFO

runs all problems and logs how many plans the enumerator and the search tried.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import pytest

from hybridpar.errors import MemoryLimitError, PlanError
from hybridpar.planning.request import SHAPES, STAGES_OF, Shape
from hybridpar.planning.search import Planned, search
from tests.support.enumerate import Found, brute_force
from tests.support.instances import (
    DIMENSIONS,
    MOST_DIMENSIONS,
    MOST_LAYERS,
    MOST_RANKS,
    Instance,
    dimensions,
    instance,
    pair,
)

SEEDS = range(550)
FEW = SEEDS[::21]
"""In every run. The step has no common factor with the number of pairs, so that each has a pair of its own."""
FEW_PLANS = 300
"""Of an instance in every run."""
ROUNDING = 1e-9
"""Relative: the same sum in another order."""
log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def tried() -> Iterator[Counter[str]]:
    """Counts over all instances, logged at the end."""
    counts: Counter[str] = Counter()
    yield counts
    log.info("all instances: %s", dict(counts))


@pytest.mark.parametrize("seed", FEW)
def test_the_search_finds_the_best_of_all_plans(seed: int, tried: Counter[str]) -> None:
    compare(instance(seed, FEW_PLANS), tried)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_finds_the_best_of_all_plans_of_many_problems(seed: int, tried: Counter[str]) -> None:
    compare(instance(seed), tried)


def compare(problem: Instance, tried: Counter[str]) -> None:
    """Hold the best plan of every shape against the enumerator's."""
    question = problem.question
    assert set(pair(problem.seed)) <= problem.free
    assert len(question.chain.layers) <= MOST_LAYERS
    assert question.cluster.world <= MOST_RANKS
    found = {shape: brute_force(question, STAGES_OF[shape]) for shape in SHAPES}
    wanted = [shape for shape in SHAPES if problem.pins.keys() <= set(STAGES_OF[shape])]
    possible = [f.best_s for shape, f in found.items() if shape in wanted and f.best_s is not None]
    planned: Planned | None = None
    try:
        planned = search(question.chain, question.profile, question.cluster, problem.request())
    except (PlanError, MemoryLimitError):
        assert not possible
    _count(problem, found, planned, tried)
    if planned is None:
        return
    for candidate in planned.candidates:
        best_s = found[candidate.shape].best_s  # type: ignore[index]
        step_s = None if candidate.plan is None else candidate.prediction.step_s
        if candidate.shape not in wanted:  # it is only compared, so its search is not exact
            assert step_s is None or (best_s is not None and step_s >= best_s * (1 - ROUNDING))
            continue
        assert step_s == (None if best_s is None else pytest.approx(best_s, rel=ROUNDING)), candidate
    assert planned.chosen.prediction.step_s == pytest.approx(min(possible), rel=ROUNDING)
    # The search may time a plan before it counts its memory.
    assert planned.tried <= sum(f.simulated + f.too_large for f in found.values())


def _count(problem: Instance, found: dict[Shape, Found], planned: Planned | None, tried: Counter[str]) -> None:
    """Log how many plans were tried, and by whom."""
    own = {
        "instances": 1,
        "plans": sum(f.tried for f in found.values()),
        "simulated": sum(f.simulated for f in found.values()),
        "simulated by the search": planned.tried if planned else 0,
        "without any plan": planned is None,
    }
    tried.update(own)
    log.info("seed %d, free %s: %s", problem.seed, ", ".join(sorted(problem.free)), own)


def test_the_enumerator_logs_what_it_tried(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        counts: Counter[str] = Counter()
        compare(instance(FEW[0], FEW_PLANS), counts)
    assert counts["plans"] >= counts["simulated"] > 0
    assert counts["plans"] >= counts["simulated by the search"] > 0
    assert str(counts["plans"]) in caplog.text


def test_every_pair_of_dimensions_is_free_in_several_problems() -> None:
    assert all(2 <= len(dimensions(seed)) <= MOST_DIMENSIONS for seed in SEEDS)
    assert all(set(pair(seed)) <= dimensions(seed) for seed in SEEDS)
    count = Counter(pair(seed) for seed in SEEDS)
    assert min(count[names] for names in combinations(DIMENSIONS, 2)) >= 10


def test_every_dimension_is_free_in_some_problem_of_every_run() -> None:
    count = Counter(d for seed in FEW for d in pair(seed))
    assert min(count[d] for d in DIMENSIONS) >= 1
