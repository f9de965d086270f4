"""The best classes of a sharded head are those of the whole model, and its logits are never gathered."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from hybridpar.errors import DataError
from hybridpar.model.deferred import defer
from hybridpar.model.linear import CosineLinear
from hybridpar.model.trace import trace
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.planning.program import Action
from hybridpar.runtime.job import Best, Job
from hybridpar.runtime.own_loss import OwnLoss
from scripts.bench.accuracy.live import LiveBytes
from tests.numerics.test_memory import Unseen, lasting
from tests.support.counting import Counting, counting_executor
from tests.support.parity import BATCH, overlapping_ranks, own_ranks, shape, shared_ranks
from tests.support.plans import make_plan
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import SEED, Case, make_executor, small_vgg, whole_model

CLASSES = 23
PLANS = {
    "front": (3, 0, 0),
    "pipeline": (0, 2, 1),
    "front and tail": (2, 0, 3),
    "three stages": (2, 1, 2),
    "overlapping, uneven": (1, 2, 3),
}


def head() -> nn.Module:
    model = small_vgg(0.3)
    assert isinstance(model, nn.Sequential)
    model[-1] = CosineLinear(9, CLASSES)
    return model


@cache
def case() -> Case:
    source = defer(head)
    return Case(source, trace(source.module, (2, 6, 6), "small"), 2, (BATCH, BATCH))


def plan_of(degrees: tuple[int, int, int], replicas: int = 1) -> Plan:
    number = sum(degrees)
    place = (own_ranks, shared_ranks, overlapping_ranks)[number % 3]
    ways = (("column", "row", "column"), ("row", "column", "column"))[number % 2]
    stages = shape(*degrees, place, uneven=number % 2 == 0, ways=ways)
    world = (1 + max(r for s in stages for r in s.ranks)) * replicas
    return make_plan(case().traced.chain, *stages, world=world, global_batch=BATCH, replicas=replicas)


def job_of(plan: Plan, rank: int, groups: Any) -> Job:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    return Job(plan, case().traced, case().source, sgd, groups, rank=rank, seed=SEED)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("k", [1, 5, CLASSES])
@pytest.mark.parametrize("degrees", PLANS.values(), ids=PLANS.keys())
def test_predictions_are_those_of_the_whole_model(degrees: tuple[int, int, int], k: int, replicas: int) -> None:
    """Also of more classes than a shard has, and of a smaller batch, in which a replica may have no samples."""
    plan = plan_of(degrees, replicas)
    x = case().data[0][0]
    with torch.no_grad():
        expected = whole_model(case()).eval()(x).topk(k, dim=1)

    def body(rank: int, groups: Any) -> list[Best]:
        job = job_of(plan, rank, groups)
        few = x[:1] if job.reads else None
        return [job.predict(x, k), job.predict(few, k, samples=1)]

    for whole, few in run_ranks(plan, body):
        torch.testing.assert_close(whole.values, expected.values, rtol=1e-12, atol=1e-12)
        assert torch.equal(whole.classes, expected.indices)
        assert torch.equal(few.classes, expected.indices[:1])


def test_predictions_follow_the_training_and_take_what_a_loader_gives() -> None:
    plan, data = plan_of((2, 0, 3)), list(zip(*case().data[0], strict=True))
    sizes = [(x, int(y)) for x, y in data]

    def body(rank: int, groups: Any) -> tuple[Best, Best, list[Best]]:
        job = job_of(plan, rank, groups)
        before = job.predict(case().data[0][0], 3)
        job.step(case().data[1])
        with job.loader(sizes, train=False) as feed:
            return before, job.predict(case().data[0][0], 3), [job.predict(batch, 3) for batch in feed]

    results = run_ranks(plan, body)
    for before, after, (fed,) in results:
        assert not torch.equal(before.values, after.values)
        assert torch.equal(after.classes, fed.classes)
        assert torch.equal(after.values, fed.values)
        assert torch.equal(after.classes, results[0][1].classes)


@pytest.mark.parametrize("degrees", PLANS.values(), ids=PLANS.keys())
def test_the_program_tells_all_that_is_exchanged(degrees: tuple[int, int, int]) -> None:
    """Shards exchange k logits and classes per sample, and every rank gets those of all."""
    plan, k = plan_of(degrees), 4
    program = compile_program(plan, case().traced.chain, BATCH, "predict", best=k)
    check(program)
    contents = {o.content for o in program.operations}
    assert not contents & {"label", "metrics", "bucket"}
    gathered = [o for o in program.operations if o.content == "statistics"]
    assert sum(o.bytes for o in gathered) == (2 * k * 8 * BATCH if degrees[2] > 1 else 0)
    (best,) = (o for o in program.operations if o.content == "best")
    assert best.bytes == 2 * k * 8 * BATCH

    def body(rank: int, endpoint: Any) -> list[Action]:
        executor = counting_executor(case(), plan, rank, Counting(endpoint))
        reads = [case().data[0][0][a:b] for a, b in program.reads(rank)]
        executor.predict(program, 0, 0, torch.cat(reads) if reads else None)
        return executor.actions

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        assert result == list(program.actions[rank])


@pytest.mark.parametrize("degrees", [(2, 0, 3), (2, 1, 2), (3, 0, 0)], ids=str)
def test_live_bytes_are_exact(degrees: tuple[int, int, int]) -> None:
    plan = plan_of(degrees)
    program = compile_program(plan, case().traced.chain, BATCH, "predict", best=3)

    def body(rank: int, endpoint: Any) -> list[int]:
        executor = make_executor(case(), plan, rank, Unseen(endpoint))
        reads = [case().data[0][0][a:b] for a, b in program.reads(rank)]
        x = torch.cat(reads) if reads else None
        executor.predict(program, 0, 0, x)
        endpoint.step = 1
        alive: list[int] = []
        executor.observer = lambda *_: alive.append(live.bytes())
        with LiveBytes(set(), lasting(executor)) as live:
            executor.predict(program, 1, 0, None if x is None else x.clone())
        return alive

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        counted = memory(program, rank).alive
        # What else there is, of an executor that trains as well, stays the same: places of gradients.
        assert [alive - result[0] for alive in result] == [alive - counted[0] for alive in counted]


@pytest.mark.parametrize("k", [0, CLASSES + 1])
def test_a_number_of_classes_that_there_is_not_is_refused(k: int) -> None:
    plan = plan_of((1, 0, 0))

    def body(rank: int, groups: Any) -> None:
        with pytest.raises(DataError, match=rf"k: {k} of {CLASSES} classes"):
            job_of(plan, rank, groups).predict(case().data[0][0], k)

    run_ranks(plan, body)


def test_an_output_that_is_no_row_of_logits_is_refused() -> None:
    """Of (classes, height, width); it failed in the middle of the program, with an error that named an action."""
    source = defer(lambda: nn.Conv2d(2, CLASSES, 3))
    traced = trace(source.module, (2, 6, 6), "dense")
    plan = make_plan(traced.chain, Stage("front", 4, (Segment((0, 1), (0,)),)), world=1, global_batch=BATCH)

    def body(rank: int, groups: Any) -> None:
        sgd = partial(torch.optim.SGD, lr=0.1)
        job = Job(plan, traced, source, sgd, groups, rank=rank, loss=OwnLoss(lambda logits, _: logits.sum()))
        with pytest.raises(DataError, match=r"the model's output is \(23, 4, 4\) per sample"):
            job.predict(case().data[0][0], 2)

    run_ranks(plan, body)
