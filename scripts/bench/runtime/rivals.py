"""The rivals: contestants of the cluster's bench, and ours in memory, without dropout, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

import hybridpar
from hybridpar.planning.plan import Plan
from scripts.bench.work import Work

AGREEMENT = 1e-4
"""By what share the losses of the first steps may differ, where all compute in one dtype."""


class Trains(Protocol):
    """One rank's part of a training."""

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on the samples of a step, of which this takes its own; return its share of their mean loss."""
        ...


@dataclass(frozen=True)
class Rival:
    """Whoever can train, and how he is called."""

    name: str
    trains: Trains
    agreement: float = AGREEMENT
    """By what share the losses of the first steps may differ from those of the first rival."""


class Ours:
    """hybridpar under a plan, with ``settings`` of ``hybridpar.wrap``."""

    name = "hybridpar"

    def __init__(self, work: Work, plan: Plan, **settings: Any) -> None:
        given = {"optimizer": work.sgd, "in_shape": work.traced.chain.in_shape, **settings}
        self.job = hybridpar.wrap(work.whole(), plan, **given)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train; the loss is that of all ranks."""
        return self.job.step((images, labels)) / self.job.plan.world
