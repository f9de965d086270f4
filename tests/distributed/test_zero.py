"""DeepSpeed's sharded state does what torch does in a single process: real processes, gloo, float32."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.optimizer_section import OptimizerConfig, ScheduleConfig
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.runtime import zero
from hybridpar.runtime.groups import grouped, relative_rates
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory, make_rate
from hybridpar.runtime.process import Process
from tests.support.processes import spawn
from tests.support.training import SEED, Case, make_case, whole_model

STEPS, MAX_NORM = 4, 0.3
GROUPS = ({"match": "*.bias", "weight_decay": 0.0}, {"match": "[0-3].*", "lr": 2e-3})
OPTIMIZERS = {
    "momentum": ("SGD", 0.05, {"momentum": 0.9, "weight_decay": 0.01}),
    "adamw": ("AdamW", 1e-3, {"weight_decay": 0.1}),
}


class Kind(NamedTuple):
    """One training."""

    shape: str
    sharding: str
    optimizer: str
    clipping: bool = False
    groups: bool = False
    offload: bool = False

    @property
    def config(self) -> OptimizerConfig:
        """Of the optimizer."""
        name, lr, options = OPTIMIZERS[self.optimizer]
        schedule = ScheduleConfig("cosine", warmup_steps=1)
        return OptimizerConfig(name, lr, options, schedule=schedule, groups=GROUPS if self.groups else ())


ON_TWO = [
    Kind("front", "zero2", "adamw", groups=True),
    Kind("front and tail", "zero1", "momentum", clipping=True, groups=True),
    Kind("front and tail", "zero2", "momentum", clipping=True),
    Kind("front and tail", "zero1", "adamw", offload=True),
    Kind("replicated middle", "zero1", "adamw", clipping=True),
    Kind("replicated middle", "zero2", "momentum", clipping=True, groups=True, offload=True),
    Kind("replicas", "zero1", "adamw", groups=True, clipping=True),
    Kind("replicas", "zero2", "momentum"),
]
ON_FOUR = [
    Kind(shape, sharding, optimizer, clipping, groups)
    for shape, sharding, optimizer, clipping, groups in product(
        ("front of four", "segment of three", "two replicas"),
        ("zero1", "zero2"),
        OPTIMIZERS,
        (False, True),
        (False, True),
    )
]
TAIL = ("column", "row", "column")
SHAPES: dict[str, tuple[int, int, tuple[Stage, ...]]] = {
    "front": (2, 1, (Stage("front", 3, (Segment((0, 16), (0, 1), (2.0, 1.0)),)),)),
    "front and tail": (
        2,
        1,
        (
            Stage("front", 3, (Segment((0, 7), (0, 1), (2.0, 1.0)),)),
            Stage("tail", 4, (Segment((7, 16), (0, 1)),), TAIL),
        ),
    ),
    "replicated middle": (
        2,
        1,
        (
            Stage("front", 4, (Segment((0, 3), (1,)),)),
            Stage("middle", 2, (Segment((3, 5), (0, 1)), Segment((5, 9), (0, 1)))),
            Stage("tail", 5, (Segment((9, 16), (1, 0)),), TAIL),
        ),
    ),
    "replicas": (2, 2, (Stage("front", 3, (Segment((0, 9), (0,)),)), Stage("tail", 4, (Segment((9, 16), (0,)),)))),
    "front of four": (
        4,
        1,
        (
            Stage("front", 1, (Segment((0, 7), (0, 1, 2, 3)),)),
            Stage("tail", 4, (Segment((7, 16), (3, 1)),), TAIL),
        ),
    ),
    "segment of three": (
        4,
        1,
        (
            Stage("front", 2, (Segment((0, 3), (0, 1)),)),
            Stage("middle", 2, (Segment((3, 7), (1, 2, 3)),)),
            Stage("tail", 5, (Segment((7, 16), (2, 3)),), TAIL),
        ),
    ),
    "two replicas": (
        4,
        2,
        (
            Stage("front", 3, (Segment((0, 7), (0, 1), (2.0, 1.0)),)),
            Stage("tail", 4, (Segment((7, 16), (0, 1)),), TAIL),
        ),
    ),
}
"""Ranks, plan replicas and stages."""


def make_plan(case: Case, kind: Kind) -> Plan:
    chain = case.traced.chain
    world, replicas, stages = SHAPES[kind.shape]
    states = kind.config.state_count or 0
    recipe = Recipe(kind.clipping, kind.sharding, states, offload=kind.offload)  # type: ignore[arg-type]
    plan = Plan(
        chain.model,
        chain.fingerprint,
        world,
        13,
        "float32",
        stages,
        bucket_bytes=1,
        recipe=recipe,
        replicas=replicas,
    )
    validate(plan, chain)
    return plan


def the_case() -> Case:
    return make_case(dropout=0.2, steps=STEPS, samples=(13, 13, 13, 7))


def run_rank(rank: int, kinds: list[Kind], folder: str) -> None:
    case, process = the_case(), Process("cpu", 60.0)
    zero.check_offload = lambda _: None  # on CPUs it is of no use, but what it does can be tested there
    results: list[dict[str, Any]] = []
    for kind in kinds:
        plan, config = make_plan(case, kind), kind.config
        job = Job(
            plan,
            case.traced,
            case.source,
            make_factory(config),
            process.connect(plan),
            rank=rank,
            seed=SEED,
            rate=make_rate(config.lr, config.schedule, STEPS),
            max_norm=MAX_NORM if kind.clipping else None,
            engines=zero.make_engines(process, make_factory(config), plan.recipe),
            groups=config.parameter_groups,
        )
        losses = [job.step((x.float(), y), samples=len(y)) for x, y in case.data]
        values = {n: (o.dim, o.start, o.tensor.detach().clone()) for n, o in job.parameters.items()}
        results.append({"losses": losses, "values": values})
    torch.save(results, Path(folder) / f"{rank}.pt")
    process.gather(None)
    process.close()


class Alone(NamedTuple):
    losses: list[float]
    parameters: dict[str, torch.Tensor]


def train_alone(kind: Kind) -> Alone:
    """Plain PyTorch in a single process."""
    case, config = the_case(), kind.config
    model = whole_model(replace(case, dtype=torch.float32, data=[]))
    names = dict.fromkeys(n for per_layer in case.traced.names for n in per_layer.values())
    named = dict(zip(names, model.parameters(), strict=True))
    optimizer = make_factory(config)(grouped(named.items(), config.parameter_groups))
    relative, rate = relative_rates(optimizer), make_rate(config.lr, config.schedule, STEPS)
    losses, first = [], 0
    for step, (x, y) in enumerate(case.data):
        for d in (m for m in model.modules() if isinstance(m, KeyedDropout)):
            d.keys = Keys(SEED, step, torch.arange(len(x)) + first)
        for group, ratio in zip(optimizer.param_groups, relative, strict=True):
            group["lr"] = rate(step) * ratio
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        if kind.clipping:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
        first += len(x)
    return Alone(losses, {n: p.detach() for n, p in named.items()})


class Ran:
    """All trainings of one launch."""

    def __init__(self, kinds: list[Kind], folder: Path) -> None:
        self.kinds = kinds
        world = SHAPES[kinds[0].shape][0]
        spawn(world, run_rank, kinds, str(folder))
        self._ranks = [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    def of(self, kind: Kind) -> list[dict[str, Any]]:
        """What every rank left."""
        return [rank[self.kinds.index(kind)] for rank in self._ranks]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    pytest.importorskip("deepspeed")
    return Ran(ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    pytest.importorskip("deepspeed")
    return Ran(ON_FOUR, tmp_path_factory.mktemp("four"))


def assert_as_alone(kind: Kind, ran: Ran) -> None:
    expected = train_alone(kind)
    for rank in ran.of(kind):
        assert rank["losses"] == pytest.approx(expected.losses, rel=1e-6)
        for name, (dim, start, value) in rank["values"].items():
            whole = expected.parameters[name]
            part = whole if dim is None else whole.narrow(dim, start, value.shape[dim])
            assert (value - part).norm() <= 1e-6 * part.norm(), name


@pytest.mark.parametrize("kind", ON_TWO, ids=str)
def test_training_is_that_of_a_single_process(on_two: Ran, kind: Kind) -> None:
    assert_as_alone(kind, on_two)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ON_FOUR, ids=str)
def test_training_on_four_ranks_is_that_of_a_single_process(on_four: Ran, kind: Kind) -> None:
    assert_as_alone(kind, on_four)


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'hybridpar\[zero\]'"):
        zero.require_deepspeed()


def test_a_job_without_the_engine_refuses_the_plan() -> None:
    case = the_case()
    plan = make_plan(case, ON_TWO[0])
    with pytest.raises(PlanError, match=r"plan\.recipe\.sharding"):
        Job(plan, case.traced, case.source, make_factory(OptimizerConfig()), None, rank=0)  # type: ignore[arg-type]


def test_the_recipe_reaches_deepspeed() -> None:
    given = zero.settings(Recipe(sharding="zero2", offload=True))
    assert (given["zero_optimization"]["stage"], given["gradient_clipping"]) == (2, 0.0)
    assert given["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in zero.settings(Recipe(sharding="zero1"))["zero_optimization"]
    with pytest.raises(ConfigError, match=r"optimizer\.offload=true: .* set optimizer\.offload=false"):
        zero.check_offload("cpu")
