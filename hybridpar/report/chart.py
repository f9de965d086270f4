"""Scenes of timelines as a figure: rows of ranks with communication in thin lanes below, over the time.

Several scenes stand one above the other on one scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridpar.report.figure import (
    MARGIN,
    NOTE_LINE,
    SMALL,
    TEXT,
    WIDTH,
    Box,
    boxes,
    fitted,
    page,
    text_width,
    write,
)
from hybridpar.report.palette import GRID, IDLE, INK, LINE, PALE_INK, ink_on
from hybridpar.report.timeline import Paint, Row, Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 1500
"""Micro-batches that are written, the widest cells first; an SVG needs 300 bytes for each."""
SEAM = 0.01
"""Of a cell's right side, left free, so that neighbours of one colour can be told apart; inches."""
LEGEND_LINE = 0.2
LEGEND_BOX = 0.13
AXIS = 0.55
"""Below the rows, for the time."""
HEADING = 0.3
"""Above the rows of one of several scenes."""


class _Frame:
    """Where a scene's rows lie, in inches; ``top`` is the upper edge of the first."""

    def __init__(self, scene: Scene, left: float, length_s: float) -> None:
        self.scene, self.left, self.length_s = scene, left, length_s
        rows = len(scene.rows)
        self.compute = 0.34 if rows <= 8 else 0.2 if rows <= 32 else 0.15
        self.lane = 0.07 if rows <= 8 else 0.045 if rows <= 32 else 0.03
        self.pitch = self.compute + len(scene.lanes) * self.lane + (0.12 if rows <= 8 else 0.06)
        self.node_gap = 0.14 if rows <= 8 else 0.08
        self.right = WIDTH - MARGIN
        jumps = sum(a.node != b.node for a, b in zip(scene.rows, scene.rows[1:], strict=False))
        self.height = rows * self.pitch + jumps * self.node_gap
        self.top = 0.0

    def x(self, seconds: float) -> float:
        """Return where a time lies."""
        return self.left + (self.right - self.left) * seconds / self.length_s

    def tops(self) -> list[float]:
        """Return the upper edge of every row."""
        result, at = [], self.top
        for i, row in enumerate(self.scene.rows):
            if i and row.node != self.scene.rows[i - 1].node:
                at -= self.node_gap
            result.append(at)
            at -= self.pitch
        return result


def timeline_figure(scene: Scene) -> Figure:
    """Draw a scene. The figure is 14 inches wide and as high as its rows need."""
    return _figure(scene.title, scene.notes, [("", scene)])


def timelines_figure(title: str, scenes: Sequence[tuple[str, Scene]]) -> Figure:
    """Draw scenes one above the other on one scale, each under its heading with its notes."""
    return _figure(title, (), scenes)


def _figure(title: str, notes: Sequence[str], scenes: Sequence[tuple[str, Scene]]) -> Figure:
    rows = [row for _, scene in scenes for row in scene.rows]
    left = MARGIN + max(text_width(row.label, TEXT) for row in rows) + 0.08
    length_s = max(scene.length_s for _, scene in scenes)
    frames = [_Frame(scene, left, length_s) for _, scene in scenes]
    heads = [HEADING if heading else 0.0 for heading, _ in scenes]
    legend = _legend_lines([p for _, scene in scenes for p in scene.paints], WIDTH - 2 * MARGIN)
    bottom = MARGIN + LEGEND_LINE * (len(legend) + 1)
    body = sum(head + frame.height + AXIS for head, frame in zip(heads, frames, strict=True))
    height = MARGIN + 0.3 + NOTE_LINE * len(notes) + body + bottom
    figure, axes = page(height, title, notes)
    at = bottom + body
    for (heading, _), head, frame in zip(scenes, heads, frames, strict=True):
        frame.top = at - head
        if heading:
            _heading(axes, heading, frame.scene.notes, at - head / 2 + 0.05)
        _axis(axes, frame)
        _cells(axes, frame)
        at = frame.top - frame.height - AXIS
    _legend(axes, legend, frames)
    return figure


def _heading(axes: Axes, heading: str, notes: Sequence[str], y: float) -> None:
    write(axes, MARGIN, y, heading, TEXT, INK, bold=True)
    used = MARGIN + text_width(heading, TEXT, bold=True) + 0.15
    write(axes, used, y, fitted(" · ".join(notes), WIDTH - MARGIN - used, SMALL), SMALL, PALE_INK)


def _cells(axes: Axes, frame: _Frame) -> None:
    """Draw backgrounds, cells and lanes by colour, and the micro-batches that fit."""
    background: list[Box] = []
    found: dict[Paint, list[Box]] = defaultdict(list)
    labels: list[tuple[float, float, float, str, str]] = []
    for row, top in zip(frame.scene.rows, frame.tops(), strict=True):
        base = top - frame.compute
        background.append((frame.left, base, frame.x(frame.scene.length_s) - frame.left, frame.compute))
        for cell in row.cells:
            left, width = frame.x(cell.start_s), frame.x(cell.end_s) - frame.x(cell.start_s)
            found[cell.paint].append((left, base, max(width - SEAM, 0.6 * width), frame.compute))
            if cell.label and text_width(cell.label, SMALL) + 0.02 < width:
                ink = ink_on(cell.paint.colour)
                labels.append((width, left + width / 2, base + frame.compute / 2, cell.label, ink))
        for paint, box in _lanes(frame, row, base):
            found[paint].append(box)
        write(axes, frame.left - 0.06, base + frame.compute / 2, row.label, TEXT, INK, across="right")
    boxes(axes, background, IDLE, name="idle")
    for paint, at in sorted(found.items(), key=lambda item: item[0].order):
        boxes(axes, at, paint.colour, name=paint.name)
    for _, x, y, label, ink in sorted(labels, reverse=True)[:MOST_LABELS]:
        write(axes, x, y, label, SMALL, ink, across="center")


def _lanes(frame: _Frame, row: Row, base: float) -> list[tuple[Paint, Box]]:
    """Return the boxes of a row's communication; the shortest are widened until they can be seen."""
    result = []
    for number, lane in enumerate(frame.scene.lanes):
        bottom = base - (number + 1) * frame.lane
        for cell in row.lanes.get(lane, ()):
            left = frame.x(cell.start_s)
            width = min(max(frame.x(cell.end_s) - left, 0.01), frame.right - left)
            result.append((cell.paint, (left, bottom + 0.1 * frame.lane, width, 0.8 * frame.lane)))
    return result


def _axis(axes: Axes, frame: _Frame) -> None:
    """Draw the time in milliseconds along the bottom, and where the step before ends."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - an optional dependency

    scene, length_ms = frame.scene, frame.length_s * 1e3
    top, bottom = frame.top + 0.03, frame.tops()[-1] - frame.pitch
    ticks = [t for t in MaxNLocator(12).tick_values(0, length_ms) if 0 <= t <= length_ms]
    axes.plot([frame.left, frame.right], [bottom, bottom], color=LINE, linewidth=0.8)
    for tick in ticks:
        x = frame.x(tick / 1e3)
        axes.plot([x, x], [bottom, top], color=GRID, linewidth=0.5, zorder=0)
        write(axes, x, bottom - 0.1, f"{tick:.6g}", SMALL, INK, across="center")
    write(axes, (frame.left + frame.right) / 2, bottom - 0.27, "ms", TEXT, INK, across="center")
    if scene.previous_end_s > 0:
        x = frame.x(scene.previous_end_s)
        axes.plot([x, x], [bottom, top], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=5)


def _legend_lines(paints: Sequence[Paint], width: float) -> list[list[tuple[float, list[Paint]]]]:
    """Place the legend's entries, one per name; computation and communication have lines of their own."""
    entries: dict[tuple[bool, str], list[Paint]] = defaultdict(list)
    for paint in sorted(set(paints), key=lambda p: (p.order, p.name)):
        entries[paint.phase == "communication", paint.name].append(paint)
    lines: list[list[tuple[float, list[Paint]]]] = []
    at, last = 0.0, None
    for (communicating, name), own in entries.items():
        wide = len(own) * LEGEND_BOX + 0.06 + text_width(name, TEXT) + 0.2
        if communicating is not last or at + wide > width:
            lines.append([])
            at, last = 0.0, communicating
        lines[-1].append((at, own))
        at += wide
    return lines


def _legend(axes: Axes, legend: list[list[tuple[float, list[Paint]]]], frames: Sequence[_Frame]) -> None:
    y = MARGIN + LEGEND_LINE * (len(legend) + 0.5)
    for line in legend:
        for at, paints in line:
            x = MARGIN + at
            for paint in paints:
                height = LEGEND_BOX * (0.5 if paint.phase == "communication" else 1.0)
                boxes(axes, [(x, y - height / 2, LEGEND_BOX, height)], paint.colour)
                x += LEGEND_BOX
            write(axes, x + 0.06, y, paints[0].name, TEXT, INK)
        y -= LEGEND_LINE
    hint = "pale: forward · full colour: backward · number: micro-batch · grey background: idle"
    if all(frame.scene.lanes == frames[0].scene.lanes for frame in frames) and frames[0].scene.lanes:
        hint += f" · thin lanes below a rank, its communication: {', '.join(frames[0].scene.lanes)}"
    if any(frame.scene.previous_end_s > 0 for frame in frames):
        hint += " · dashed: the step before ends"
    write(axes, MARGIN, y, fitted(hint, WIDTH - 2 * MARGIN, SMALL), SMALL, PALE_INK)
