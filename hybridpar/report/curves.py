"""Curves of runs over their steps, and bars of memory, as small figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridpar.report.palette import LINE
from hybridpar.report.run import Run
from hybridpar.report.small import COLOURS, finish, small_figure, split
from hybridpar.report.text import in_bytes
from hybridpar.report.thinning import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MARKED = 50
"""Points of a curve that are drawn one by one."""
LIMIT_IN_SIGHT = 3.0
"""A limit of memory is drawn up to so many times the highest bar."""


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Draw the training's loss, and as marks that of the evaluations."""
    figure, axes = small_figure("loss")
    for run, colour in zip(runs, _colours(runs), strict=True):
        axes.plot(*split(run.steps.losses), color=colour, linewidth=1.0, label=f"{run.name}: training")
        tested = run.evaluations.losses
        if tested:
            style = (0, (3, 2))
            axes.plot(
                *split(tested), color=colour, marker=_marker(tested), linestyle=style, label=f"{run.name}: test"
            )
    finish(axes)
    return figure


def accuracy_figure(runs: Sequence[Run]) -> Figure | None:
    """Draw the test accuracy; None where no run was evaluated."""
    if not any(run.evaluations.count for run in runs):
        return None
    figure, axes = small_figure("test accuracy")
    for run, colour in zip(runs, _colours(runs), strict=True):
        points = run.evaluations.accuracies
        axes.plot(*split(points), color=colour, marker=_marker(points), label=run.name)
    axes.set_ylim(0, 1)
    finish(axes)
    return figure


def time_figure(runs: Sequence[Run]) -> Figure:
    """Draw the steps' times, and as lines what was predicted."""
    figure, axes = small_figure("ms per step")
    for run, colour in zip(runs, _colours(runs), strict=True):
        points = [(step, seconds * 1e3) for step, seconds in run.steps.seconds]
        axes.plot(*split(points), color=colour, linewidth=1.0, label=f"{run.name}: measured")
        if run.plan.prediction is not None:
            expected_ms = run.plan.prediction.step_s * 1e3
            axes.axhline(expected_ms, color=colour, linestyle=(0, (4, 3)), label=f"{run.name}: predicted")
    axes.set_ylim(bottom=0)
    finish(axes)
    return figure


def memory_figure(run: Run) -> Figure | None:
    """Draw the memory of every rank, measured beside predicted, and its limit; None until the run has ended.

    A limit that is far above all bars is told and not drawn.
    """
    if run.summary is None:
        return None
    found, expected = run.summary.measured_memory_bytes, run.summary.predicted_memory_bytes
    figure, axes = small_figure("MiB", "rank")
    ranks = range(len(found))
    axes.bar([r - 0.2 for r in ranks], [b / 2**20 for b in found], 0.4, color=COLOURS[0], label="measured")
    if expected is not None:
        axes.bar([r + 0.2 for r in ranks], [b / 2**20 for b in expected], 0.4, color=LINE, label="predicted")
    highest: float = max(*found, *(expected or ()))
    if run.basis is not None:
        limits = [run.basis.cluster.memory_bytes(rank) for rank in ranks]
        if min(limits) <= LIMIT_IN_SIGHT * highest:
            left, right = [r - 0.45 for r in ranks], [r + 0.45 for r in ranks]
            axes.hlines([b / 2**20 for b in limits], left, right, color=COLOURS[1], linewidth=1.6, label="limit")
            highest = max(highest, *(b for b in limits if b <= LIMIT_IN_SIGHT * highest))
        else:
            axes.plot([], [], color=COLOURS[1], label=f"limit: from {in_bytes(min(limits))} on, above the picture")
    axes.set_ylim(top=1.4 * highest / 2**20)  # room for the legend
    finish(axes)
    return figure


def _marker(points: Sequence[Point]) -> str | None:
    """Mark points as long as they can be told apart."""
    return "o" if len(points) <= MOST_MARKED else None


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(runs))]
