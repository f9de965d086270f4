"""The placement's board as a figure: nodes as boxes with a card per rank, links between neighbouring boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from hybridpar.report.palette import GRID, HEAVY, IDLE, INK, LINE, PALE_INK, PAPER, ink_on, tint
from hybridpar.report.placement import Board, Card, NodeBox, Part, memory_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PER_LINE = 8
LEAST_CARD, MOST_CARD = 1.45, 3.0
PAD = 0.08
LINK = 1.15
"""Between nodes side by side."""
DOWN = 0.4
"""Between lines of nodes."""
TEXT_LINE = 0.14
MEMORY = 0.3
NAME = 0.26
"""Height of a node's name, above its cards."""
REPLICA = 0.06
"""Height of the band that marks a plan replica's ranks."""
BANDS = (HEAVY, LINE)


@dataclass(frozen=True)
class Placed:
    """A node and where it lies."""

    node: NodeBox
    box: Box
    card: tuple[float, float]
    """Width and height of its ranks' cards."""
    line: int

    @property
    def cards(self) -> list[tuple[Card, Box]]:
        """The ranks with their boxes."""
        left, bottom, _, height = self.box
        wide, high = self.card
        columns, top = _per_line(self.node), bottom + height - NAME
        result: list[tuple[Card, Box]] = []
        for i, card in enumerate(self.node.cards):
            x, y = left + PAD + (i % columns) * (wide + PAD), top - (i // columns + 1) * (high + PAD) + PAD
            result.append((card, (x, y, wide, high)))
        return result


@dataclass(frozen=True)
class Layout:
    """Where everything lies, in inches."""

    height: float
    nodes: tuple[Placed, ...]


def arrange(board: Board) -> Layout:
    """Put as many nodes side by side as there is room for, with cards of one size."""
    lines = _lines(board.nodes)
    room = WIDTH - 2 * MARGIN
    wide = MOST_CARD
    for line in lines:
        cards = sum(_per_line(n) for n in line)
        free = room - LINK * (len(line) - 1) - PAD * (cards + len(line))
        wide = min(wide, free / cards)
    highs = [0.28 + MEMORY + max(_parts_height(c) for n in line for c in n.cards) for line in lines]
    rows = [max(-(-len(n.cards) // _per_line(n)) for n in line) for line in lines]
    heights = [NAME + count * (high + PAD) for count, high in zip(rows, highs, strict=True)]
    head = MARGIN + 0.35 + NOTE_LINE * len(board.notes)
    total = head + sum(heights) + DOWN * (len(lines) - 1) + MARGIN
    placed, y = [], total - head
    for number, line in enumerate(lines):
        x = MARGIN
        for node in line:
            width = _per_line(node) * (wide + PAD) + PAD
            box = (x, y - heights[number], width, heights[number])
            placed.append(Placed(node, box, (wide, highs[number]), number))
            x += width + LINK
        y -= heights[number] + DOWN
    return Layout(total, tuple(placed))


def _per_line(node: NodeBox) -> int:
    return min(len(node.cards), MOST_PER_LINE)


def _lines(nodes: Sequence[NodeBox]) -> list[list[NodeBox]]:
    lines: list[list[NodeBox]] = []
    used = 0.0
    for node in nodes:
        width = _per_line(node) * (LEAST_CARD + PAD) + PAD
        if not lines or used + LINK + width > WIDTH - 2 * MARGIN:
            lines.append([])
            used = -LINK
        lines[-1].append(node)
        used += LINK + width
    return lines


def _parts_height(card: Card) -> float:
    return sum(_part_height(part) + 0.04 for part in card.parts)


def _part_height(part: Part) -> float:
    return TEXT_LINE * len(part.lines) + 0.08


def placement_figure(board: Board) -> Figure:
    """Draw a board. The figure is 14 inches wide and as high as its nodes need."""
    layout = arrange(board)
    figure, axes = page(layout.height, board.title, board.notes)
    for before, placed in zip((None, *layout.nodes), layout.nodes, strict=False):
        if before is not None:
            _link(axes, before, placed)
    for placed in layout.nodes:
        _node(axes, board, placed)
    return figure


def _link(axes: Axes, before: Placed, placed: Placed) -> None:
    """Draw the link to the node before, and write what it is."""
    left, bottom, width, height = before.box
    text = placed.node.link or ""
    if before.line == placed.line:
        x, y = left + width, bottom + height / 2
        axes.plot([x, x + LINK], [y, y], color=LINE, linewidth=2.5, solid_capstyle="butt")
        for i, part in enumerate(text.split(", ")):
            at = y + (0.12 if i == 0 else -0.12)
            write(axes, x + LINK / 2, at, fitted(part, LINK - 0.06, SMALL), SMALL, INK, across="center")
        return
    x, y = MARGIN + 0.5, placed.box[1] + placed.box[3]
    axes.plot([x, x], [y, y + DOWN], color=LINE, linewidth=2.5, solid_capstyle="butt")
    write(axes, x + 0.1, y + DOWN / 2, text, SMALL, INK)


def _node(axes: Axes, board: Board, placed: Placed) -> None:
    left, bottom, width, height = placed.box
    boxes(axes, [placed.box], IDLE, edge=LINE, line=1.0, name=placed.node.name)
    y = bottom + height - 0.14
    name = fitted(placed.node.name, width - 2 * PAD, TEXT, bold=True)
    write(axes, left + PAD, y, name, TEXT, INK, bold=True)
    used = text_width(name, TEXT, bold=True) + 0.15
    write(axes, left + PAD + used, y, fitted(placed.node.also, width - 2 * PAD - used, TEXT), TEXT, PALE_INK)
    for card, box in placed.cards:
        _card(axes, card, box, several=board.replicas > 1)


def _card(axes: Axes, card: Card, box: Box, *, several: bool) -> None:
    left, bottom, width, height = box
    boxes(axes, [box], PAPER, edge=LINE, line=0.6, name=f"rank {card.rank}")
    top = bottom + height
    if several:
        boxes(axes, [(left, top - REPLICA, width, REPLICA)], BANDS[card.replica % len(BANDS)])
    write(axes, left + 0.06, top - 0.16, f"rank {card.rank}", SMALL, INK, bold=True)
    if several:
        write(axes, left + width - 0.06, top - 0.16, f"replica {card.replica}", SMALL, PALE_INK, across="right")
    y = top - 0.28
    for part in card.parts:
        _part(axes, part, (left + 0.04, y - _part_height(part), width - 0.08, _part_height(part)))
        y -= _part_height(part) + 0.04
    _memory(axes, card, (left + 0.06, bottom + 0.05, width - 0.12, 0.06))


def _part(axes: Axes, part: Part, box: Box) -> None:
    left, bottom, width, height = box
    pale = tint(part.colour, 0.75)
    boxes(axes, [(left, bottom, width, height)], pale)
    boxes(axes, [(left, bottom, 0.06, height)], part.colour)
    for i, line in enumerate(part.lines):
        y = bottom + height - 0.04 - TEXT_LINE * (i + 0.5)
        bold = i == 0
        write(axes, left + 0.11, y, fitted(line, width - 0.13, SMALL, bold=bold), SMALL, ink_on(pale), bold=bold)


def _memory(axes: Axes, card: Card, box: Box) -> None:
    """Draw a bar of the memory's share of the limit, red where it is above, and write both."""
    left, bottom, width, height = box
    share = card.memory_bytes / card.limit_bytes
    boxes(axes, [box], GRID)
    boxes(axes, [(left, bottom, width * min(share, 1.0), height)], "#555555" if share <= 1 else "#cc0000")
    write(axes, left, bottom + height + 0.08, fitted(memory_text(card), width, SMALL), SMALL, INK)
