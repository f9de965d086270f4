"""ZeRO-1 does what the torch optimizers do: two real processes, gloo, float32."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from hybridpar.errors import ConfigError, PlanError
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.runtime import zero
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory, make_rate
from hybridpar.runtime.process import Process
from hybridpar.sections import OptimizerConfig
from tests.support.training import Case, make_case

STEPS = 4
OPTIMIZERS = {
    "momentum": OptimizerConfig("SGD", 0.05, {"momentum": 0.9}),
    "adamw": OptimizerConfig("AdamW", 1e-3, {"weight_decay": 0.01}),
}


def make_plan(case: Case, sharding: str) -> Plan:
    """A replicated front of uneven shares, several micro-batches of it per step, and a sharded tail."""
    chain = case.traced.chain
    cut = chain.tail_start
    front = Stage("front", 3, (Segment((0, cut), (0, 1), (2.0, 1.0)),))
    tail = Stage("tail", 4, (Segment((cut, len(chain.layers)), (0, 1)),), ("column", "row", "column"))
    recipe = Recipe(sharding="zero1" if sharding == "zero1" else "none")
    plan = Plan(chain.model, chain.fingerprint, 2, 13, "float32", (front, tail), bucket_bytes=1, recipe=recipe)
    validate(plan, chain)
    return plan


def run_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    case = make_case(dropout=0.2, steps=STEPS, samples=(13, 13, 13, 7))
    process = Process("cpu", 60.0)
    communicators = process.connect(make_plan(case, "none"))
    result = {}
    for name, config in OPTIMIZERS.items():
        for sharding in ("none", "zero1"):
            factory = make_factory(config)
            job = Job(
                make_plan(case, sharding),
                case.traced,
                case.source,
                factory,
                communicators,
                rank=rank,
                rate=make_rate(config.lr, config.schedule, STEPS),
                engines=zero.make_engines(process, factory) if sharding == "zero1" else None,
            )
            losses = [job.step((x.float(), y), samples=len(y)) for x, y in case.data]
            values = {n: o.tensor.detach().clone() for n, o in job.parameters.items()}
            result[name, sharding] = losses, values
    torch.save(result, Path(folder) / f"{rank}.pt")
    process.gather(None)
    process.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sharded_state_gives_the_same_training(results: list[dict], optimizer: str) -> None:
    for per_rank in results:
        losses, values = per_rank[optimizer, "none"]
        zero_losses, zero_values = per_rank[optimizer, "zero1"]
        assert zero_losses == pytest.approx(losses, rel=1e-6)
        assert values.keys() == zero_values.keys()
        for name, value in values.items():
            error = (zero_values[name] - value).norm() / value.norm()
            assert error < 1e-6, (name, error)


def test_replicas_stay_equal(results: list[dict]) -> None:
    first, second = (per_rank["momentum", "zero1"][1] for per_rank in results)
    assert torch.equal(first["0.weight"], second["0.weight"])


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'hybridpar\[zero\]'"):
        zero.require_deepspeed()


def test_a_job_without_the_engine_refuses_the_plan() -> None:
    case = make_case(steps=1)
    plan = make_plan(case, "zero1")
    with pytest.raises(PlanError, match=r"plan\.recipe\.sharding"):
        Job(plan, case.traced, case.source, make_factory(OptimizerConfig()), None, rank=0)  # type: ignore[arg-type]
