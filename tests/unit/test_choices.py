"""Plan replicas and the effort of the search as a user fixes them: what is refused, and what becomes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import hybridpar
from hybridpar.errors import PlanError
from hybridpar.planning.request import Pin, Request, Space
from hybridpar.planning.search import Planned, search
from tests.support.paper import chain_of, cluster_of, profile_of

CHAIN = chain_of(8, 8, 8, 8)
FOUR = cluster_of(4, bytes_per_s=1e3)


def plan_for(**fields: Any) -> Planned:
    request = Request(**{"global_batch": 8, "precision": "float64", **fields})
    profile = replace(profile_of(CHAIN), dtype=request.precision)
    return search(CHAIN, profile, FOUR, request)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replicas": 3}, "plan.replicas: 3 does not divide the 4 ranks of cluster paper; give a divisor"),
        ({"replicas": 4, "global_batch": 3}, "plan.replicas: 4 replicas cannot share out a global batch of 3"),
        (
            {"replicas": 2, "pins": {"front": Pin(ranks=(1, 3))}},
            "plan.front.ranks: [1, 3] does not fit the ranks 0..1 of one of the 2 plan replicas",
        ),
        (
            {"replicas": 2, "pins": {"tail": Pin(degree=3)}},
            "plan.tail.degree: 3 does not fit the ranks 0..1 of one of the 2 plan replicas",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_replicas_that_go_with_nothing_are_refused_once(fields: dict[str, Any], message: str) -> None:
    """A degree beyond a replica's ranks was once cut down to them without a word."""
    with pytest.raises(PlanError) as caught:
        plan_for(**fields)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_pinned_replicas_are_the_plan_s(replicas: int) -> None:
    planned = plan_for(replicas=replicas)
    assert {c.plan.replicas for c in planned.candidates if c.plan is not None} == {replicas}


def test_the_wire_counts_all_replicas() -> None:
    """Four replicas of one rank move what a front of four ranks does; once it was what one of them moves."""
    together, apart = (plan_for(replicas=replicas, shape="data_parallel") for replicas in (1, 4))
    assert together.chosen.prediction.wire_bytes > 0
    assert apart.chosen.prediction.wire_bytes == together.chosen.prediction.wire_bytes


def test_exact_looks_at_the_whole_space_of_the_wanted_shape_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other shapes are there to compare; their spaces may be far too large, which once ended the search."""
    monkeypatch.setattr("hybridpar.planning.search.EXHAUSTIVE", {"normal": 24, "exact": 300})
    planned = plan_for(shape="data_parallel", effort="exact", space=Space(in_flight=(None,)))
    assert {c.shape for c in planned.candidates if c.plan is not None} > {"data_parallel"}
    with pytest.raises(
        PlanError, match=r"plan\.effort: exact is for at most 300 drafts of a shape, and .* has more"
    ):
        plan_for(effort="exact")


def test_the_api_takes_them_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    plan = hybridpar.plan(model, (8,), 16, cluster=cluster_of(4, 1e9), replicas=2, effort="quick")
    assert plan.replicas == 2
    with pytest.raises(PlanError, match=r"plan\.replicas: 3 does not divide"):
        hybridpar.plan(model, (8,), 16, cluster=cluster_of(4), replicas=3)
