"""Plan replicas equal single-process training, whatever their shares, in float64."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage
from hybridpar.planning.program import Program
from hybridpar.runtime.executor import ActionError
from tests.support.counting import Counting, counting_executor, expected_log, run_once
from tests.support.parity import (
    BATCH,
    LAYERS,
    PLACEMENTS,
    RULES,
    STEPS,
    assert_parity,
    case_of,
    own_ranks,
    plan_of,
    shape,
    train,
)
from tests.support.plans import random_replicated, with_actions
from tests.support.rendezvous import Endpoint, HangError, run_strictly
from tests.support.training import make_case, make_executor, run_step, train_single

SHAPES = [(2, 0, 0), (2, 0, 2), (1, 1, 2), (2, 2, 2), (0, 2, 0), (0, 2, 1), (0, 0, 1), (1, 2, 3)]
SHARES = (None, (3.0, 1.0), (1.0, 2.5))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("degrees", SHAPES, ids=str)
def test_two_replicas(degrees: tuple[int, int, int], placement: str) -> None:
    number = SHAPES.index(degrees) + len(SHAPES) * list(PLACEMENTS).index(placement)
    stages = [replace(s, micro_batch=min(s.micro_batch, 4)) for s in shape(*degrees, PLACEMENTS[placement])]
    plan = plan_of(
        *stages,
        replicas=2,
        replica_shares=SHARES[number % 3],
        order=RULES[number % 2],
        bucket_bytes=(1, 2000)[number // 2 % 2],
        recipe=Recipe(clipping=number // 4 % 2 == 0),
    )
    assert_parity(plan, dropout=0.4, gloo=number % 5 == 0)


@pytest.mark.parametrize("gloo", [False, True])
@pytest.mark.parametrize("kind", ["front", "tail"])
def test_replicas_of_one_rank_are_data_parallelism(kind: str, gloo: bool) -> None:
    stage = Stage(kind, 2, (Segment((0, LAYERS), (0,)),))  # type: ignore[arg-type]
    assert_parity(plan_of(stage, replicas=4, recipe=Recipe(clipping=True)), dropout=0.4, gloo=gloo)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_three_replicas_of_ragged_shares(uneven: bool, recompute: bool) -> None:
    stages = [replace(s, recompute=recompute) for s in shape(2, 1, 2, own_ranks, uneven=uneven)]
    plan = plan_of(*stages, replicas=3, replica_shares=(2.0, 5.0, 1.0), bucket_bytes=1)
    assert [b - a for a, b in plan.replica_samples(BATCH)] == [3, 8, 2]
    assert_parity(plan, dropout=0.4)


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("degrees", [(2, 0, 0), (2, 1, 2), (0, 2, 1)], ids=str)
def test_last_partial_batch(degrees: tuple[int, int, int], clipping: bool, last: int) -> None:
    """Fewer samples than replicas leave some without any; they take part in all that is across."""
    stages = [replace(s, micro_batch=2) for s in shape(*degrees, own_ranks)]
    plan = plan_of(*stages, replicas=3, bucket_bytes=1, recipe=Recipe(clipping=clipping))
    samples = (*(BATCH,) * (STEPS // 2 - 1), last) * 2
    assert_parity(plan, dropout=0.4, samples=samples, gloo=last == 1)


def test_a_cap_that_fits_the_largest_replica_does_not_refuse_the_others() -> None:
    """Eight samples share out so that six in flight, enough for ten, would wait for each other."""
    stages = [
        Stage("front", 3, (Segment((0, 4), (1,)),), in_flight=6),
        Stage("middle", 6, (Segment((4, 14), (2, 0), (1.5, 1.0)),)),
        Stage("tail", 3, (Segment((14, LAYERS), (0, 2, 1)),), ("row",)),
    ]
    plan = plan_of(*stages, batch=18, replicas=2, replica_shares=(10.0, 8.0))
    assert_parity(plan, samples=(18,) * STEPS)


def test_evaluation_counts_every_sample_once() -> None:
    case = make_case(steps=1)
    plans = plan_of(*shape(2, 0, 1, own_ranks)), plan_of(*shape(2, 1, 2, own_ranks), replicas=2)
    results = []
    for plan in plans:

        def body(rank: int, endpoint: Endpoint, plan: Plan = plan) -> object:
            replica, place = plan.locate(rank)
            program = compile_program(plan, case.traced.chain, BATCH, "evaluate", replica)
            check(program)
            return run_step(case, program, place, make_executor(case, plan, rank, endpoint))

        results.append(run_strictly(plan.world, body, plan.replica_world))
    one, (other, *rest) = results[0][0], results[1]
    assert all(r == other for r in rest)
    assert vars(other) == pytest.approx(vars(one), rel=1e-10)


def test_random_replicas_finish_right_on_the_strictest_machine() -> None:
    """Replicas whose programs differ in length and order wait for each other, and never in a ring."""
    dice = random.Random(21)  # noqa: S311
    base = case_of()
    differing = without = 0
    for _ in range(60):
        plan = random_replicated(case_of().traced.chain, dice)
        samples = min(plan.global_batch, dice.choice((1, 2, 5, 99, 99, 99)))
        own = [b - a for a, b in plan.replica_samples(samples)]
        differing += len(set(own)) > 1
        without += 0 in own
        case = replace(base, steps=1, samples=(samples,), data=[], max_norm=0.1 if plan.recipe.clipping else None)
        single = train_single(case)
        for metrics, owned in train(case, plan, gloo=False):
            assert metrics[0].loss == pytest.approx(single.losses[0], rel=1e-10)
            for o in owned:
                whole = single.parameters[o.name]
                part = whole if o.dim is None else whole.narrow(o.dim, o.start, o.tensor.shape[o.dim])
                assert torch.allclose(o.tensor, part, rtol=1e-10, atol=1e-12), (plan, o.name)
    assert differing > 15
    assert without > 8


def across(program: Program, rank: int) -> list[tuple[object, ...]]:
    """What a rank starts across replicas, in order, without the numbers that are its replica's own."""
    started = [program.operations[a.operation or 0] for a in program.actions[rank] if a.kind == "start"]
    return [(o.kind, o.communicator, o.content, o.ranks, o.bytes, o.block) for o in started if o.across]


def by_communicator(started: list[tuple[object, ...]]) -> dict[object, list[object]]:
    orders: dict[object, list[object]] = defaultdict(list)
    for operation in started:
        orders[operation[1]].append(operation)
    return orders


def test_operations_across_are_the_same_in_all_replicas_in_one_order_per_communicator() -> None:
    dice = random.Random(22)  # noqa: S311
    for _ in range(60):
        plan = random_replicated(case_of().traced.chain, dice)
        for samples in (plan.global_batch, dice.randint(1, plan.global_batch)):
            programs = [
                compile_program(plan, case_of().traced.chain, samples, "train", k) for k in range(plan.replicas)
            ]
            for rank in range(plan.replica_world):
                first, *others = [by_communicator(across(p, rank)) for p in programs]
                assert all(orders == first for orders in others)


def test_the_strictest_machine_notices_another_order_in_one_replica() -> None:
    plan = plan_of(Stage("front", 2, (Segment((0, LAYERS), (0,)),)), replicas=2, bucket_bytes=1)
    case = replace(case_of(), steps=1)
    right, other = (compile_program(plan, case.traced.chain, BATCH, "train", k) for k in (0, 1))
    own = list(other.actions[0])
    a, b = [i for i, x in enumerate(own) if x.kind == "start" and x.content == "bucket"][:2]
    own[a], own[b] = own[b], own[a]
    programs = right, with_actions(other, 0, own)

    def body(rank: int, endpoint: Endpoint) -> object:
        replica, place = plan.locate(rank)
        return run_step(case, programs[replica], place, make_executor(case, plan, rank, endpoint))

    results = run_strictly(plan.world, body, plan.replica_world)
    assert all(isinstance(r, ActionError) and isinstance(r.__cause__, HangError) for r in results)


@pytest.mark.parametrize("degrees", [(2, 0, 2), (1, 2, 1), (0, 0, 1), (2, 1, 3)], ids=str)
def test_execution_is_the_program(degrees: tuple[int, int, int]) -> None:
    """Of every replica: actions, bytes of every message, saved bytes after every action."""
    case = case_of(0.4, (BATCH,))
    stages = [replace(s, micro_batch=2) for s in shape(*degrees, own_ranks)]
    plan = plan_of(*stages, replicas=2, replica_shares=(1.0, 2.0), bucket_bytes=1)
    programs = [compile_program(plan, case.traced.chain, BATCH, "train", k) for k in (0, 1)]

    def body(rank: int, endpoint: Endpoint) -> tuple[object, ...]:
        communicators = Counting(endpoint)
        executor = counting_executor(case, plan, rank, communicators)
        replica, place = plan.locate(rank)
        run_once(executor, case, programs[replica], place)
        return executor.actions, communicators.log, executor.alive

    for rank, result in enumerate(run_strictly(plan.world, body, plan.replica_world)):
        assert not isinstance(result, BaseException), result
        replica, place = plan.locate(rank)
        program = programs[replica]
        expected = expected_log(program, place)
        assert result == (list(program.actions[place]), expected, list(memory(program, place).saved))


def test_the_memory_of_a_plan_is_that_of_its_largest_replica() -> None:
    plan = plan_of(*shape(2, 1, 2, own_ranks), replicas=2, replica_shares=(1.0, 3.0))
    chain = case_of().traced.chain
    program = compile_program(plan, chain, BATCH, "train")
    assert (program.replica, program.samples, program.step_samples, program.first) == (1, 10, 13, 3)
    peaks = [memory(program, r).peak for r in range(len(program.actions))]
    assert len(peaks) == plan.replica_world == 5
    smaller = compile_program(plan, chain, BATCH, "train", 0)
    small = [memory(smaller, r).peak for r in range(len(smaller.actions))]
    assert all(a >= b for a, b in zip(peaks, small, strict=True))
    alone = plan_of(*shape(2, 1, 2, own_ranks), batch=10, bucket_bytes=plan.bucket_bytes)
    assert memory(compile_program(alone, chain, 10, "train"), 0).saved == memory(program, 0).saved
