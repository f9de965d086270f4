"""The early stop: ends a training whose evaluations no longer improve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.judge import Judge
from hybridpar.runtime.own_metric import OwnMetric
from hybridpar.train_section import EarlyStopConfig


@dataclass(frozen=True)
class Patience:
    """How long a training has waited for a better evaluation; checkpoints hold it."""

    metric: str
    best: float | None = None
    """The best one so far; None: there was none that is a number."""
    step: int = 0
    """Steps after which it was made."""
    since: int = 0
    """Evaluations after it."""

    def is_over(self, settings: EarlyStopConfig) -> bool:
        """Whether it ends a training with these settings."""
        return self.metric == settings.metric and self.since >= settings.patience


class EarlyStop:
    """Counts evaluations that are no better than the best one before; the same on every rank.

    ``patience`` is that of a checkpoint that the training goes on from; one of another metric does not count.
    Raises ConfigError for an unknown metric.
    """

    def __init__(
        self, settings: EarlyStopConfig, own: Mapping[str, OwnMetric], patience: Patience | None = None
    ) -> None:
        judge = Judge.of(settings.metric, own, "train.early_stop.metric")
        assert judge is not None
        self._settings, self._judge = settings, judge
        self.patience = Patience(judge.name)
        """As a checkpoint holds it."""
        if patience is not None and patience.metric == judge.name:
            self.patience = patience

    @property
    def over(self) -> bool:
        """Whether the training is to end."""
        return self.patience.is_over(self._settings)

    @property
    def reason(self) -> str:
        """Why it does, as a user reads it."""
        p = self.patience
        before = "was no number" if p.best is None else f"has not improved on {p.best:.4f}, after step {p.step},"
        return f"{p.metric} {before} in {p.since} evaluation{'s'[: p.since > 1]}"

    def note(self, step: int, evaluation: Evaluation) -> None:
        """Note an evaluation after ``step`` steps."""
        metric, p = self._judge.metric(evaluation), self.patience
        if self._judge.better(metric, p.best, self._settings.min_improvement) and not math.isnan(metric):
            self.patience = Patience(p.metric, metric, step)
        else:
            self.patience = Patience(p.metric, p.best, p.step, p.since + 1)


def early_stop(
    settings: EarlyStopConfig, own: Mapping[str, OwnMetric], patience: Patience | None = None
) -> EarlyStop | None:
    """Return the early stop, None where no metric is named. Raises ConfigError for an unknown one."""
    return None if settings.metric is None else EarlyStop(settings, own, patience)
