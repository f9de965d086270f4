"""The account of a verification: what was compared, the largest errors, and the first divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from hybridpar.errors import DivergenceError
from hybridpar.report.verification import Finding, What


@dataclass
class Ledger:
    """What rank 0 has compared so far."""

    tolerance: float
    counts: dict[What, int] = field(default_factory=dict)
    worst: dict[What, Finding] = field(default_factory=dict)
    first: Finding | None = None

    def add(self, found: Finding) -> None:
        """Note one comparison; the first divergent one stays the first."""
        self.counts[found.what] = self.counts.get(found.what, 0) + 1
        if found.what not in self.worst or not found.error <= self.worst[found.what].error:
            self.worst[found.what] = found
        if self.first is None and found.diverges:
            self.first = found

    def compare(
        self,
        step: int,
        what: What,
        layer: str,
        place: str,
        values: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        slack: float = 0.0,
    ) -> None:
        """Compare (actual, expected) of one shape, on the CPU; ``scale`` is the layer's largest value.

        ``slack`` is an absolute difference that is no fault. Raises DivergenceError where the expected value is
        not finite.
        """
        actual, expected = (value.double().reshape(-1) for value in values)
        if not expected.isfinite().all():
            raise DivergenceError(
                f"{what} of {layer} is not finite in a single process at step {step}; nothing can be compared "
                "with it: lower optimizer.lr, set optimizer.clip, or look at the data"
            )
        if not len(expected):
            return
        difference = (actual - expected).abs()
        at = int(torch.where(difference.isnan(), math.inf, difference).argmax())
        most = max(0.0, float(difference[at]) - slack)  # max keeps 0.0 for a NaN
        if not actual[at].isfinite():
            most = math.inf
        error = most / scale if scale else (math.inf if most else 0.0)
        self.add(Finding(step, what, layer, place, float(actual[at]), float(expected[at]), error, self.tolerance))

    def missing(self, step: int, what: What, layer: str, place: str) -> None:
        """Note a part that no rank has computed."""
        self.add(Finding(step, what, layer, place, math.nan, math.nan, math.inf, self.tolerance))
