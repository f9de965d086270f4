"""A step on one rank: the values it holds while it runs, and the figures that it ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from hybridpar.errors import DataError
from hybridpar.planning.program import Program
from hybridpar.runtime.communicators import Pending
from hybridpar.runtime.lookup import Key, Lookup
from hybridpar.runtime.scatter import Scatter


@dataclass(frozen=True)
class Metrics:
    """Sums over all samples of a step, the same on every rank."""

    loss_sum: float
    weight: float
    """What the sum of the losses is divided by."""
    samples: float
    """Labels that count: one per sample, or per token."""
    top1: float
    top5: float

    @property
    def loss(self) -> float:
        """Mean loss. Raises DataError where no sample of the step counts; no rank's gradients did."""
        if not self.weight:
            raise DataError(
                "no sample of the step counts for the loss: all labels are ignored (loss.ignore_index), or their "
                "classes have weight 0 (loss.class_weights); leave such samples out, or take larger batches"
            )
        return self.loss_sum / self.weight


class Started(NamedTuple):
    """An operation between its start and its wait."""

    pending: Pending
    tensor: torch.Tensor
    in_place: bool = True
    """Whether what is received arrives where it is needed; else it has to be placed there."""


@dataclass
class StepState:
    """The values a rank holds while it runs a step."""

    program: Program
    lookup: Lookup
    number: int
    batch: torch.Tensor | None
    labels: torch.Tensor
    """(samples of the step,) int64, or (..., tokens); other ranks' places hold 0 until all labels are gathered."""
    metrics: torch.Tensor
    share: float | None = None
    """Of each sample in its loss, where it is mixed with the one before it in the step."""
    outputs: dict[Key, torch.Tensor] = field(default_factory=dict)
    inputs: dict[Key, torch.Tensor] = field(default_factory=dict)
    """Inputs that have arrived, whole or in part."""
    saved: dict[Key, tuple[torch.Tensor, GradientEdge | None]] = field(default_factory=dict)
    """Between forward and backward: the input as a leaf, and the output's place in the graph, if there is one
    (the backward of a block that recomputes makes its own)."""
    gradients: dict[Key, torch.Tensor] = field(default_factory=dict)
    """Of outputs, whole or in part."""
    input_gradients: dict[Key, torch.Tensor] = field(default_factory=dict)
    figures: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    pending: dict[int, Started] = field(default_factory=dict)
    scatters: dict[int, Scatter] = field(default_factory=dict)
    """Gradients on their way to those who keep their sums, by operation."""
    norm: torch.Tensor | None = None
    best: torch.Tensor | None = None
    """Of a prediction: (samples of the step, (tokens,) 2 k) float64, k logits and k classes; 0 elsewhere until all
    are gathered."""
    at: int = 0
    """Number of the next action."""
    given: torch.Tensor | None = None
    """What a batch norm that meets other ranks' tells them, and then what it is told."""
    gathered: list[torch.Tensor] = field(default_factory=list)
    """What arrives for it."""
    met: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    """What batch norms were told in forwards that will run again."""
