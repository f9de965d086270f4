"""Curves of runs over their steps, and bars of memory, as small figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridpar.report.figure import DOTS_PER_INCH, FONT
from hybridpar.report.palette import GRID, INK, LINE, PALE_INK
from hybridpar.report.run import Run
from hybridpar.report.thinning import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#999933", "#56b4e9")
"""Of runs, in turn (Okabe and Ito)."""
MOST_MARKED = 50
"""Points of a curve that are drawn one by one."""


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Draw the training's loss, and as marks that of the evaluations."""
    figure, axes = _figure("loss")
    for run, colour in zip(runs, _colours(runs), strict=True):
        axes.plot(*_split(run.steps.losses), color=colour, linewidth=1.0, label=f"{run.name}: training")
        tested = run.evaluations.losses
        if tested:
            style = (0, (3, 2))
            axes.plot(
                *_split(tested), color=colour, marker=_marker(tested), linestyle=style, label=f"{run.name}: test"
            )
    _finish(axes)
    return figure


def accuracy_figure(runs: Sequence[Run]) -> Figure | None:
    """Draw the test accuracy; None where no run was evaluated."""
    if not any(run.evaluations.count for run in runs):
        return None
    figure, axes = _figure("test accuracy")
    for run, colour in zip(runs, _colours(runs), strict=True):
        points = run.evaluations.accuracies
        axes.plot(*_split(points), color=colour, marker=_marker(points), label=run.name)
    axes.set_ylim(0, 1)
    _finish(axes)
    return figure


def time_figure(runs: Sequence[Run]) -> Figure:
    """Draw the steps' times, and as lines what was predicted."""
    figure, axes = _figure("ms per step")
    for run, colour in zip(runs, _colours(runs), strict=True):
        points = [(step, seconds * 1e3) for step, seconds in run.steps.seconds]
        axes.plot(*_split(points), color=colour, linewidth=1.0, label=f"{run.name}: measured")
        if run.plan.prediction is not None:
            expected_ms = run.plan.prediction.step_s * 1e3
            axes.axhline(expected_ms, color=colour, linestyle=(0, (4, 3)), label=f"{run.name}: predicted")
    axes.set_ylim(bottom=0)
    _finish(axes)
    return figure


def memory_figure(run: Run) -> Figure | None:
    """Draw the memory of every rank, measured beside predicted; None as long as the run has not ended."""
    if run.summary is None:
        return None
    found, expected = run.summary.measured_memory_bytes, run.summary.predicted_memory_bytes
    figure, axes = _figure("MiB", "rank")
    ranks = range(len(found))
    axes.bar([r - 0.2 for r in ranks], [b / 2**20 for b in found], 0.4, color=COLOURS[0], label="measured")
    if expected is not None:
        axes.bar([r + 0.2 for r in ranks], [b / 2**20 for b in expected], 0.4, color=LINE, label="predicted")
    axes.set_ylim(top=1.3 * max(*found, *(expected or ())) / 2**20)  # room for the legend
    _finish(axes)
    return figure


def _figure(name: str, over: str = "step") -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and an optional dependency
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(5.6, 3.0), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_xlabel(over, color=INK, family=[FONT, "sans-serif"])
    axes.set_ylabel(name, color=INK, family=[FONT, "sans-serif"])
    axes.tick_params(colors=PALE_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(LINE)
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _finish(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize="small", labelcolor=INK)


def _marker(points: Sequence[Point]) -> str | None:
    """Mark points as long as they can be told apart."""
    return "o" if len(points) <= MOST_MARKED else None


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(runs))]


def _split(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]
