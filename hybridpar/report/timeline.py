"""The timeline of a step as a scene: rows of coloured cells per rank, without any drawing.

A scene is small whatever the program: what is too short to be seen is summed up per window of time, in which each
colour's cells are put together, so that every colour keeps its time. Above ``MOST_ROWS`` ranks, ranks that do the
same at the same time share a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybridpar.cluster.topology import Cluster
from hybridpar.planning.compression import WORKS
from hybridpar.planning.program import Action, Program
from hybridpar.planning.timeline import Flight, Span, Timeline
from hybridpar.report.palette import OTHER, UPDATE, Lane, Phase, communication, stage_colour, stage_key
from hybridpar.report.wording import duration, plural, ranges

MOST_ROWS = 64
MOST_CELLS = 14_000
"""Of a scene: an SVG of it stays below 2 MB."""
LEAST_WINDOW = 1 / 1600
"""Of the time axis: about a pixel; shorter cells are summed up."""
GAP = 1e-4
"""Of the time axis: a gap that nobody sees; blocks of a micro-batch this close are drawn as one."""
SAME = 0.02
"""Of the time axis: ranks whose computations start no further apart count as doing the same."""
LANES: tuple[Lane, ...] = ("activations", "gradients", "collectives")

BACKWARD = {"backward"}
FORWARD = {"forward", "score", "loss"}
UPDATING = {"update", "norm", *WORKS}


@dataclass(frozen=True, slots=True)
class Paint:
    """What a colour stands for."""

    name: str
    """In the legend; a stage's forward and backward share it."""
    phase: Phase
    colour: str
    order: int
    """Of the legend."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A coloured piece of a row; seconds from the picture's left edge."""

    start_s: float
    end_s: float
    paint: Paint
    label: str = ""
    """The micro-batch; empty where several computations are summed up."""


@dataclass(frozen=True)
class Row:
    """What one rank does, and all ranks that do the same."""

    ranks: tuple[int, ...]
    """The rank itself first, then those it stands for."""
    node: int
    label: str
    cells: tuple[Cell, ...]
    lanes: Mapping[Lane, tuple[Cell, ...]]
    """Communication that the rank takes part in."""


@dataclass(frozen=True)
class Scene:
    """A step of all ranks."""

    title: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    length_s: float
    """From the step's first computation to its end on all ranks."""
    previous_end_s: float
    """When the step before, for which ranks compute until then, ends on the last; 0 if too early to be seen."""
    window_s: float
    """Time below which cells are summed up."""

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes that hold anything on any rank."""
        return tuple(lane for lane in LANES if any(row.lanes.get(lane) for row in self.rows))

    @property
    def paints(self) -> tuple[Paint, ...]:
        """What the legend explains, in its order."""
        cells = (c for row in self.rows for group in (row.cells, *row.lanes.values()) for c in group)
        return tuple(sorted({c.paint for c in cells}, key=lambda p: (p.order, p.name)))

    @property
    def cells(self) -> int:
        """Number of coloured pieces."""
        return sum(len(row.cells) + sum(map(len, row.lanes.values())) for row in self.rows)


def timeline_scene(program: Program, timeline: Timeline, cluster: Cluster) -> Scene:
    """Arrange the timeline's last step, from its first computation on. The timeline must hold one."""
    begin = min(s.start_s for s in timeline.spans)
    length = max([timeline.ends_s[-1], *(s.end_s for s in timeline.spans)]) - begin
    own: dict[int, list[Span]] = {rank: [] for rank in range(len(program.actions))}
    for span in sorted(timeline.spans, key=lambda s: s.start_s):
        own[span.rank].append(span)
    groups = _groups(own, SAME * length) if len(own) > MOST_ROWS else [(rank,) for rank in own]
    shown, left_out = groups[:MOST_ROWS], groups[MOST_ROWS:]
    flights = _flights_by_rank(program, timeline.flights)
    painted = {g[0]: _computations(program, own[g[0]], begin) for g in shown}
    lanes = {g[0]: _communications(program, flights[g[0]], begin) for g in shown}
    window = LEAST_WINDOW * length
    while True:
        rows = tuple(_row(cluster, g, painted[g[0]], lanes[g[0]], window, GAP * length) for g in shown)
        previous = (timeline.ends_s[-2] if len(timeline.ends_s) > 1 else 0.0) - begin
        notes = (
            *_notes(program, shown, left_out),
            f"below {duration(window)}, computations are summed up and gaps in communication are closed",
        )
        visible = previous if previous > LEAST_WINDOW * length else 0.0
        scene = Scene(title(program, cluster, timeline.period_s), notes, rows, length, visible, window)
        if scene.cells <= MOST_CELLS:
            return scene
        window *= 1.5


def title(program: Program, cluster: Cluster, step_s: float | None = None) -> str:
    """Return the plan in one line: shape, micro-batches, step time."""
    plan = program.plan
    parts = []
    for stage in plan.stages:
        noun = {"front": "replica", "middle": "segment", "tail": "shard"}[stage.kind]
        parts.append(f"{stage.kind} {plural(stage.degree, noun)} x micro-batch {stage.micro_batch}")
    stages = " | ".join(parts)
    step = "" if step_s is None else f" · step {duration(step_s)}"
    return f"{plan.model} on {cluster.name} · {stages} · global batch {plan.global_batch}{step}"


def _notes(
    program: Program, shown: Sequence[tuple[int, ...]], left_out: Sequence[tuple[int, ...]]
) -> tuple[str, ...]:
    """Say which ranks are not drawn."""
    notes = []
    local = len(program.actions)
    if program.plan.world > local:
        copies = program.plan.world // local
        others = ", ".join(f"r+{k * local}" for k in range(1, min(copies, 4))) + (", ..." if copies > 4 else "")
        notes.append(f"plan replica 0 of {copies}, {local} ranks each: rank r also stands for {others}")
    if any(len(g) > 1 for g in shown):
        total = sum(map(len, shown))
        notes.append(f"{len(shown)} rows for {total} ranks: ranks that do the same at the same time share a row")
    if left_out:
        missing = tuple(sorted(r for g in left_out for r in g))
        notes.append(f"not drawn: {plural(len(missing), 'rank')} of {len(program.actions)} ({ranges(missing, 6)})")
    return tuple(notes)


def _groups(own: Mapping[int, Sequence[Span]], tolerance_s: float) -> list[tuple[int, ...]]:
    """Put ranks together that run the same computations within a tolerance of each other."""
    alike: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
    for rank, spans in own.items():
        work = tuple((s.action.kind, s.action.block, s.action.micro_batch) for s in spans)
        for group in alike[work]:
            first = own[group[0]]
            if all(abs(a.start_s - b.start_s) <= tolerance_s for a, b in zip(first, spans, strict=True)):
                group.append(rank)
                break
        else:
            alike[work].append([rank])
    return sorted(tuple(group) for groups in alike.values() for group in groups)


def _flights_by_rank(program: Program, flights: Iterable[Flight]) -> dict[int, list[Flight]]:
    result: dict[int, list[Flight]] = defaultdict(list)
    for flight in sorted(flights, key=lambda f: f.start_s):
        for rank in program.operations[flight.operation].ranks:
            result[rank].append(flight)
    return result


def paint_of(program: Program, action: Action) -> Paint:
    """Return what a computation is drawn as."""
    if action.kind in UPDATING:
        return Paint("update", "update", UPDATE, 10_000)
    if action.block is None or action.kind not in FORWARD | BACKWARD:
        return Paint("load, copy", "other", OTHER, 10_001)
    position = program.positions[program.blocks[action.block].position]
    phase: Phase = "backward" if action.kind in BACKWARD else "forward"
    name, place = stage_key(position, len(program.plan.stages[position.stage].segments))
    order = 2 * (position.index - position.segment + place) + (phase == "backward")
    return Paint(name, phase, stage_colour(position, phase), order)


def _computations(program: Program, spans: Iterable[Span], begin: float) -> list[Cell]:
    result = []
    for span in spans:
        paint = paint_of(program, span.action)
        number = span.action.micro_batch if paint.phase in {"forward", "backward"} else None
        result.append(Cell(span.start_s - begin, span.end_s - begin, paint, "" if number is None else str(number)))
    return result


def joined(cells: Iterable[Cell], gap_s: float) -> list[Cell]:
    """Join the blocks of a micro-batch that follow each other without a gap to be seen."""
    result: list[Cell] = []
    for cell in cells:
        last = result[-1] if result else None
        if last and (last.paint, last.label) == (cell.paint, cell.label) and cell.start_s - last.end_s <= gap_s:
            result[-1] = Cell(last.start_s, cell.end_s, last.paint, last.label)
        else:
            result.append(cell)
    return result


def _communications(program: Program, flights: Iterable[Flight], begin: float) -> dict[Lane, list[Cell]]:
    result: dict[Lane, list[Cell]] = defaultdict(list)
    for flight in flights:
        name, colour, lane = communication(program.operations[flight.operation].content)
        paint = Paint(name, "communication", colour, 20_000 + LANES.index(lane))
        result[lane].append(Cell(max(flight.start_s - begin, 0.0), flight.end_s - begin, paint))
    return result


def _row(
    cluster: Cluster,
    ranks: tuple[int, ...],
    cells: Sequence[Cell],
    lanes: Mapping[Lane, Sequence[Cell]],
    window_s: float,
    gap_s: float,
) -> Row:
    node = cluster.node_of[ranks[0]]
    also = f" (also {ranges(ranks[1:], 2)})" if len(ranks) > 1 else ""
    where = f"node{node} · " if len(cluster.nodes) > 1 else ""
    busy = {lane: united(own, window_s) for lane, own in lanes.items()}
    return Row(ranks, node, f"{where}rank {ranks[0]}{also}", summed(joined(cells, gap_s), window_s), busy)


def summed(cells: Sequence[Cell], window_s: float) -> tuple[Cell, ...]:
    """Sum up cells shorter than a window: neighbours inside it are put together by colour, their time kept."""
    result: list[Cell] = []
    pending: list[Cell] = []
    for cell in cells:
        if pending and (cell.end_s - pending[0].start_s > window_s):
            result += _together(pending)
            pending = []
        if cell.end_s - cell.start_s > window_s:
            result.append(cell)
        else:
            pending.append(cell)
    result += _together(pending)
    return tuple(result)


def _together(cells: Sequence[Cell]) -> list[Cell]:
    """Return one cell per colour, side by side from the first one's start, with all the cells' time."""
    if len(cells) < 2:
        return list(cells)
    seconds: dict[Paint, float] = defaultdict(float)
    for cell in cells:
        seconds[cell.paint] += cell.end_s - cell.start_s
    result, at = [], cells[0].start_s
    for paint, time in seconds.items():
        result.append(Cell(at, at + time, paint))
        at += time
    return result


def united(cells: Sequence[Cell], window_s: float) -> tuple[Cell, ...]:
    """Join cells of a colour that overlap or lie closer than a window; communications may overlap on a rank."""
    result: list[Cell] = []
    last: dict[Paint, int] = {}
    for cell in cells:
        at = last.get(cell.paint)
        if at is not None and cell.start_s - result[at].end_s < window_s:
            known = result[at]
            result[at] = Cell(known.start_s, max(known.end_s, cell.end_s), cell.paint)
        else:
            last[cell.paint] = len(result)
            result.append(cell)
    return tuple(result)
