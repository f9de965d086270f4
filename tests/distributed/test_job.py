"""The job in a user's own loop: batches in every form, evaluation, statistics of batch norms."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.config import OptimizerConfig
from hybridpar.errors import DataError, PlanError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.executor import ActionError
from hybridpar.runtime.job import Evaluation, Job
from hybridpar.runtime.optimizer import make_factory
from tests.support.threads import run_ranks
from tests.support.training import make_case, train_single

CASE = make_case(steps=3, samples=(13, 13, 9))
OPTIMIZER = OptimizerConfig("SGD", 0.05, {"momentum": 0.9})
building = threading.Lock()
"""Initial values are drawn from torch's global generator, which the ranks' threads share."""


def make_plan(**changes: object) -> Plan:
    """Front on ranks 0 and 1, middle on 2, tail on 1 and 2."""
    chain = CASE.traced.chain
    cut, last = chain.tail_start, len(chain.layers)
    front = Stage("front", 3, (Segment((0, 3), (0, 1)),))
    middle = Stage("middle", 4, (Segment((3, cut), (2,)),))
    tail = Stage("tail", 5, (Segment((cut, last), (1, 2)),), ("column", "row", "column"))
    fields = {"recipe": Recipe(), **changes}
    plan = Plan(chain.model, chain.fingerprint, 3, 13, "float64", (front, middle, tail), **fields)  # type: ignore[arg-type]
    validate(plan, chain)
    return plan


def make_job(rank: int, groups: ProcessGroups, plan: Plan | None = None) -> Job:
    factory = make_factory(OPTIMIZER)
    with building:
        return Job(plan or make_plan(), CASE.traced, CASE.source, factory, groups, rank=rank, seed=7)


@pytest.mark.parametrize("form", ["whole", "own"])
def test_a_step_takes_whole_batches_and_own_samples(form: str) -> None:
    def body(rank: int, groups: ProcessGroups) -> list[float]:
        job, losses = make_job(rank, groups), []
        for x, y in CASE.data:
            batch: tuple[torch.Tensor, torch.Tensor] | None = (x, y)
            if form == "own":
                parts = [torch.arange(a, b) for a, b in job.program(samples=len(y)).reads(rank)]
                batch = (x[torch.cat(parts)], y[torch.cat(parts)]) if parts else None
            losses.append(job.step(batch, samples=len(y)))
        return losses

    expected = train_single(CASE).losses
    for losses in run_ranks(make_plan(), body):
        assert losses == pytest.approx(expected, rel=1e-10)


def test_a_loader_feeds_steps_and_evaluations() -> None:
    x, y = (torch.cat(parts) for parts in zip(*CASE.data, strict=True))
    dataset = torch.utils.data.TensorDataset(x.float(), y)

    def body(rank: int, groups: ProcessGroups) -> tuple[int, Evaluation, dict[str, torch.Tensor]]:
        job = make_job(rank, groups)
        with job.loader(Pairs(dataset) if job.reads else len(dataset)) as feed:
            for _ in range(2):
                for batch in feed:
                    job.step(batch)
        with job.loader(Pairs(dataset) if job.reads else len(dataset), train=False) as feed:
            evaluation = job.evaluate(feed)
        assert job.evaluate([(x.float()[:13], y[:13]), (x.float()[13:], y[13:])]) == pytest.approx(evaluation)
        return job.steps, evaluation, {n: o.tensor for n, o in job.parameters.items()}

    (steps, evaluation, _), *others = run_ranks(make_plan(), body)
    assert steps == 6
    assert evaluation.samples == 35
    assert all(other[1] == evaluation for other in others)
    assert set().union(*(other[2] for other in others)) == {
        p.name for q in CASE.traced.chain.layers for p in q.parameters
    }


class Pairs(torch.utils.data.Dataset):
    """A tensor data set whose labels are plain numbers."""

    def __init__(self, dataset: torch.utils.data.TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x, y = self.dataset[index]
        return x, int(y)


def test_batch_norm_statistics_become_the_mean_of_the_replicas() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7)
        )

    source = defer(build)
    traced = trace(source.module, (2, 6, 6), "normed")
    chain = traced.chain
    stages = (Stage("front", 8, (Segment((0, len(chain.layers)), (0, 1)),)),)
    plan = Plan(chain.model, chain.fingerprint, 2, 16, "float64", stages)
    x, y = torch.randn(16, 2, 6, 6, dtype=torch.float64), torch.randint(7, (16,))

    def body(rank: int, groups: ProcessGroups) -> tuple[torch.Tensor, Evaluation, float]:
        with building:
            job = Job(plan, traced, source, make_factory(OPTIMIZER), groups, rank=rank)
        conv = job.parameters["0.weight"].tensor.detach().clone(), job.parameters["0.bias"].tensor.detach().clone()
        loss = job.step((x, y))
        evaluation = job.evaluate([(x, y)])
        norm = next(m for b in job._blocks.values() for m in b.modules() if isinstance(m, nn.BatchNorm2d))
        halves = F.conv2d(x, *conv, padding=1).split(8)
        mean = sum(half.mean((0, 2, 3)) for half in halves) / 2 * norm.momentum
        assert torch.allclose(norm.running_mean, mean, rtol=1e-10)
        return norm.running_var, evaluation, loss

    (first, evaluation, _), (second, other, _) = run_ranks(plan, body)
    assert torch.equal(first, second)
    assert evaluation == other


def test_batches_that_do_not_fit_are_named() -> None:
    plan = make_plan()
    x, y = CASE.data[0]
    job = make_job(0, ProcessGroups({}), plan)
    with pytest.raises(DataError, match="rank 0 got 5 inputs and 5 labels; give all 13 of the step, or the"):
        job.step((x[:5], y[:5]))
    with pytest.raises(DataError, match=r"rank 0 reads .* of the step's 13 samples but got None"):
        job.step(None)
    with pytest.raises(DataError, match="no samples to evaluate on"):
        job.evaluate([])


def test_a_failing_action_names_rank_stage_and_micro_batch() -> None:
    job = make_job(0, ProcessGroups({}), make_plan())
    with pytest.raises(ActionError, match="rank 0 failed in "):
        job.step(CASE.data[0])


def test_a_plan_for_something_else_is_refused() -> None:
    with pytest.raises(PlanError, match=r"plan\.recipe\.clipping: True, but the largest norm is None"):
        make_job(0, ProcessGroups({}), make_plan(recipe=Recipe(clipping=True)))
    plan = make_plan()
    other = Plan("other", "0" * 16, 3, 13, "float64", plan.stages)
    with pytest.raises(PlanError, match=r"plan\.chain: the plan is for chain 0000"):
        make_job(0, ProcessGroups({}), other)
