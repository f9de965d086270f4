"""A run's steps as they were predicted and as they were measured, laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.program import Program
from hybridpar.planning.simulate import simulate
from hybridpar.report import shares
from hybridpar.report.basis import Basis
from hybridpar.report.course import Course, measured, simulated, typical
from hybridpar.report.deviation import Deviation, deviations
from hybridpar.report.overlap import Overlap, overlap
from hybridpar.report.run import Run
from hybridpar.report.shares import Share, StageShare

HOW_TO_RECORD = "train with train.timeline=[10,13], the default, for more than 10 steps"


@dataclass(frozen=True)
class Comparison:
    """The courses of a full step, by plan replica."""

    basis: Basis
    predicted: tuple[Course, ...]
    measured: tuple[Course, ...]
    """The step of median length."""
    courses: tuple[tuple[Course, ...], ...]
    """All steps that were recorded and count, by plan replica; figures are their means, durations of actions their
    medians."""
    predicted_shares: tuple[Share, ...]
    """By rank, of all replicas."""
    measured_shares: tuple[Share, ...]
    predicted_stages: tuple[StageShare, ...]
    """By position, of the first replica."""
    measured_stages: tuple[StageShare, ...]
    deviations: tuple[Deviation, ...]
    """All actions, the largest difference first."""
    uncertainty_s: float
    """Largest of the clocks' offsets."""

    @property
    def steps(self) -> int:
        """So many count."""
        return len(self.courses)

    @property
    def overlap(self) -> Overlap:
        """What the first replica's measured step shows."""
        return overlap(self.measured[0])

    @property
    def predicted_overlap(self) -> Overlap:
        """What it was to show."""
        return overlap(self.predicted[0])


def programs_of(run: Run, basis: Basis) -> tuple[Program, ...]:
    """Return the programs of a full step, by plan replica."""
    plan = run.plan
    return tuple(compile_program(plan, basis.chain, plan.global_batch, "train", k) for k in range(plan.replicas))


def predict(programs: Sequence[Program], basis: Basis) -> tuple[Course, ...]:
    """Simulate a step of every plan replica; those with equally many samples do the same."""
    costs, known = Costs(basis.profile, basis.cluster), {}
    for program in programs:
        if program.samples not in known:
            known[program.samples] = simulated(program, simulate(program, costs))
    return tuple(known[program.samples] for program in programs)


def compare(run: Run) -> Comparison | None:
    """Lay a run's measured timeline over the simulated one; None where it lacks one of the two.

    Raises RecordError for a timeline that is not of the run's plan.
    """
    if run.basis is None or not run.timings:
        return None
    programs = programs_of(run, run.basis)
    predicted = predict(programs, run.basis)
    steps = measured(programs, run.timings)
    if not steps:
        return None
    return Comparison(
        run.basis,
        predicted,
        typical(steps),
        steps,
        _every(predicted),
        shares.mean([_every(step) for step in steps]),
        shares.by_stage(predicted[0]),
        shares.mean_stages([shares.by_stage(step[0]) for step in steps]),
        tuple(deviations(predicted, steps)),
        max(record.uncertainty_s for record in run.timings),
    )


def _every(courses: Sequence[Course]) -> tuple[Share, ...]:
    return tuple(share for course in courses for share in shares.by_rank(course))
