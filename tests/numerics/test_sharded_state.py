"""Sharded optimizer state against a single process, in float64 with a plain engine: all but DeepSpeed itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch.nn.functional as F

from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.models.gpt import gpt
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Recipe, Segment, Stage
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory, make_rate
from scripts.bench.accuracy.live import LiveBytes
from tests.numerics.test_groups import KINDS, STEPS, case, config_of, job_of, reference
from tests.numerics.test_memory import Unseen, lasting
from tests.numerics.test_parity import Tied, case_with
from tests.support.counting import Counting, expected_log, run_once
from tests.support.parity import MAX_NORM, near, overlapping_ranks, own_ranks, plan_of, shape, shared_ranks
from tests.support.parts import Board, plain_engines
from tests.support.plans import make_plan
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import SEED, Case, assemble, per_token, train_single

REPLICATED_MIDDLE = (
    Stage("front", 2, (Segment((0, 3), (0, 1), (2.0, 1.0)),)),
    Stage("middle", 3, (Segment((3, 5), (2, 3)), Segment((5, 7), (1, 2)))),
    Stage("tail", 4, (Segment((7, 16), (3, 0)),), ("column", "row", "column")),
)
SHAPES = {
    "front": (shape(3, 0, 0, own_ranks), 1),
    "uneven front": (shape(3, 0, 0, own_ranks, uneven=True), 1),
    "idle rank": ((Stage("front", 2, (Segment((0, 16), (0, 1), (30.0, 1.0)),)),), 1),
    "idle rank in front": (
        (
            Stage("front", 2, (Segment((0, 7), (0, 1), (1.0, 30.0)),)),
            Stage("middle", 3, (Segment((7, 16), (0,)),)),
        ),
        1,
    ),
    "front and tail": (shape(2, 0, 2, shared_ranks), 1),
    "overlapping": (shape(2, 1, 3, overlapping_ranks), 1),
    "replicated middle": (REPLICATED_MIDDLE, 1),
    "replicas": (shape(2, 0, 2, shared_ranks), 2),
    "replicas of a pipeline": (shape(0, 2, 1, own_ranks), 3),
}


def sharded(name, sharding, **fields):
    stages, replicas = SHAPES[name]
    recipe = Recipe(fields.pop("clipping", False), optimizer_states=1)
    plan = plan_of(*stages, replicas=replicas, bucket_bytes=1, recipe=recipe, **fields)
    return replace(plan, recipe=replace(recipe, sharding=sharding))


@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
@pytest.mark.parametrize("name", SHAPES)
def test_parity_with_groups_and_schedule(name, sharding, clipping):
    kind = "SGD" if clipping else list(KINDS)[list(SHAPES).index(name) % len(KINDS)]
    config, (losses, parameters) = config_of(kind), reference(kind, clipping)
    plan = sharded(name, sharding, clipping=clipping)
    board = Board(plan)

    def body(rank, communicators):
        max_norm, rate = MAX_NORM if clipping else None, make_rate(config.lr, config.schedule, STEPS)

        engines = plain_engines(make_factory(config), plan, board, rank)
        job = job_of(config, plan, rank, communicators, max_norm=max_norm, rate=rate, engines=engines)
        return [job.step(batch) for batch in case().data], list(job.parameters.values())

    results = run_ranks(plan, body)
    for own, _ in results:
        assert own == pytest.approx(losses, rel=1e-10)
    for first in range(0, plan.world, plan.replica_world):
        trained = assemble([owned for _, owned in results[first : first + plan.replica_world]])
        assert trained.keys() == parameters.keys()
        for parameter, expected in parameters.items():
            assert near(trained[parameter], expected), parameter


@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
@pytest.mark.parametrize("name", SHAPES)
def test_live_bytes_are_exact(name, sharding, clipping):
    """Of a second step: buckets under stage 2 come and go with every round, parts stay."""
    assert_live_bytes(sharded(name, sharding, clipping=clipping), case())


def assert_live_bytes(plan, case):
    board, samples = Board(plan), case.samples[0]
    programs = [compile_program(plan, case.traced.chain, samples, "train", k) for k in range(plan.replicas)]

    def body(rank, endpoint):
        replica, place = plan.locate(rank)
        factory = make_factory(OptimizerConfig("SGD", 0.05, {"momentum": 0.9}))
        job = Job(
            plan,
            case.traced,
            case.source,
            factory,
            Unseen(endpoint),
            rank=rank,
            max_norm=MAX_NORM if plan.recipe.clipping else None,
            engines=plain_engines(factory, plan, board, rank),
        )
        job.step(case.data[0])
        alive = []
        job.observe(lambda *_: alive.append(live.bytes()))
        endpoint.step = 1
        executor = job._executor
        engines = [tensor for engine in executor.updater.engines.values() for tensor in engine.tensors()]
        with LiveBytes(set(), [*lasting(executor), *engines]) as live:
            run_once(executor, case, programs[replica], place)
        return alive

    for rank, alive in enumerate(run_strictly(plan.world, body, plan.replica_world)):
        assert not isinstance(alive, BaseException), alive
        replica, place = plan.locate(rank)
        assert alive == list(memory(programs[replica], place).alive)


def tied_gpt():
    """Its embedding is its head, and lies first; the blocks between have buckets of their own."""
    return gpt(classes=11, in_shape=(5,), width=8, blocks=2, heads=2, dropout=0.3, tied=True)


@cache
def tied_case(name):
    if name == "three layers":
        return case_with(Tied)
    source = defer(tied_gpt)
    criterion = partial(per_token, F.cross_entropy)
    return Case(source, trace(source.module, (5,), "gpt", "int"), 2, (13, 13), criterion=criterion)


def tied_plan(case, sharding, replicas):
    segment = Segment((0, len(case.traced.chain.layers)), (0, 1), (2.0, 1.0))
    plan = make_plan(case.traced.chain, Stage("front", 2, (segment,)), world=2, bucket_bytes=1)
    recipe = Recipe(optimizer_states=1, sharding=sharding)
    return replace(plan, recipe=recipe, replicas=replicas, world=2 * replicas, global_batch=case.samples[0])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
@pytest.mark.parametrize("name", ["three layers", "gpt"])
def test_tied_weights_in_several_buckets(name, sharding, replicas):
    """A later block's backward is the first to have a gradient for the bucket of the first one."""
    case = tied_case(name)
    plan, single = tied_plan(case, sharding, replicas), train_single(case)
    board = Board(plan)

    def body(rank, communicators):
        engines = plain_engines(case.optimizer, plan, board, rank)
        options = {"rank": rank, "seed": SEED, "engines": engines}
        job = Job(plan, case.traced, case.source, case.optimizer, communicators, **options)
        return [job.step(batch) for batch in case.data], list(job.parameters.values())

    results = run_ranks(plan, body)
    for own, owned in results:
        assert own == pytest.approx(single.losses, rel=1e-10)
        trained = assemble([owned])
        assert trained.keys() == single.parameters.keys()
        for parameter, expected in single.parameters.items():
            assert near(trained[parameter], expected), parameter


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", ["three layers", "gpt"])
def test_live_bytes_with_tied_weights_are_exact(name, replicas):
    case = tied_case(name)
    assert_live_bytes(tied_plan(case, "zero2", replicas), case)


@pytest.mark.parametrize("name", SHAPES)
def test_messages_are_those_of_the_program(name):
    """Under stage 2, with every round's bytes."""
    plan = sharded(name, "zero2")
    board = Board(plan)
    programs = [compile_program(plan, case().traced.chain, 13, "train", k) for k in range(plan.replicas)]

    def body(rank, communicators):
        replica, place = plan.locate(rank)
        factory = make_factory(OptimizerConfig("SGD", 0.05))
        counting = Counting(communicators)
        engines = plain_engines(factory, plan, board, rank)
        job = Job(plan, case().traced, case().source, factory, counting, rank=rank, engines=engines)
        run_once(job._executor, case(), programs[replica], place)
        return counting.log

    for rank, log in enumerate(run_ranks(plan, body)):
        replica, place = plan.locate(rank)
        own = [entry for entry in expected_log(programs[replica], place) if entry[0] != "sharded_update"]
        assert log == own
