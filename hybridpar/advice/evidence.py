"""What a run's folder proves: its measurements in sentences, each with figures and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from hybridpar.advice.occupancy import HalfEmpty, half_empty
from hybridpar.advice.replan import Replanner
from hybridpar.planning.plan import Plan
from hybridpar.report.attribution import Attribution
from hybridpar.report.basis import Basis
from hybridpar.report.comparison import Comparison
from hybridpar.report.run import Run
from hybridpar.report.shares import StageShare
from hybridpar.report.text import in_time, plural


@dataclass(frozen=True)
class Evidence:
    """A run with the planner that it may be planned again by."""

    run: Run
    basis: Basis
    planner: Replanner
    comparison: Comparison | None
    """None where no timeline was recorded."""
    attribution: Attribution | None
    """Likewise."""

    @property
    def plan(self) -> Plan:
        """The run's."""
        return self.run.plan

    def computing(self, index: int) -> str:
        """Say how long a stage's ranks computed per step, measured and predicted; with a timeline only."""
        assert self.comparison is not None
        stage, steps = self.plan.stages[index], self.comparison.steps
        found, expected = (
            self._passes_s(index, shares)
            for shares in (self.comparison.measured_stages, self.comparison.predicted_stages)
        )
        return (
            f"in micro-batches of {stage.micro_batch} a rank of the {stage.kind} computed {in_time(found)} per "
            f"step (mean of {plural(steps, 'step')}; {in_time(expected)} predicted)"
        )

    def half_empty(self, index: int) -> HalfEmpty | None:
        """Judge a stage's occupancy; None where it is high, or its ranks have no GPU."""
        if self.attribution is None:
            return None
        positions = self.planner.program.positions
        own = [s for s in self.attribution.stages if positions[s.position].stage == index]
        if all(self.run.timings[rank].gpu is None for s in own for rank in s.ranks):
            return None
        return half_empty(own)

    def waited(self, part: str) -> float:
        """Return the share of the step that a part takes, as the mean over all ranks; with a timeline only."""
        assert self.attribution is not None
        total_s = sum(getattr(s.measured, f"{part}_s") * len(s.ranks) for s in self.attribution.stages)
        return float(total_s / (self.plan.world * self.attribution.measured_step_s))

    def most_waited(self, part: str) -> str:
        """Name the stage whose ranks a part of the step takes most of; with a timeline only."""
        assert self.attribution is not None
        most = max(self.attribution.stages, key=lambda s: s.measured.share(part) or 0.0)
        found, expected = (parts.share(part) or 0.0 for parts in (most.measured, most.predicted))
        return f"for the {most.stage} ({found:.0%} of its ranks' step; {expected:.0%} predicted)"

    def _passes_s(self, index: int, shares: tuple[StageShare, ...]) -> float:
        """Forward and backward of the stage's slowest position, mean over its ranks."""
        assert self.comparison is not None
        positions = self.comparison.predicted[0].program.positions
        own = [s for s in shares if positions[s.position].stage == index]
        return max(s.seconds["forward"] + s.seconds["backward"] for s in own)
