"""Predicted against measured, action by action: which ones took longer or shorter than was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hybridpar.planning.program import Action, Program
from hybridpar.report.course import Course
from hybridpar.report.palette import stage_name
from hybridpar.report.shares import waiting_position


@dataclass(frozen=True)
class Deviation:
    """An action of one rank and its two durations."""

    rank: int
    """Of all plan replicas."""
    kind: str
    name: str
    """As the program describes it."""
    stage: str | None
    micro_batch: int | None
    predicted_s: float
    measured_s: float
    """Median over the steps."""

    @property
    def difference_s(self) -> float:
        """How much longer it took than predicted."""
        return self.measured_s - self.predicted_s


def deviations(predicted: Sequence[Course], measured: Sequence[Sequence[Course]]) -> list[Deviation]:
    """Compare all actions, the largest difference first.

    ``predicted`` by plan replica, ``measured`` by step and replica. Starts are left out: the simulation counts
    them with the computation behind them.
    """
    result = []
    for replica, course in enumerate(predicted):
        first = replica * len(course.ranks)
        for place, actions in enumerate(course.ranks):
            for number, timed in enumerate(actions):
                if timed.action.kind == "start":
                    continue
                seconds = median(step[replica].ranks[place][number].seconds for step in measured)
                result.append(_deviation(course.program, first + place, timed.action, timed.seconds, seconds))
    return sorted(result, key=lambda d: (-abs(d.difference_s), d.rank))


def _deviation(program: Program, rank: int, action: Action, predicted_s: float, measured_s: float) -> Deviation:
    micro_batch = action.micro_batch
    if action.operation is not None:
        operation = program.operations[action.operation]
        position, micro_batch = waiting_position(program, operation), operation.micro_batch
    elif action.kind == "update":
        position = action.block
    else:
        position = None if action.block is None else program.blocks[action.block].position
    stage = None if position is None else stage_name(program.positions[position])
    return Deviation(rank, action.kind, program.describe(action), stage, micro_batch, predicted_s, measured_s)
