"""The judge: which evaluation is the best one, by a metric that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybridpar.errors import ConfigError
from hybridpar.names import nearest
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.own_metric import OwnMetric


@dataclass(frozen=True)
class Judge:
    """Compares evaluations by one of their figures."""

    name: str
    """``accuracy``, ``loss``, or one of the user's own."""
    larger: bool
    """Whether larger ones are better."""

    @staticmethod
    def of(name: str | None, own: Mapping[str, OwnMetric], key: str = "checkpoint.best") -> Judge | None:
        """Return the judge by the name of a metric, which stands at ``key``; None where none is named.

        Raises ConfigError for no metric.
        """
        if name is None:
            return None
        known = {"accuracy": True, "loss": False} | {n: metric.larger_is_better for n, metric in own.items()}
        if name not in known:
            raise ConfigError(
                f"{key}: there is no metric {name}{nearest(name, sorted(known))} "
                f"(metrics: {', '.join(known)}); give one of them, or null"
            )
        return Judge(name, known[name])

    def metric(self, evaluation: Evaluation) -> float:
        """Return what an evaluation is judged by."""
        if self.name in evaluation.own:
            return evaluation.own[self.name]
        return evaluation.top1 if self.name == "accuracy" else evaluation.loss

    def better(self, metric: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a metric beats the best one before, if there is one, by more than ``by``."""
        return than is None or (metric > than + by if self.larger else metric < than - by)

    def best(self, metrics: Mapping[str, float]) -> str:
        """Return the key of the best of some metrics."""
        return (max if self.larger else min)(metrics, key=lambda key: metrics[key])
