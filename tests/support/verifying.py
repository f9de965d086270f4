"""A verification of a small case, on ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from hybridpar.planning.plan import Plan
from hybridpar.runtime.feed import StepBatch
from hybridpar.runtime.job import Job, checked_program
from hybridpar.runtime.ledger import Ledger
from hybridpar.runtime.reference import Reference
from hybridpar.runtime.verifier import Verifier
from tests.support.parts import Board, plain_engines
from tests.support.threads import run_ranks
from tests.support.training import MOMENTUM, RATE, SEED, Case

TOLERANCE = 1e-11
Fault = Callable[[Job], None]


class Meeting:
    """What the threads of one verification share."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.values: list[Any] = [None] * world


class Member:
    """One rank's way to the others."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def _exchange(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.barrier.wait()
        return values

    def share(self, make: Callable[[], Any], owner: int = 0) -> Any:
        return self._exchange(make() if self.rank == owner else None)[owner]

    def collect(self, value: Any) -> list[Any] | None:
        values = self._exchange(value)
        return values if self.rank == 0 else None


def make_job(case: Case, plan: Plan, rank: int, communicators: Any, board: Board | None = None) -> Job:
    """Make the job of one of all ranks; over the ``board`` they share out optimizer state."""
    return Job(
        plan,
        case.traced,
        case.source,
        optimizer,
        communicators,
        rank=rank,
        seed=SEED,
        max_norm=case.max_norm if plan.recipe.clipping else None,
        engines=None if board is None else plain_engines(optimizer, plan, board, rank),
    )


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)


def own_batch(job: Job, x: torch.Tensor, y: torch.Tensor, first: int) -> StepBatch:
    """What a rank reads of a step."""
    parts = [torch.arange(a, b) for a, b in job.program("train", len(x)).reads(job.place)]
    rows = torch.cat(parts) if parts else None
    own = (None, None) if rows is None else (x[rows], y[rows])
    return StepBatch(*own, len(x), first)


def verified(case: Case, plan: Plan, faults: dict[int, Fault] | None = None) -> Ledger:
    """Verify the steps of a case until they diverge; ``faults`` spoil a rank's job. Returns the account."""
    meeting, board = Meeting(plan.world), None if plan.recipe.sharding == "none" else Board(plan)

    def programs(samples: int) -> Any:
        return tuple(checked_program(plan, case.traced.chain, samples, "train", k) for k in range(plan.replicas))

    def body(rank: int, communicators: Any) -> Ledger:
        norm = case.max_norm if plan.recipe.clipping else None
        job = make_job(case, plan, rank, communicators, board)
        if faults and rank in faults:
            faults[rank](job)
        reference = None
        if rank == 0:
            cpu = torch.device("cpu")
            reference = Reference(
                case.traced,
                case.source,
                optimizer,
                programs,
                seed=SEED,
                dtype=case.dtype,
                device=cpu,
                max_norm=norm,
            )
        verifier = Verifier(job, Member(meeting, rank), reference, TOLERANCE)
        first = 0
        for x, y in case.data:
            if not verifier.run(own_batch(job, x, y, first), lambda x=x, y=y: (x, y)):
                break
            first += len(x)
        return verifier.ledger

    return run_ranks(plan, body)[0]
