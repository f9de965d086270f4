"""An evaluation: what a model does on a data set, and the sums it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hybridpar.errors import DataError
from hybridpar.runtime.step import Metrics


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a data set: means over all its samples whose label counts, each counted once."""

    loss: float
    """Each sample weighs as in training, by the weight of its class."""
    top1: float
    """Share of the samples whose class has the largest logit."""
    top5: float
    """Share of the samples whose class is among the five largest logits."""
    samples: int
    own: Mapping[str, float] = field(default_factory=dict)
    """The user's own metrics by their names."""


class Totals:
    """The metrics of several batches, added up; the same on every rank."""

    def __init__(self) -> None:
        self._sums = Metrics(0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, m: Metrics) -> None:
        """Add those of a batch."""
        s = self._sums
        self._sums = Metrics(
            s.loss_sum + m.loss_sum,
            s.weight + m.weight,
            s.samples + m.samples,
            s.top1 + m.top1,
            s.top5 + m.top5,
        )

    @property
    def finite(self) -> bool:
        """Whether the loss of every batch so far is."""
        return math.isfinite(self._sums.loss_sum)

    @property
    def samples(self) -> int:
        """Labels that count. Raises DataError where there are none."""
        if not self._sums.weight or not self._sums.samples:
            raise DataError("there are no samples to evaluate on whose label counts")
        return round(self._sums.samples)

    def means(self, own: Mapping[str, float]) -> Evaluation:
        """Return the means, and beside them the user's own metrics. Raises DataError as ``samples``."""
        s, samples = self._sums, self.samples
        return Evaluation(s.loss_sum / s.weight, s.top1 / s.samples, s.top5 / s.samples, samples, own)
