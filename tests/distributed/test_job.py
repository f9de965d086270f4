"""The job in a user's own loop: batches in every form, optimizers, evaluation, statistics of batch norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import DataError, PlanError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.planning.program import Operation
from hybridpar.runtime import lookup
from hybridpar.runtime.communicators import Pending, ProcessGroups
from hybridpar.runtime.cross_entropy import CrossEntropy
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.executor import ActionError
from hybridpar.runtime.job import Job
from hybridpar.runtime.loss import Logits
from hybridpar.runtime.modules import Owned
from hybridpar.runtime.optimizer import make_factory
from tests.support.threads import run_ranks
from tests.support.training import assemble, make_case, train_single, whole_model

CASE = make_case(steps=3, samples=(13, 13, 9))
OPTIMIZER = OptimizerConfig("SGD", 0.05, {"momentum": 0.9})


def make_plan(**changes: object) -> Plan:
    """Front on ranks 0 and 1, middle on 2, tail on 1 and 2."""
    chain = CASE.traced.chain
    cut, last = chain.tail_start, len(chain.layers)
    front = Stage("front", 3, (Segment((0, 3), (0, 1)),))
    middle = Stage("middle", 4, (Segment((3, cut), (2,)),))
    tail = Stage("tail", 5, (Segment((cut, last), (1, 2)),), ("column", "row", "column"))
    plan = replace(Plan(chain.model, chain.fingerprint, 3, 13, "float64", (front, middle, tail)), **changes)  # type: ignore[arg-type]
    validate(plan, chain)
    return plan


def make_job(rank: int, groups: ProcessGroups, plan: Plan | None = None) -> Job:
    factory = make_factory(OPTIMIZER)
    return Job(plan or make_plan(), CASE.traced, CASE.source, factory, groups, rank=rank, seed=7)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("form", ["whole", "own"])
def test_a_step_takes_whole_batches_and_own_samples(form: str, replicas: int) -> None:
    plan = make_plan(replicas=replicas, world=3 * replicas)

    def body(rank: int, groups: ProcessGroups) -> list[float]:
        job, losses = make_job(rank, groups, plan), []
        for x, y in CASE.data:
            batch: tuple[torch.Tensor, torch.Tensor] | None = (x, y)
            if form == "own":
                parts = [torch.arange(a, b) for a, b in job.program(samples=len(y)).reads(job.place)]
                batch = (x[torch.cat(parts)], y[torch.cat(parts)]) if parts else None
            losses.append(job.step(batch, samples=len(y)))
        return losses

    expected = train_single(CASE).losses
    for losses in run_ranks(plan, body):
        assert losses == pytest.approx(expected, rel=1e-10)


def test_adamw_in_three_stages_equals_a_single_process() -> None:
    case, factory = make_case(steps=10), make_factory(OptimizerConfig("AdamW", 0.01, {"weight_decay": 0.1}))

    def body(rank: int, groups: ProcessGroups) -> tuple[list[float], list[Owned]]:
        job = Job(make_plan(), case.traced, case.source, factory, groups, rank=rank, seed=7)
        return [job.step(batch) for batch in case.data], list(job.parameters.values())

    model = whole_model(case)
    optimizer, expected = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), []
    for x, y in case.data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    results = run_ranks(make_plan(), body)
    assert all(losses == pytest.approx(expected, rel=1e-10) for losses, _ in results)
    trained = assemble([owned for _, owned in results])
    names = dict.fromkeys(n for per_layer in case.traced.names for n in per_layer.values())
    for name, value in zip(names, model.parameters(), strict=True):
        assert (trained[name] - value).norm() <= 1e-10 * value.norm(), name


def make_alone() -> Plan:
    """All layers on one rank."""
    chain = CASE.traced.chain
    front = Stage("front", 4, (Segment((0, len(chain.layers)), (0,)),))
    return Plan(chain.model, chain.fingerprint, 1, 13, "float64", (front,))


def test_what_a_program_says_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(lookup.Lookup):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(lookup, "Lookup", Counted)
    job = make_job(0, ProcessGroups({}), make_alone())
    for _ in range(3):
        job.step(CASE.data[0])
    assert len(made) == 1


def test_inputs_are_copied_to_the_device_without_waiting() -> None:
    """The loader pins them; a copy that waits would hold up the first forward."""
    given: list[dict[str, Any]] = []

    class Inputs(torch.Tensor):
        def to(self, *arguments: Any, **options: Any) -> torch.Tensor:
            given.append(options)
            return self.as_subclass(torch.Tensor).to(*arguments, **options)

    x, y = CASE.data[0]
    make_job(0, ProcessGroups({}), make_alone()).step((x.as_subclass(Inputs), y))
    assert given == [{"non_blocking": True}]


def test_class_numbers_beyond_float32_are_told_apart() -> None:
    """2^24 and 2^24 + 1 are the same number in float32: a miss once counted as a hit."""
    loss = CrossEntropy()
    labels = torch.arange(2**24, 2**24 + 3)
    logits = Logits(torch.tensor([[0.0, 5.0, 1.0]]).repeat(3, 1), labels, 2**24, 2**25)
    figures = loss.score(logits, train=False)
    outcome = loss.combine(logits, [figures], loss.weight(labels), train=False)
    assert (outcome.top1, outcome.top5) == (1, 3)
    one = logits._replace(values=logits.values[:1], labels=labels[:1])
    other = loss.combine(one, [figures[:1]], loss.weight(one.labels), train=False)
    assert (other.top1, other.top5) == (0, 1)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_loader_feeds_steps_and_evaluations(replicas: int) -> None:
    plan = make_plan(replicas=replicas, world=3 * replicas)
    x, y = (torch.cat(parts) for parts in zip(*CASE.data, strict=True))
    dataset = torch.utils.data.TensorDataset(x.float(), y)

    def body(rank: int, groups: ProcessGroups) -> tuple[int, Evaluation, dict[str, torch.Tensor]]:
        job = make_job(rank, groups, plan)
        with job.loader(Pairs(dataset) if job.reads else len(dataset)) as feed:
            for _ in range(2):
                for batch in feed:
                    job.step(batch)
        with job.loader(Pairs(dataset) if job.reads else len(dataset), train=False) as feed:
            evaluation = job.evaluate(feed)
        assert job.evaluate([(x.float()[:13], y[:13]), (x.float()[13:], y[13:])]) == pytest.approx(evaluation)
        return job.steps, evaluation, {n: o.tensor for n, o in job.parameters.items()}

    (steps, evaluation, _), *others = run_ranks(plan, body)
    assert steps == 6
    assert evaluation.samples == 35
    assert all(other[1] == evaluation for other in others)
    assert set().union(*(other[2] for other in others)) == {
        p.name for q in CASE.traced.chain.layers for p in q.parameters
    }


def test_ignored_samples_are_fed_but_not_counted() -> None:
    x, y = CASE.data[0]
    y = torch.where(torch.arange(13) % 3 == 0, 255, y)
    pairs = Pairs(torch.utils.data.TensorDataset(x.float(), y))

    def body(rank: int, groups: ProcessGroups) -> tuple[list[float], Evaluation]:
        loss, factory = CrossEntropy(0.1, ignore_index=255), make_factory(OPTIMIZER)
        job = Job(make_plan(), CASE.traced, CASE.source, factory, groups, rank=rank, seed=7, loss=loss)
        with job.loader(pairs if job.reads else 13) as feed:
            losses = [job.step(batch) for batch in feed]
        return losses, job.evaluate([(x, y)])

    expected = F.cross_entropy(whole_model(CASE)(x.float().double()), y, ignore_index=255, label_smoothing=0.1)
    for losses, evaluation in run_ranks(make_plan(), body):
        assert losses == pytest.approx([expected.item()], rel=1e-10)
        assert evaluation.samples == 8


class Pairs(torch.utils.data.Dataset):
    """A tensor data set whose labels are plain numbers."""

    def __init__(self, dataset: torch.utils.data.TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x, y = self.dataset[index]
        return x, int(y)


@pytest.mark.parametrize("plan_replicas", [False, True])
def test_batch_norm_statistics_become_the_mean_of_the_replicas(plan_replicas: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7)
        )

    source = defer(build)
    traced = trace(source.module, (2, 6, 6), "normed")
    chain = traced.chain
    ranks = (0,) if plan_replicas else (0, 1)
    stages = (Stage("front", 8, (Segment((0, len(chain.layers)), ranks),)),)
    plan = Plan(chain.model, chain.fingerprint, 2, 16, "float64", stages, replicas=2 // len(ranks))
    x, y = torch.randn(16, 2, 6, 6, dtype=torch.float64), torch.randint(7, (16,))

    def body(rank: int, groups: ProcessGroups) -> tuple[torch.Tensor, Evaluation, float]:
        job = Job(plan, traced, source, make_factory(OPTIMIZER), groups, rank=rank)
        conv = job.parameters["0.weight"].tensor.detach().clone(), job.parameters["0.bias"].tensor.detach().clone()
        loss = job.step((x, y))
        contents, reduce = [], groups.all_reduce

        def noted(operation: Operation, tensor: torch.Tensor) -> Pending:
            contents.append(operation.content)
            return reduce(operation, tensor)

        groups.all_reduce = noted  # type: ignore[method-assign]
        evaluation = job.evaluate([(x, y)])
        assert contents == ["running_statistics", "label", "metrics"]
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
