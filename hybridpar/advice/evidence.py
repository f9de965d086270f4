"""What a run's folder proves: its measurements in sentences, each with figures and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from hybridpar.advice.replan import Replanner
from hybridpar.planning.plan import Plan
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

    def _passes_s(self, index: int, shares: tuple[StageShare, ...]) -> float:
        """Forward and backward of the stage's slowest position, mean over its ranks."""
        assert self.comparison is not None
        positions = self.comparison.predicted[0].program.positions
        own = [s for s in shares if positions[s.position].stage == index]
        return max(s.seconds["forward"] + s.seconds["backward"] for s in own)
