"""What sharded optimizer state means for a plan: parts, rounds, messages, memory, time, the planner's choice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hybridpar.config import compose
from hybridpar.errors import MemoryLimitError
from hybridpar.planner import make_plan, prepare
from hybridpar.planning.blocks import blocks, positions
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import wire_bytes
from hybridpar.planning.layout import length
from hybridpar.planning.plan import Plan, Segment
from hybridpar.planning.program import Program
from hybridpar.planning.zero import part_elements, piece_elements, rounds
from tests.numerics.test_groups import case
from tests.numerics.test_sharded_state import SHAPES, sharded
from tests.support.plans import random_plan, random_samples


def program(plan: Plan) -> Program:
    made = compile_program(plan, case().traced.chain, 13, "train")
    check(made)
    return made


def total_wire(plan: Plan) -> int:
    return sum(wire_bytes(o, plan.replicas) for o in program(plan).operations)


@pytest.mark.parametrize("name", SHAPES)
def test_every_gradient_lies_in_one_part(name: str) -> None:
    plan, chain = sharded(name, "zero1"), case().traced.chain
    for position in positions(replace(plan, replicas=1, world=plan.replica_world)):
        alone = replace(plan, replicas=1)
        if position.kind == "tail" or len(position.ranks) == 1:
            continue
        own = [b for b in blocks(plan, chain) if b.position == position.index]
        pieces = [piece_elements(alone, chain, position, b, rank) for b in own for rank in position.ranks]
        total = sum(p.count for layer in chain.layers[slice(*position.layers)] for p in layer.parameters)
        assert sum(pieces) == total
        assert 0 <= part_elements(alone, chain, position) * len(position.ranks) - total < 2 * len(position.ranks)


def test_rounds_are_as_many_as_the_rank_with_the_fewest_micro_batches_has() -> None:
    def of(name: str, sharding: str, samples: int) -> list[int]:
        plan = sharded(name, sharding)
        return [rounds(plan, p, samples) for p in positions(plan)]

    assert of("replicated middle", "zero2", 13) == [4, 2, 2, 1]
    assert of("replicated middle", "zero2", 1) == [1, 1, 1, 1]
    assert of("replicated middle", "zero1", 13) == [1, 1, 1, 1]
    assert of("replicas", "zero2", 13) == [1, 1]


@pytest.mark.parametrize("samples", [1, 2, 5, 13])
@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
@pytest.mark.parametrize("name", SHAPES)
def test_no_program_hangs(name: str, sharding: str, clipping: bool, samples: int) -> None:
    plan = sharded(name, sharding, clipping=clipping)
    for replica in range(plan.replicas):
        check(compile_program(plan, case().traced.chain, samples, "train", replica))


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_no_program_of_a_random_plan_hangs(sharding: str) -> None:
    """Shares may be so uneven that some ranks have no samples while others have several micro-batches."""
    dice, chain, idle = random.Random(4), case().traced.chain, 0  # noqa: S311 - not for secrets

    def skewed(segment: Segment) -> Segment:
        return replace(segment, shares=tuple(dice.choice((1.0, 2.0, 30.0)) for _ in segment.ranks))

    for _ in range(60):
        plan = random_plan(chain, dice)
        stages = [
            replace(s, segments=tuple(map(skewed, s.segments))) if s.kind != "tail" else s for s in plan.stages
        ]
        recipe = replace(plan.recipe, sharding=sharding)  # type: ignore[arg-type]
        plan = replace(plan, stages=tuple(replace(s, in_flight=None) for s in stages), recipe=recipe)
        samples = random_samples(plan, dice)
        program = compile_program(plan, chain, samples, "train")
        check(program)
        for position in program.positions:
            calls = [
                sum(length(c[i]) > 0 for c in position.micro_batches(samples)) for i in range(len(position.ranks))
            ]
            idle += position.replicated and 0 in calls and rounds(plan, position, samples) > 1
    assert (idle > 0) == (sharding == "zero2")


@pytest.mark.parametrize("name", ["front", "front and tail", "replicas"])
def test_stage_one_moves_what_all_reduces_do_and_stage_two_more_with_every_round(name: str) -> None:
    whole = sharded(name, "none")
    recipes = {s: replace(whole.recipe, sharding=s) for s in ("none", "zero1", "zero2")}  # type: ignore[arg-type]
    bytes_of = {s: total_wire(replace(whole, recipe=recipe)) for s, recipe in recipes.items()}
    ranks, padding = whole.world, 2 * 8 * whole.world
    assert bytes_of["none"] <= bytes_of["zero1"] <= bytes_of["none"] + len(whole.stages) * padding * ranks
    many = max(rounds(sharded(name, "zero2"), p, 13) for p in positions(whole))
    assert (bytes_of["zero2"] > bytes_of["zero1"]) == (many > 1)


DEVICE = [
    "model=small_vgg",
    "cluster=p100_4x1_40g",
    "optimizer=adamw",
    "train.global_batch=32",
    "plan=data_parallel",
]


def planned(*overrides: str) -> Plan:
    pinned = ("plan.front.micro_batch=8", "plan.front.recompute=false", "plan.effort=quick")
    config = compose([*DEVICE, *pinned, *overrides])
    return make_plan(config, prepare(config)).plan


def need(plan: Plan) -> int:
    assert plan.prediction is not None
    return max(plan.prediction.memory_bytes)


def seconds(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_s


def test_the_planner_shards_what_does_not_fit_whole() -> None:
    plans = {sharding: planned(f"optimizer.sharding={sharding}") for sharding in ("none", "zero1", "zero2")}
    assert need(plans["zero2"]) < need(plans["zero1"]) < need(plans["none"])
    between = (need(plans["zero1"]) + need(plans["none"])) / 2
    chosen = planned("optimizer.sharding=auto", f"cluster.device.memory_bytes={between}")
    assert chosen.recipe.sharding != "none"
    assert need(chosen) <= between
    below = (need(plans["zero2"]) + need(plans["zero1"])) / 2
    with pytest.raises(MemoryLimitError):
        planned("optimizer.sharding=zero1", f"cluster.device.memory_bytes={below}")
    assert planned("optimizer.sharding=auto", f"cluster.device.memory_bytes={below}").recipe.sharding == "zero2"


def test_offloaded_state_takes_no_memory_of_the_device_but_time() -> None:
    kept, moved = (planned("optimizer.sharding=zero1", f"optimizer.offload={o}") for o in ("false", "true"))
    assert need(moved) < need(kept)
    assert seconds(moved) > seconds(kept)
