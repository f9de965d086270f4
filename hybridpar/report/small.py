"""Small figures: one pair of axes in a page's colours, and what is drawn alike in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridpar.report.figure import DOTS_PER_INCH, FONT
from hybridpar.report.palette import GRID, INK, LINE, PALE_INK
from hybridpar.report.thinning import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#999933", "#56b4e9")
"""Of runs and other things side by side, in turn (Okabe and Ito)."""


def small_figure(name: str, over: str = "step", *, whole: bool = True) -> tuple[Figure, Axes]:
    """Return a figure with axes called by their names; along ``over`` ticks are ``whole`` numbers."""
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=whole))
    return figure, axes


def finish(axes: Axes) -> None:
    """Explain what has a label."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize="small", labelcolor=INK)


def split(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return the two coordinates of some points apart."""
    return [p[0] for p in points], [p[1] for p in points]
