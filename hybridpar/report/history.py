"""What a run's steps and evaluations amount to: read one by one, kept as thinned curves."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from hybridpar.report.thinning import Point, Thinned

WARM_UP_STEPS = 5
"""Left out of the measured step time, or a fifth of the steps where that is less."""


def warm_up(steps: int) -> int:
    """Return how many of a run's steps are left out of its measured step time."""
    return min(WARM_UP_STEPS, steps // 5)


@dataclass(frozen=True)
class Step:
    """A line of ``metrics.jsonl``."""

    step: int
    loss: float
    """Not a number where it was not finite."""
    samples: int
    step_s: float
    time_s: float | None = None
    """Seconds since the epoch, at the end of the step."""


@dataclass(frozen=True)
class Evaluated:
    """A line of ``evaluations.jsonl``."""

    step: int
    """So many steps were done."""
    loss: float
    top1: float


@dataclass(frozen=True)
class Steps:
    """The steps of a run."""

    count: int
    """Lines; a run that went on keeps those of before."""
    last: Step | None
    losses: tuple[Point, ...]
    """Over the steps."""
    seconds: tuple[Point, ...]
    """Each step's, over the steps."""
    ends: tuple[Point, ...]
    """So many steps were done, over the seconds since the epoch; of the steps after the warm-up."""
    step_s: float | None
    """Median of the full steps after the warm-up."""

    @staticmethod
    def of(steps: Iterable[Step]) -> Steps:
        """Read steps in their order. Beside the curves, 8 bytes are held for each: for the median."""
        count, last, full = 0, None, 0
        losses, seconds, ends, times = Thinned(), Thinned(), Thinned(), array("d")
        for last in steps:
            count += 1
            losses.add(last.step, last.loss)
            seconds.add(last.step, last.step_s)
            if last.samples > full:
                full, times = last.samples, array("d")
            if last.samples == full:
                times.append(last.step_s)
            if last.time_s is not None and count > WARM_UP_STEPS:
                ends.add(last.time_s, last.step + 1)
        measured = times[warm_up(len(times)) :]
        typical = median(measured) if measured else None
        return Steps(count, last, losses.points, seconds.points, ends.points, typical)


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run."""

    count: int
    last: Evaluated | None
    best: Evaluated | None
    """Of the highest accuracy, the first of those alike."""
    losses: tuple[Point, ...]
    """Over the steps."""
    accuracies: tuple[Point, ...]

    @staticmethod
    def of(evaluations: Iterable[Evaluated]) -> Evaluations:
        """Read evaluations in their order."""
        count, last, best = 0, None, None
        losses, accuracies = Thinned(), Thinned()
        for last in evaluations:
            count += 1
            losses.add(last.step, last.loss)
            accuracies.add(last.step, last.top1)
            if best is None or last.top1 > best.top1:
                best = last
        return Evaluations(count, last, best, losses.points, accuracies.points)
