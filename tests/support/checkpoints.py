"""Jobs that are saved and go on: models, plans on one to four ranks, settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory
from tests.support.training import Case

OPTIMIZERS = {
    "sgd": OptimizerConfig("SGD", 0.05, {"momentum": 0.9}),
    "adamw": OptimizerConfig("AdamW", 0.01, {"weight_decay": 0.1}),
}


def batch_normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 7),
    )


def normed_case() -> Case:
    source = defer(batch_normed)
    return Case(source, trace(source.module, (2, 6, 6), "normed"), 4, (13, 13, 13, 9))


def plan_of(case: Case, kind: str) -> Plan:
    """Plans on one to four ranks."""
    chain = case.traced.chain
    last, cut = len(chain.layers), chain.tail_start
    linears = sum(layer.linear is not None for layer in chain.layers)
    ways = ("column", "row", "column")[:linears]
    fields: dict[str, Any] = {}
    if kind == "alone":
        world, stages = 1, (Stage("front", 4, (Segment((0, last), (0,)),)),)
    elif kind == "data_parallel":
        world, stages = 3, (Stage("front", 3, (Segment((0, last), (0, 1, 2)),)),)
    elif kind == "front_tail":
        tail = Stage("tail", 5, (Segment((cut, last), (1, 2)),), ways)  # type: ignore[arg-type]
        world, stages = 3, (Stage("front", 3, (Segment((0, cut), (0, 1)),)), tail)
    elif kind == "pipeline":
        world, stages = 2, (Stage("middle", 4, (Segment((0, 2), (1,)), Segment((2, last), (0,)))),)
    else:
        tail = Stage("tail", 5, (Segment((cut, last), (1, 0)),), ways[::-1])  # type: ignore[arg-type]
        world, stages = 4, (Stage("front", 3, (Segment((0, cut), (0, 1)),)), tail)
        fields = {"replicas": 2}
    plan = Plan(chain.model, chain.fingerprint, world, 13, "float64", stages, **fields)
    validate(plan, chain)
    return plan


def make_job(
    case: Case,
    plan: Plan,
    rank: int,
    groups: ProcessGroups,
    optimizer: str | OptimizerConfig = "sgd",
    **settings: Any,
) -> Job:
    factory = make_factory(OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)
    return Job(plan, case.traced, case.source, factory, groups, rank=rank, seed=7, **settings)


SAVING = (
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "data.size=40",
    "train.epochs=2",
    "optimizer.schedule.name=cosine",
)
