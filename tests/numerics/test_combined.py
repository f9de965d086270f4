"""Features that meet: sharded state with sampled classes and with synchronised norms, as one process trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hybridpar.planning.plan import Plan, Recipe
from hybridpar.runtime.job import Job
from tests.numerics.test_sampling import case_of as sampled_case
from tests.numerics.test_sampling import plan_for as sampled_plan
from tests.numerics.test_synchronised import stages_for
from tests.support import norms
from tests.support.norms import Chunks, assert_buffers
from tests.support.parity import RELATIVE, near
from tests.support.parts import Board, plain_engines
from tests.support.threads import run_ranks
from tests.support.training import SEED, Case, Trained, assemble

SHARDING = pytest.mark.parametrize("sharding", ["zero1", "zero2"])


def trained(plan: Plan, case: Case) -> list[tuple[list[float], Job]]:
    """Train on ranks that share out the optimizer's state; of each its losses and its job."""
    board = Board(plan)

    def body(rank: int, communicators: Any) -> tuple[list[float], Job]:
        job = Job(
            plan,
            case.traced,
            case.source,
            case.optimizer,
            communicators,
            rank=rank,
            seed=SEED,
            max_norm=case.max_norm,
            engines=plain_engines(case.optimizer, plan, board, rank),
            loss=case.loss,
        )
        return [job.step((x, y), samples=len(y)) for x, y in case.data], job

    return run_ranks(plan, body)


def assert_alike(results: list[tuple[list[float], Job]], single: Trained) -> None:
    for losses, _ in results:
        assert losses == pytest.approx(single.losses, rel=RELATIVE)
    parameters = assemble([list(job.parameters.values()) for _, job in results])
    assert parameters.keys() == single.parameters.keys()
    for name, expected in single.parameters.items():
        assert near(parameters[name], expected), name


@SHARDING
@pytest.mark.parametrize(
    ("name", "degrees"), [("plain", (2, 0, 3)), ("arcface", (2, 1, 3)), ("clipped", (2, 0, 2))]
)
def test_sampled_classes_beside_a_sharded_front(name: str, degrees: tuple[int, int, int], sharding: Any) -> None:
    """The head's rows are updated where they are, all else in parts."""
    case, single = sampled_case(name)
    plan = sampled_plan(case, degrees)
    plan = replace(plan, recipe=replace(plan.recipe, optimizer_states=1, sharding=sharding))
    assert_alike(trained(plan, case), single)


@SHARDING
@pytest.mark.parametrize(("name", "shape"), [("resnet", "front and middle"), ("vgg_bn", "replicated middle")])
def test_synchronised_norms_in_a_sharded_stage(name: str, shape: str, sharding: Any) -> None:
    """Their weights are updated in parts, and all ranks have the same running statistics."""
    case, plain = (norms.case_of(name, max_norm=0.3, synchronised=s) for s in (True, False))
    plan = norms.plan_for(case, *stages_for(name, shape), bucket_bytes=1, recipe=Recipe(clipping=True))
    plan = replace(plan, recipe=replace(plan.recipe, optimizer_states=1, sharding=sharding))
    chunks = Chunks(plan, case, plain)
    single, results = chunks.train(), trained(plan, case)
    assert_alike(results, single)
    for rank, (_, job) in enumerate(results):
        assert_buffers(chunks, dict(job.blocks), rank, 0)
