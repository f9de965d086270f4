"""Own metrics of an evaluation: exact over ranks, shards, replicas and partial batches."""

import json
from functools import cache

import pytest
import torch

from hybridpar.errors import ConfigError, PlanError
from hybridpar.runtime.job import Job
from hybridpar.runtime.judge import Judge
from hybridpar.runtime.own_metric import OwnMetric, OwnMetrics
from tests.support.own_code import margin
from tests.support.parity import overlapping_ranks, own_ranks, plan_of, shape, shared_ranks
from tests.support.runs import train_here
from tests.support.threads import run_ranks
from tests.support.training import SEED, make_case, whole_model

CASE = make_case(steps=3, samples=(13, 13, 4))
CLASSES = 7
IGNORED = -100


@cache
def labelled():
    """Batches of which some labels do not count, and some are what the model takes them for."""
    with torch.no_grad():
        found = [
            (x, torch.where(torch.arange(len(y)) % 3 == 1, whole_model(CASE)(x).argmax(1), y))
            for x, y in CASE.data
        ]
    return [(x, torch.where(torch.arange(len(y)) % 5 == 3, IGNORED, y)) for x, y in found]


def confusion(best, labels):
    return torch.bincount(labels * CLASSES + best[:, 0], minlength=CLASSES**2)


def places(best, labels):
    """How often the target is first, second, ... fifth."""
    return (best == labels[:, None]).sum(dim=0)


METRICS = {
    "confused": OwnMetric(confusion, of="best", value=lambda sums, n: float(sums.view(7, 7).diagonal().sum() / n)),
    "third": OwnMetric(places, of="best", value=lambda sums, _: float(sums[2])),
    "margin": OwnMetric(margin),
}


def expected():
    model = whole_model(CASE)
    with torch.no_grad():
        pairs = [(model(x), y) for x, y in labelled()]
    logits = torch.cat([v for v, _ in pairs])[(labels := torch.cat([y for _, y in pairs])) != IGNORED]
    labels = labels[labels != IGNORED]
    best = logits.topk(5, dim=1).indices
    return {
        "confused": float((best[:, 0] == labels).double().mean()),
        "third": float((best[:, 2] == labels).sum()),
        "margin": float(margin(logits, labels)) / len(labels),
    }


@pytest.mark.parametrize(
    ("degrees", "place", "replicas"),
    [
        ((1, 0, 0), own_ranks, 1),
        ((3, 0, 0), own_ranks, 1),
        ((0, 2, 1), own_ranks, 1),
        ((2, 0, 2), shared_ranks, 1),
        ((2, 1, 3), overlapping_ranks, 1),
        ((2, 0, 2), shared_ranks, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_rank_has_what_one_process_has(degrees, place, replicas):
    plan = plan_of(*shape(*degrees, place), replicas=replicas)
    wanted = expected()
    metrics = {n: m for n, m in METRICS.items() if m.of == "best" or degrees[2] < 2}

    def body(rank, groups):
        job = Job(
            plan,
            CASE.traced,
            CASE.source,
            lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            groups,
            rank=rank,
            seed=SEED,
            metrics=metrics,
        )
        first = job.evaluate(labelled())
        return first, job.evaluate(labelled())

    for first, second in run_ranks(plan, body):
        assert first.samples == 25
        assert first.own == second.own == pytest.approx({n: wanted[n] for n in metrics}, rel=1e-10)
        assert first.own["confused"] == pytest.approx(first.top1, rel=1e-12)
        assert 0.2 < first.top1 < 0.8


def refused(metrics, plan=None):
    chain = CASE.traced.chain
    made = OwnMetrics(metrics, chain)
    made.check_plan(plan or plan_of(*shape(1, 0, 0, own_ranks)))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": margin}, r"metrics.loss: is taken"),
        ({"a-b": margin}, r"metrics.a-b: is taken, or no plain name"),
        ({"m": 3}, r"metrics.m: 3 is no function"),
        ({"m": lambda *_: 1.0}, r"metrics.m: the function gave a float; return a tensor of sums"),
        ({"m": lambda logits, _: logits}, r"metrics.m: the function gave a tensor \[2, 7\]"),
        ({"m": lambda logits: logits.sum()}, r"metrics.m: fails on logits \[2, 7\] and labels \[2\]: TypeError"),
    ],
)
def test_functions_that_give_no_sums_are_refused(metrics, message):
    with pytest.raises(ConfigError, match=message):
        refused(metrics)


def test_logits_of_a_sharded_tail_are_refused():
    with pytest.raises(PlanError, match=r'metrics.margin: needs all logits .* plan.tail.degree=1, .* of="best"'):
        refused(METRICS, plan_of(*shape(2, 0, 2, shared_ranks)))


def test_an_own_metric_chooses_the_best_checkpoint(tmp_path):
    """The least error: of checkpoints that are all to go, the one after the best evaluation stays."""
    train_here(
        tmp_path,
        "metrics={error: tests.support.own_code:error}",
        "metrics.recall=tests.support.own_code:recall",
        "checkpoint.every=100",
        "checkpoint.best=error",
        "checkpoint.keep=1",
        "train.epochs=5",
        "optimizer.lr=0.05",
    )
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["error"] == pytest.approx(1 - line["top1"]) for line in lines)
    assert all(0 <= line["recall"] <= 1 for line in lines)
    best = min(lines, key=lambda line: (line["error"], line["step"]))
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {f"step-{best['step']:08d}", "step-00000010"}
    manifest = json.loads((tmp_path / "checkpoints" / f"step-{best['step']:08d}" / "checkpoint.json").read_text())
    assert (manifest["judged_by"], manifest["metric"]) == ("error", best["error"])


def test_a_metric_that_is_not_there_is_no_judge():
    with pytest.raises(ConfigError, match=r"checkpoint.best: there is no metric recal; did you mean recall?"):
        Judge.of("recal", {"recall": METRICS["third"]})
