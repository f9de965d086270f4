"""Compressed gradients in real processes: what ranks that are threads compute, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridpar.planning.compression import Compression
from hybridpar.planning.plan import Plan
from hybridpar.runtime.process import Process
from tests.numerics.test_compression import low_rank, make
from tests.support.parity import case_of
from tests.support.processes import spawn
from tests.support.threads import run_ranks
from tests.support.training import make_executor, train_rank

KINDS = {
    "bfloat16": Compression("bfloat16"),
    "PowerSGD": low_rank(2),
    "PowerSGD without feedback": low_rank(1, error_feedback=False),
}


def plan_for(kind: str) -> Plan:
    plan: Plan = make("front and tail", KINDS[kind])
    return plan


def train(plan: Plan, rank: int, communicators: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What a rank sees of a training: its losses and its parameters."""
    case = case_of()
    executor = make_executor(case, plan, rank, communicators)
    metrics = train_rank(case, plan, rank, executor)
    owned = (o for modules in executor.blocks.values() for o in modules.owned)
    return [m.loss for m in metrics], {o.name: o.tensor.detach() for o in owned}


def run_rank(rank: int, folder: str) -> None:
    process = Process("cpu", 60.0)
    communicators = process.connect(plan_for("bfloat16"))
    torch.save({kind: train(plan_for(kind), rank, communicators) for kind in KINDS}, Path(folder, f"{rank}.pt"))
    process.gather(None)
    process.close()


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All trainings of one launch, by rank."""
    folder, world = tmp_path_factory.mktemp("compressed"), plan_for("bfloat16").world
    spawn(world, run_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_train_as_threads_do(launched: list[dict[str, Any]], kind: str) -> None:
    plan = plan_for(kind)
    expected = run_ranks(plan, lambda rank, communicators: train(plan, rank, communicators))
    for (losses, parameters), found in zip(expected, launched, strict=True):
        own, held = found[kind]
        assert own == losses
        assert held.keys() == parameters.keys()
        assert all(torch.equal(held[name], value) for name, value in parameters.items())
