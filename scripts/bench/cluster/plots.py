"""The results as pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bench.cluster.field import OURS
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.summary import FLOOR, Result, Row

OURS_COLOUR, PEER_COLOUR, FLOOR_COLOUR = "#1f6feb", "#8c959f", "#2da44e"
LINES: dict[str, dict[str, Any]] = {
    OURS: {"color": OURS_COLOUR, "linewidth": 2.4},
    FLOOR: {"color": FLOOR_COLOUR, "linestyle": "--"},
}
"""How lines look that are not a peer's."""
ABREAST = 4
"""Panels next to each other."""


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw bars of step times, a panel per setting, and predicted against measured; needs matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package

    shown = [r for r in results if any(row.step_s is not None for row in r.rows)]
    if not shown:
        return
    most = max(len(r.rows) for r in shown)
    columns = min(ABREAST, len(shown) + 1)
    rows = math.ceil((len(shown) + 1) / columns)
    figure = Figure(figsize=(4.6 * columns, rows * (1.4 + 0.32 * most)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, result in zip(axes, shown, strict=False):
        _bars(axis, result)
    _predictions(axes[len(shown)], shown)
    for axis in axes[len(shown) + 1 :]:
        axis.set_axis_off()
    figure.savefig(path)


def draw_links(results: Sequence[Result], path: Path) -> bool:
    """Draw the step over the links' rate, where settings differ in nothing else; return whether there are such."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package
    from matplotlib.ticker import NullLocator  # noqa: PLC0415

    groups = [group for group in _by_links(results).values() if len(group) > 1]
    if not groups:
        return False
    figure = Figure(figsize=(6.4 * len(groups), 4.4), layout="constrained")
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        names = dict.fromkeys(row.name for result in group for row in result.rows)
        for name in names:
            points = [(r.setting.gbit_per_s, row.step_s) for r in group if (row := r.of(name)) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **LINES.get(name, {}))
        axis.set(xscale="log", yscale="log", xlabel="Gbit/s", ylabel="s per step", title=_title(group[0].setting))
        axis.set_xticks([r.setting.gbit_per_s for r in group])
        axis.xaxis.set_minor_locator(NullLocator())
        for part in (axis.xaxis, axis.yaxis):
            part.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="both", labelsize=8)
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path)
    return True


def _by_links(results: Sequence[Result]) -> dict[Setting, list[Result]]:
    groups: dict[Setting, list[Result]] = defaultdict(list)
    for result in results:
        if result.setting.gbit_per_s is not None and any(row.step_s is not None for row in result.rows):
            groups[replace(result.setting, gbit_per_s=None)].append(result)
    return groups


def _title(setting: Setting) -> str:
    return replace(setting, gbit_per_s=None).name


def _bars(axis: Any, result: Result) -> None:
    rows = [row for row in result.rows if row.step_s is not None]
    axis.barh([row.name for row in rows], [row.step_s for row in rows], color=[_colour(row) for row in rows])
    for place, row in enumerate(rows):
        axis.text(row.step_s, place, f" {row.step_s:.2f}", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.tick_params(labelsize=8)
    axis.set(title=result.setting.name, xlabel="s per step")


def _colour(row: Row) -> str:
    if row.ours:
        return OURS_COLOUR
    return FLOOR_COLOUR if row.name == FLOOR else PEER_COLOUR


def _predictions(axis: Any, results: Sequence[Result]) -> None:
    rows = [row for r in results for row in r.rows if row.error is not None]
    measured = [row.step_s or 0.0 for row in rows]
    axis.scatter([row.cell.entry.predicted_s for row in rows], measured, s=16, color=OURS_COLOUR)
    edge = max(measured, default=1.0) * 1.1
    axis.plot([0, edge], [0, edge], color=PEER_COLOUR, linewidth=0.8)
    axis.set(title="our plans", xlabel="predicted s per step", ylabel="measured")
