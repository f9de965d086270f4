"""A user's own metrics: figures of an evaluation, made of sums over its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan
from hybridpar.references import resolve
from hybridpar.runtime.loss import Figures, Logits, best_classes

RESERVED = ("step", "epoch", "loss", "top1", "top5", "samples", "accuracy")
"""What an evaluation's records call other things."""

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class OwnMetric:
    """A figure of an evaluation.

    ``function`` gets samples whose label counts, and their labels, and returns **sums** over these samples: a
    number, or k of them (k,), which are added up over all micro-batches and ranks in float64. So each sample
    counts exactly once, whatever the plan. Where every token has a label, each is a sample here.
    """

    function: Function
    """Of (logits, labels), or of (best, labels); labels (n,) int64."""
    of: Literal["logits", "best"] = "logits"
    """``logits`` (n, classes) need a tail of one rank. ``best`` (n, up to 5) int64 are the classes of the largest
    logits, the largest first, which a sharded tail has too."""
    value: Callable[[torch.Tensor, int], float] | None = None
    """Of the sums (k,) and the number of samples, to the figure; default: the first sum over the samples."""
    larger_is_better: bool = True
    """For ``checkpoint.best``."""

    def sums(self, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Call the function: (k,) float64. Raises ConfigError where it does not give sums."""
        made = self.function(values, labels)
        if not isinstance(made, torch.Tensor) or made.dim() > 1 or made.is_complex():
            what = f"a tensor {list(made.shape)}" if isinstance(made, torch.Tensor) else f"a {type(made).__name__}"
            raise ConfigError(f"metrics: the function gave {what}; return a tensor of sums, () or (k,)")
        return made.detach().to(torch.float64).reshape(-1)

    def figure(self, sums: torch.Tensor, samples: int) -> float:
        """Return the metric of an evaluation."""
        return float(sums[0]) / samples if self.value is None else float(self.value(sums, samples))


class OwnMetrics:
    """The metrics of a job on one rank, and what they have added up. Raises ConfigError for one that fails.

    Every function is called once with zeros to see how many sums it gives.
    """

    def __init__(self, given: Mapping[str, OwnMetric | Function], chain: Chain) -> None:
        self.metrics = {n: m if isinstance(m, OwnMetric) else OwnMetric(m) for n, m in given.items()}
        for name, metric in self.metrics.items():
            if name in RESERVED or not name.isidentifier():
                raise ConfigError(f"metrics.{name}: is taken, or no plain name; call it otherwise")
            if not callable(metric.function):
                raise ConfigError(f"metrics.{name}: {metric.function!r} is no function; give one, or an OwnMetric")
        self._sizes = [self._size(name, metric, chain) for name, metric in self.metrics.items()]
        self._total = torch.zeros(sum(self._sizes), dtype=torch.float64)

    @staticmethod
    def _size(name: str, metric: OwnMetric, chain: Chain) -> int:
        labels = torch.zeros(2, dtype=torch.int64)
        values = torch.zeros(2, *chain.out_shape[len(chain.label_shape) :])
        if metric.of == "best":
            values = torch.zeros(2, min(5, chain.classes), dtype=torch.int64)
        try:
            return len(metric.sums(values, labels))
        except ConfigError as e:
            raise ConfigError(f"metrics.{name}{str(e).removeprefix('metrics')}") from e
        except Exception as e:
            raise ConfigError(
                f"metrics.{name}: fails on {metric.of} {list(values.shape)} and labels [2]: "
                f"{type(e).__name__}: {e}; make it work on them"
            ) from e

    def check_plan(self, plan: Plan) -> None:
        """Raise PlanError where a metric needs all logits and no rank has them."""
        if not positions(plan)[-1].sharded:
            return
        for name, metric in self.metrics.items():
            if metric.of == "logits":
                raise PlanError(
                    f"metrics.{name}: needs all logits on one rank, but plan.tail.degree is "
                    f"{len(positions(plan)[-1].ranks)}; plan with plan.tail.degree=1, or make it an OwnMetric "
                    'of="best"'
                )

    def begin(self, device: torch.device) -> None:
        """Begin an evaluation."""
        self._total = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)

    def add(self, logits: Logits, figures: Figures, ignored: int) -> None:
        """Add a micro-batch, of which ``figures`` are all shards' of an evaluation."""
        logits = logits.rows
        counted = logits.labels != ignored
        labels, parts = logits.labels[counted], []
        for metric in self.metrics.values():
            values = logits.values if metric.of == "logits" else best_classes(logits, figures)
            parts.append(metric.sums(values[counted], labels))
        self._total += torch.cat(parts)

    @property
    def total(self) -> torch.Tensor:
        """The rank's sums of all metrics, float64; to be summed over the ranks in place."""
        return self._total

    def figures(self, samples: int) -> dict[str, float]:
        """Return the metrics of the whole evaluation."""
        parts = torch.split(self._total.cpu(), self._sizes)
        return {n: m.figure(part, samples) for (n, m), part in zip(self.metrics.items(), parts, strict=True)}


def make_metrics(references: Mapping[str, str]) -> dict[str, OwnMetric | Function]:
    """Import the configured metrics, ``module:name`` each. Raises ConfigError."""
    return {name: resolve(reference, f"metrics.{name}") for name, reference in references.items()}
