"""Figures of what GPUs and hosts did over a run: utilisation against occupancy, CPUs, network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hybridpar.report.kernels import RankKernels, by_stage
from hybridpar.report.palette import IDLE, INK, LINE, PALE_INK, tint
from hybridpar.report.recording import GpuRecord, HostRecord
from hybridpar.report.run import Run
from hybridpar.report.small import COLOURS, finish, small_figure, split
from hybridpar.report.thinning import Point
from hybridpar.report.turns import Turns, places_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_GPUS = 16
"""That are drawn one by one; the table has more."""
MOST_HOSTS = 8
MOST_LINES = 8
"""Ranks or interfaces in one figure."""
LEAST_BYTES_PER_S, LEAST_SHARE = 1e3, 0.01
"""An interface that never moved so much, nor such a share of the busiest one's peak, is not drawn."""
_STRIP = 1.03, 0.045
"""Where the strip of stages lies above the axes, and how high it is, of their height."""
_UNITS = (("s", 1.0, 300.0), ("min", 60.0, 18_000.0), ("h", 3600.0, math.inf))
"""Of time axes: name, seconds, and up to which length."""


def gpu_figures(run: Run, turns: Mapping[int, Turns]) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of a run's GPUs with what each shows."""
    gpus = run.recording.gpus[:MOST_GPUS] if run.recording is not None else ()
    places = places_of(run)
    for gpu in gpus:
        ranks = places.ranks_on(gpu.host, gpu.uuid)
        both = Turns.together(turns[rank] for rank in ranks if rank in turns)
        title = " · ".join(filter(None, (gpu_name(gpu), ", ".join(f"rank {r}" for r in ranks), str(both))))
        yield f"utilisation and occupancy of {gpu_name(gpu)}", gpu_figure(gpu, title, both)
    distribution = distribution_figure(gpus)
    if distribution is not None:
        yield "distribution of the occupancy", distribution


def host_figures(run: Run, turns: Mapping[int, Turns]) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of a run's hosts with what each shows."""
    for host in run.recording.hosts[:MOST_HOSTS] if run.recording is not None else ():
        yield f"busy CPUs of {host.host}", cpu_figure(host, turns)
        network = network_figure(host)
        if network is not None:
            yield f"network of {host.host}", network


def gpu_figure(record: GpuRecord, name: str, turns: Turns) -> Figure:
    """Draw utilisation against occupancy over time, and as a strip above what the GPU computes a step for.

    The occupancy has the colour of the stage that it computes most for.
    """
    figure, axes, unit_s = _over_time([record.utilisation, record.occupancy], "%")
    axes.plot(*_percent(record.utilisation, unit_s), color=LINE, linewidth=0.9, label="utilisation")
    if any(not math.isnan(y) for _, y in record.occupancy):
        x, y = _percent(record.occupancy, unit_s)
        axes.fill_between(x, y, color=turns.colour, alpha=0.25, linewidth=0)
        axes.plot(x, y, color=turns.colour, linewidth=1.0, label="occupancy")
    axes.axhline(50, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 104)
    _title(axes, name, pad=16 if turns.turns else 6)
    _strip(axes, turns)
    finish(axes)
    return figure


def distribution_figure(records: Sequence[GpuRecord]) -> Figure | None:
    """Draw how often a busy GPU had which occupancy, one line each, and the line of 50 %; None: unknown of all."""
    known = [record for record in records if sum(record.while_busy)]
    if not known:
        return None
    rows = []
    for number, record in enumerate(known):
        label = f"{gpu_name(record)}: {record.below_half:.0%} below 50 %"
        rows.append((label, COLOURS[number % len(COLOURS)], record.while_busy))
    return _distribution("% of the busy windows", rows)


def kernel_figure(traces: Sequence[RankKernels], turns: Mapping[int, Turns]) -> Figure | None:
    """Draw how long which occupancy lasted in traced steps, a line per stage; None: unknown of all kernels."""
    colours = {turn.stage: turn.colour for own in turns.values() for turn in own.turns}
    rows = []
    for number, (stage, use) in enumerate(by_stage(traces).items()):
        if use.below_half is not None:
            colour = colours.get(stage, COLOURS[number % len(COLOURS)])
            rows.append((f"{stage}: {use.below_half:.0%} below 50 %", colour, use.histogram_s))
    return _distribution("% of the busy time", rows) if rows else None


def _distribution(name: str, rows: Sequence[tuple[str, str, Sequence[float]]]) -> Figure:
    """Draw how often which occupancy was: label, colour and counts in equal parts of 0..1 of every row."""
    figure, axes = small_figure(name, "occupancy while busy, %")
    for label, colour, counts in rows:
        edges = [100 * k / len(counts) for k in range(len(counts) + 1)]
        shares = [100 * count / sum(counts) for count in counts]
        axes.stairs(shares, edges, fill=True, color=tint(colour, 0.4), alpha=0.35)
        axes.stairs(shares, edges, color=colour, linewidth=1.2, label=label)
    axes.axvline(50, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    finish(axes)
    return figure


def cpu_figure(record: HostRecord, turns: Mapping[int, Turns]) -> Figure:
    """Draw the CPUs of a host that were busy, and those of each rank's own process in its stage's colour."""
    shown = list(record.ranks.items())[:MOST_LINES]
    figure, axes, unit_s = _over_time([record.cores], "CPUs busy")
    x, y = _scaled(record.cores, unit_s)
    axes.fill_between(x, y, color=IDLE, linewidth=0)
    axes.plot(x, y, color=PALE_INK, linewidth=0.9, label="all processes")
    for rank, points in shown:
        colour = turns[rank].colour if rank in turns else COLOURS[rank % len(COLOURS)]
        axes.plot(*_scaled(points, unit_s), color=colour, linewidth=0.9, label=f"rank {rank}")
    if record.cpus is not None:
        axes.axhline(record.cpus, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.35 * max([record.cpus or 0, *(v for v in y if not math.isnan(v))]))  # room for the legend
    _title(axes, record.host)
    finish(axes)
    return figure


def network_figure(record: HostRecord) -> Figure | None:
    """Draw what went through a host's interfaces; None where nothing worth drawing did."""
    both = {name: (record.sent[name], record.received[name]) for name in record.sent}
    highest = {name: max(_highest(points) for points in own) for name, own in both.items()}
    least = max(LEAST_BYTES_PER_S, LEAST_SHARE * max(highest.values(), default=0.0))
    lines = [
        (f"{name} {way}", points)
        for name, own in both.items()
        if highest[name] >= least
        for way, points in zip(("sent", "received"), own, strict=True)
    ]
    if not lines:
        return None
    figure, axes, unit_s = _over_time([points for _, points in lines], "MB/s")
    for number, (label, points) in enumerate(lines[:MOST_LINES]):
        x, y = _scaled(points, unit_s)
        style = "-" if label.endswith("sent") else (0, (3, 2))
        colour = COLOURS[number // 2 % len(COLOURS)]
        axes.plot(x, [v / 1e6 for v in y], color=colour, linewidth=0.9, linestyle=style, label=label)
    axes.set_ylim(bottom=0)
    _title(axes, record.host)
    finish(axes)
    return figure


def gpu_name(record: GpuRecord) -> str:
    """Return ``node0 GPU 3``."""
    return f"{record.host} GPU {'?' if record.gpu is None else record.gpu}"


def _over_time(curves: Iterable[Sequence[Point]], name: str) -> tuple[Figure, Axes, float]:
    """Return a figure over the time since the recording began, and the seconds of its unit."""
    length_s = max((x for points in curves for x, _ in points), default=0.0)
    unit, unit_s = next((unit, seconds) for unit, seconds, most_s in _UNITS if length_s <= most_s)
    figure, axes = small_figure(name, unit, whole=False)
    return figure, axes, unit_s


def _highest(points: Sequence[Point]) -> float:
    return max((y for _, y in points if not math.isnan(y)), default=0.0)


def _scaled(points: Sequence[Point], unit_s: float) -> tuple[list[float], list[float]]:
    x, y = split(points)
    return [value / unit_s for value in x], y


def _percent(points: Sequence[Point], unit_s: float) -> tuple[list[float], list[float]]:
    x, y = _scaled(points, unit_s)
    return x, [100 * value for value in y]


def _title(axes: Axes, text: str, pad: float = 6) -> None:
    axes.set_title(text, loc="left", fontsize="small", color=INK, pad=pad, parse_math=False)


def _strip(axes: Axes, turns: Turns) -> None:
    """Draw the stages' shares of a step side by side above the axes; what is left of it is idle."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415 - an optional dependency

    bottom, height = _STRIP
    at = 0.0
    parts = [*((turn.share, turn.colour) for turn in turns.turns), (1.0, IDLE)] if turns.turns else []
    for share, colour in parts:
        width = min(share, 1.0 - at)
        box = Rectangle((at, bottom), width, height, transform=axes.transAxes, facecolor=colour, clip_on=False)
        axes.add_patch(box)
        at += width
