"""Plans that cannot run are refused with the field named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.schema import to_data
from tests.support.training import small_vgg


def chain(classes: int = 7) -> Chain:
    return trace(small_vgg(classes=classes), (2, 6, 6), "small").chain


def plan_with_tail(model: Chain, shares: tuple[float, ...], start: int = 7) -> Plan:
    world = len(shares)
    front = Stage("front", 1, (Segment((0, start), tuple(range(world))),))
    sharding = ("column",) * sum(1 for layer in model.layers[start:] if layer.linear)
    tail = Stage("tail", 4, (Segment((start, len(model.layers)), tuple(range(world)), shares),), sharding)
    return Plan(model.model, model.fingerprint, world, 12, "float64", (front, tail))


def test_a_shard_without_features_is_refused() -> None:
    """Uneven shares of few classes once left a shard with no logits, which failed in the middle of a step."""
    model = chain()
    validate(plan_with_tail(model, (2.0, 1.0)), model)
    with pytest.raises(PlanError, match=r"plan\.tail\.ranks: 2 shards leave shard \[1\] none of the 6 features"):
        validate(plan_with_tail(model, (20.0, 1.0)), model)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_shares_are_positive_finite_numbers(bad: float) -> None:
    model = chain()
    with pytest.raises(PlanError, match=r"plan\.tail\.shares"):
        validate(plan_with_tail(model, (1.0, bad)), model)


def test_tied_layers_stay_together_and_out_of_shards() -> None:
    """Each shard of a tied linear once got a copy of its own, and the copies drifted apart without an error."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    tied = trace(nn.Sequential(nn.Linear(4, 6), first, nn.ReLU(), second), (4,), "tied").chain
    assert tied.tied
    with pytest.raises(PlanError, match=r"plan\.tail\.layers: layers 1, 3 share parameter"):
        validate(plan_with_tail(tied, (1.0, 1.0), start=1), tied)
    with pytest.raises(PlanError, match=r"plan\.stages: layers 1, 3 share parameter"):
        validate(plan_with_tail(tied, (1.0, 1.0), start=2), tied)
    one = Stage("front", 1, (Segment((0, 4), (0, 1)),))
    validate(Plan("tied", tied.fingerprint, 2, 12, "float64", (one,)), tied)


def test_recomputation_of_random_numbers_without_a_key_is_refused() -> None:
    """The second forward would drop others than the first."""
    model = trace(nn.Sequential(nn.Linear(4, 6), nn.RReLU(), nn.Linear(6, 3)), (4,), "noisy").chain
    stages = Stage("front", 1, (Segment((0, 2), (0,)),)), Stage("tail", 1, (Segment((2, 3), (0,)),))
    plan = Plan("noisy", model.fingerprint, 1, 12, "float64", stages)
    validate(replace(plan, stages=(stages[0], replace(stages[1], recompute=True))), model)
    with pytest.raises(PlanError, match=r"plan\.front\.recompute: True would draw other random numbers .* 1; set"):
        validate(replace(plan, stages=(replace(stages[0], recompute=True), stages[1])), model)


def test_a_recipe_that_contradicts_itself_is_refused() -> None:
    """Only the configuration once refused it; a plan made in Python got as far as its first update."""
    model = chain()
    plan = replace(plan_with_tail(model, (1.0, 1.0)), precision="float32", recipe=Recipe(sharding="zero1"))
    validate(plan, model)
    validate(replace(plan, recipe=Recipe(clipping=True, sharding="zero2")), model)
    with pytest.raises(PlanError, match=r"plan\.recipe\.offload: True is of sharded optimizer state only; set"):
        validate(replace(plan, recipe=Recipe(offload=True)), model)
    alone = Stage("front", 2, (Segment((0, len(model.layers)), (0,)),))
    with pytest.raises(PlanError, match=r"plan\.recipe\.offload: True moves nothing, as no stage .* replicated"):
        validate(replace(plan, world=1, stages=(alone,), recipe=Recipe(sharding="zero1", offload=True)), model)
    with pytest.raises(PlanError, match=r"plan\.recipe\.sharding: zero1 keeps float32 state, but .* float64"):
        validate(replace(plan, precision="float64"), model)


def replicated(**changes: object) -> Plan:
    model = chain()
    stage = Stage("front", 2, (Segment((0, len(model.layers)), (0, 1)),))
    fields: dict[str, object] = {"replicas": 3, **changes}
    plan = Plan(model.model, model.fingerprint, 6, 13, "float32", (stage,))
    return replace(plan, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 0}, r"plan\.replicas: 0 must be at least 1"),
        ({"replicas": 4}, r"plan\.replicas: 4 do not share out the 6 ranks evenly; set world"),
        ({"replicas": 6}, r"plan\.front\.ranks: \[0, 1\] must lie in 0\.\.0"),
        ({"replicas": 2}, r"plan\.stages: \[2\] are ranks without any stage"),
        ({"global_batch": 2}, r"plan\.replicas: 3 leave a replica without any of the global batch's 2 samples"),
        (
            {"replica_shares": (1.0, 1.0, 90.0)},
            r"plan\.replicas: 3 leave a replica .* more even shares",
        ),
        ({"replica_shares": (1.0, 2.0)}, r"plan\.replica_shares: \(1\.0, 2\.0\) must be 3 positive numbers"),
        ({"replica_shares": (1.0, 2.0, 0.0)}, r"plan\.replica_shares: .* must be 3 positive numbers"),
        ({"global_batch": 6}, r"plan\.front\.micro_batch: 2 is above the 1 samples of one rank's share"),
    ],
)
def test_replicas_that_cannot_run_are_refused(changes: dict[str, object], message: str) -> None:
    validate(replicated(), chain())
    validate(replicated(recipe=Recipe(sharding="zero1")), chain())
    with pytest.raises(PlanError, match=message):
        validate(replicated(**changes), chain())


def test_a_replica_has_its_place_in_the_job_and_its_part_of_a_step() -> None:
    plan = replicated(replica_shares=(1.0, 2.0, 1.0))
    assert (plan.replica_world, plan.replica_batch) == (2, 7)
    assert plan.replica_samples(13) == ((0, 3), (3, 10), (10, 13))
    assert plan.replica_samples(1) == ((0, 0), (0, 1), (1, 1))
    assert [plan.locate(r) for r in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert plan.everywhere((1, 0)) == (1, 0, 3, 2, 5, 4)
    model = chain()
    assert Plan.from_data(to_data(plan), model) == plan
