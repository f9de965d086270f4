"""Estimates: the tables behind them, and that no placement is left out whose estimate would be among the first."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from hybridpar.planning.draft import Drafting
from hybridpar.planning.estimate import Estimate, Estimator
from hybridpar.planning.placement import Placement, placements
from hybridpar.planning.plan import Kind
from hybridpar.planning.request import STAGES_OF, Request
from hybridpar.planning.tables import Tables
from hybridpar.profiling.record import Profile
from tests.support.instances import random_chain, random_cluster, random_profile

SEEDS = range(6)
TAILED: tuple[Kind, ...] = STAGES_OF["three_stage"]
NODES = (2, 2)


def ragged(profile: Profile, dice: random.Random) -> Profile:
    """Some layers measured up to a smaller size, and some with half their features too."""

    def changed(row: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
        own = row[: dice.randint(1, len(row))]
        return (own, tuple(t * 0.7 for t in own)) if dice.random() < 0.5 else (own,)

    layers = (
        replace(x, forward_s=changed(x.forward_s[0]), backward_s=changed(x.backward_s[0])) for x in profile.layers
    )
    return replace(profile, fractions=(1.0, 0.5), layers=tuple(layers))


@pytest.mark.parametrize("seed", SEEDS)
def test_tables_sum_up_the_profile(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311
    chain = random_chain(dice, tailed=True)
    profile = ragged(random_profile(chain, dice), dice)
    tables, layers = Tables(chain, profile, 4), range(len(chain.layers))
    for size in (1, 2, 4, 7, 16, 40):
        for fraction in (1.0, 0.5, 0.3):
            forward = [profile.forward_time(i, size, fraction) for i in layers]
            backward = [profile.backward_time(i, size, fraction) for i in layers]
            assert tables.times(size, fraction, backward=False) == pytest.approx(np.cumsum([0.0, *forward]))
            assert tables.times(size, fraction, backward=True) == pytest.approx(np.cumsum([0.0, *backward]))


def problem(seed: int) -> tuple[Estimator, list[Placement]]:
    """An estimator for a random problem, and the placements of three stages on four ranks."""
    dice = random.Random(seed)  # noqa: S311
    chain = random_chain(dice, tailed=True)
    while sum(bool(layer.parameters) for layer in chain.layers) < 5:
        chain = random_chain(dice, tailed=True)
    cluster = random_cluster(NODES, chain, dice)
    request = Request(24)
    drafting = Drafting(chain, random_profile(chain, dice), cluster, request)
    return Estimator(drafting), list(placements(TAILED, cluster, request))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_estimate_is_below_the_least_time_of_its_placement(seed: int) -> None:
    estimator, places = problem(seed)
    found = [(estimator.least_s(p), e) for p in places for e in estimator.ranked([p], 3, 3, math.inf)]
    assert len(found) > len(places)
    assert all(least_s <= e.step_s * (1 + 1e-9) for least_s, e in found)


@pytest.mark.parametrize("costly", [200, math.inf])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_estimates_are_those_of_all_placements(seed: int, costly: float) -> None:
    estimator, places = problem(seed)
    every = estimator.ranked(places, 1, len(places), costly)
    for wanted in (1, 5):
        found = estimator.ranked(places, 1, wanted, costly)
        assert _figures(found[:wanted]) == _figures(every[:wanted])
        assert len(found) <= len(every)
    if seed == 0:
        assert len(estimator.ranked(places, 1, 1, math.inf)) < len(every), "nothing was left out"


def _figures(found: list[Estimate]) -> list[tuple[float, float]]:
    return [e.key for e in found]
