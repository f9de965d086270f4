"""A scaled loss: the steps, those that are skipped and the scales are those of torch's GradScaler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import PlanError
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Recipe, Stage
from hybridpar.runtime.average import Average
from hybridpar.runtime.job import Job
from hybridpar.train_section import LossScale
from tests.support.checkpoints import make_job, normed_case
from tests.support.checkpoints import plan_of as plan_of_job
from tests.support.parity import BATCH, MAX_NORM, PLACEMENTS, RELATIVE, near, own_ranks, plan_of, shape
from tests.support.parts import Board, plain_engines
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import (
    MOMENTUM,
    RATE,
    SEED,
    Case,
    assemble,
    make_case,
    make_executor,
    train_rank,
    whole_model,
)

SCALING = LossScale(init=2.0**24, growth_interval=2)
OVERFLOWS = 3
"""The step whose scaled gradients exceed float64's largest number, while the loss and its own gradients do not."""


def scaled_case(max_norm: float | None = None) -> Case:
    """Six steps, one with samples so large that gradients are near the end of float64."""
    case = make_case(steps=6, max_norm=max_norm, dropout=0.3)
    case.scaling = SCALING
    case.data[OVERFLOWS][0][4:7] *= 1e305
    return case


def single(case: Case) -> tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Plain PyTorch: losses, the scale after every step, parameters, last gradients."""
    model, settings = whole_model(case), case.scaling
    assert settings is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=settings.init, growth_interval=settings.growth_interval)
    losses, scales = [], []
    for step, (x, y) in enumerate(case.data):
        for d in (m for m in model.modules() if isinstance(m, KeyedDropout)):
            d.keys = Keys(SEED, step, torch.arange(len(x)) + BATCH * step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if case.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    names = dict.fromkeys(n for per_layer in case.traced.names for n in per_layer.values())
    named = dict(zip(names, model.parameters(), strict=True))
    return losses, scales, {n: p.detach() for n, p in named.items()}, {n: p.grad for n, p in named.items()}


def scaled_plan(*stages: Stage, clipping: bool, **fields: object) -> Plan:
    return plan_of(*stages, recipe=Recipe(clipping=clipping, scaling=True), **fields)


@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize(
    ("degrees", "place", "replicas"),
    [
        ((1, 0, 0), "own", 1),
        ((3, 0, 0), "own", 1),
        ((2, 1, 2), "own", 1),
        ((1, 2, 3), "shared", 1),
        ((3, 0, 2), "overlapping", 1),
        ((0, 2, 0), "own", 1),
        ((1, 1, 2), "own", 2),
        ((2, 0, 1), "overlapping", 2),
    ],
)
def test_training_is_that_of_a_grad_scaler(
    degrees: tuple[int, int, int], place: str, replicas: int, clipping: bool
) -> None:
    """Also the step that is skipped: on every rank alike, though few ranks meet what is not finite."""
    case = scaled_case(MAX_NORM if clipping else None)
    stages = shape(*degrees, PLACEMENTS[place], uneven=True)
    plan = scaled_plan(*stages, clipping=clipping, replicas=replicas, bucket_bytes=500)
    losses, scales, parameters, gradients = single(case)
    assert scales == [2.0**n for n in (24, 25, 25, 24, 24, 25)], "the fourth step overflowed"

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators)
        metrics = train_rank(case, plan, rank, executor)
        return metrics, executor.updater.scaler, [o for m in executor.blocks.values() for o in m.owned]

    results = run_strictly(plan.world, body, plan.replica_world)
    for result in results:
        assert not isinstance(result, BaseException), result
        metrics, scaler, _ = result
        assert [m.loss for m in metrics] == pytest.approx(losses, rel=RELATIVE)
        assert (scaler.scale, scaler.used, scaler.skipped, scaler.in_a_row) == (scales[-1], scales[-2], 1, 0)
    for first in range(0, plan.world, plan.replica_world):
        owned = [o for *_, o in results[first : first + plan.replica_world]]
        for name, value in assemble(owned).items():
            assert near(value, parameters[name]), name
        for name, value in assemble(owned, "gradient").items():
            assert near(value, gradients[name]), name


def test_the_scale_goes_on_from_a_checkpoint(tmp_path) -> None:
    """Bit for bit under the same plan, also what is counted; under another one with the same scale."""
    from hybridpar.runtime.pieces import Stored, write  # noqa: PLC0415

    case = scaled_case()
    case.scaling = replace(SCALING, growth_interval=3)
    plan = replace(plan_of_job(case, "front_tail"), recipe=Recipe(scaling=True))
    other = replace(plan_of_job(case, "replicas"), recipe=Recipe(scaling=True))

    def steps(job, stop):
        return [job.step(case.data[n]) for n in range(job.steps, stop)]

    def begun(rank, groups):
        job = make_job(case, plan, rank, groups, scaling=case.scaling)
        steps(job, OVERFLOWS + 1)
        write(tmp_path, rank, job.state.pieces())
        return steps(job, 6), vars(job.scaler), {n: p.copied().tensor for n, p in job.state.pieces().items()}

    def resumed(rank, groups, under):
        job = make_job(case, under, rank, groups, scaling=case.scaling)
        job.state.restore(Stored(tmp_path, plan.world), same_plan=under is plan)
        job.go_on(OVERFLOWS + 1, BATCH * (OVERFLOWS + 1))
        return steps(job, 6), vars(job.scaler), {n: p.copied().tensor for n, p in job.state.pieces().items()}

    expected = run_ranks(plan, begun)
    for (losses, scaler, held), (again, found, kept) in zip(
        expected, run_ranks(plan, lambda *a: resumed(*a, plan)), strict=True
    ):
        assert losses == again
        assert scaler == found
        assert scaler["skipped"] == 1
        assert held.keys() == kept.keys()
        for name, value in held.items():
            assert torch.equal(value, kept[name]), name
    for losses, found, _ in run_ranks(other, lambda *a: resumed(*a, other)):
        assert losses == pytest.approx(expected[0][0], rel=RELATIVE)
        assert found == expected[0][1]


def test_an_average_takes_in_skipped_steps_as_a_loop_of_ones_own_does() -> None:
    case = scaled_case()
    plan = scaled_plan(*shape(2, 0, 2, own_ranks), clipping=False)

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators, decay=0.5)
        counts = []
        update = Average.update

        def counted(self, position):
            counts.append(position)
            update(self, position)

        executor.updater.average.update = counted.__get__(executor.updater.average)
        train_rank(case, plan, rank, executor)
        return len(counts) / len({p.index for p in executor.updater._positions})

    assert run_ranks(plan, body) == [6.0] * plan.world


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
@pytest.mark.parametrize(("degrees", "place", "replicas"), [((3, 0, 2), "overlapping", 1), ((2, 0, 1), "own", 2)])
def test_sharded_gradients_are_looked_at_too(
    degrees: tuple[int, int, int], place: str, replicas: int, sharding: str
) -> None:
    case = scaled_case(MAX_NORM)
    plan = scaled_plan(*shape(*degrees, PLACEMENTS[place]), clipping=True, replicas=replicas, bucket_bytes=500)
    recipe = replace(plan.recipe, sharding=sharding)  # type: ignore[arg-type]
    plan = replace(plan, chain=case.traced.chain.fingerprint, recipe=recipe)
    losses, scales, parameters, _ = single(case)
    board = Board(plan)

    def body(rank, communicators):
        engines = plain_engines(sgd, plan, board, rank)
        traced, source = case.traced, case.source
        job = Job(
            plan,
            traced,
            source,
            sgd,
            communicators,
            rank=rank,
            seed=SEED,
            max_norm=MAX_NORM,
            engines=engines,
            scaling=SCALING,
        )
        return [job.step(batch) for batch in case.data], job.scaler.scale, list(job.parameters.values())

    results = run_ranks(plan, body)
    for own, scale, _ in results:
        assert own == pytest.approx(losses, rel=RELATIVE)
        assert scale == scales[-1]
    for name, value in assemble([o for *_, o in results[: plan.replica_world]]).items():
        assert near(value, parameters[name]), name


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)


def test_a_job_needs_what_its_plan_says() -> None:
    case = scaled_case()
    plan = plan_of_job(case, "alone")
    with pytest.raises(PlanError, match=r"plan\.recipe\.scaling: False, but the loss is scaled"):
        run_ranks(plan, lambda rank, groups: make_job(case, plan, rank, groups, scaling=SCALING))
    scaled = replace(plan, recipe=Recipe(scaling=True))
    with pytest.raises(PlanError, match=r"plan\.recipe\.scaling: True, but the loss is not scaled"):
        run_ranks(scaled, lambda rank, groups: make_job(case, scaled, rank, groups))


@pytest.mark.parametrize("kind", ["data_parallel", "front_tail", "replicas"])
def test_a_skipped_step_leaves_no_trace_in_running_statistics(kind: str) -> None:
    """A sample with an inf made them NaN for good, on one replica and by the next evaluation's mean on all."""
    case = normed_case()
    plan = replace(plan_of_job(case, kind), recipe=Recipe(scaling=True), precision="float32")
    bad = case.data[1][0].clone()
    bad[2, 0, 0, 0] = float("inf")

    def body(rank, groups):
        job = make_job(case, plan, rank, groups, scaling=SCALING)
        buffers = [b for modules in job.blocks.values() for b in modules.buffers()]
        job.step(case.data[0])
        before = [b.clone() for b in buffers]
        job.step((bad, case.data[1][1]))
        assert job.scaler.skipped == 1
        assert all(torch.equal(b, was) for b, was in zip(buffers, before, strict=True))
        job.step(case.data[2])
        assert not any(torch.equal(b, was) for b, was in zip(buffers, before, strict=True)), "steps taken count"
        program = job.program()
        unscaled = replace(program, plan=replace(plan, recipe=Recipe()))
        copies = sum(c.nbytes for c in job._updater.undo.copies)
        counted = memory(program, job.place).parameters - memory(unscaled, job.place).parameters
        return job.evaluate([case.data[3]]).loss, copies - counted, len(buffers)

    results = run_ranks(plan, body)
    assert all(loss == pytest.approx(results[0][0]) for loss, *_ in results), "and so it is finite"
    assert {wrong for _, wrong, _ in results} == {0}, "the books have the copies"
    assert sum(bool(own) for *_, own in results) >= 2, "front replicas"
