"""A profile's batch study: time per sample, utilisation and occupancy against the micro-batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybridpar.planning.plan import Plan
from hybridpar.profiling.record import Profile
from hybridpar.profiling.study import Figures, Study
from hybridpar.report.figure import DOTS_PER_INCH, FONT, prepare_folder, write_files
from hybridpar.report.palette import GRID, INK, LINE, PALE_INK
from hybridpar.report.text import in_time, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("occupancy.svg", "occupancy.png")
HALF = 0.5
_KNOWN_SHARE = 0.95
"""Of a part's time, so much must have a known figure for the part to have one."""
_UTILISATION, _OCCUPANCY, _BELOW = "#0072b2", "#d55e00", "#cc79a7"


@dataclass(frozen=True)
class Part:
    """A run of layers: a layer, a stage, or the whole model."""

    name: str
    layers: tuple[int, int]
    """Half-open."""


@dataclass(frozen=True)
class Curve:
    """A part over the profile's micro-batch sizes; a figure that is unknown is None."""

    name: str
    sample_s: Figures
    """Forward and backward over the samples."""
    utilisation: Figures
    """As those that follow, the mean over the layers' time."""
    occupancy: Figures
    """While busy."""
    below_half: Figures
    """Share of the busy time."""


def parts_of(profile: Profile, plan: Plan | None) -> tuple[Part, ...]:
    """Return the segments of a plan; without one the whole model."""
    if plan is None:
        return (Part("whole model", (0, len(profile.layers))),)
    return tuple(
        Part(stage.kind if len(stage.segments) == 1 else f"{stage.kind} {number}", segment.layers)
        for stage in plan.stages
        for number, segment in enumerate(stage.segments)
    )


def layer_parts(profile: Profile) -> tuple[Part, ...]:
    """Return every layer that takes time, as a part."""
    return tuple(Part(layer.name, (i, i + 1)) for i, layer in enumerate(profile.layers) if any(layer.forward_s[0]))


def curve(profile: Profile, part: Part) -> Curve:
    """Return a part's figures; those of several layers are means over the time that they describe."""
    assert profile.study is not None
    points = [_point(profile, profile.study, range(*part.layers), j) for j in range(len(profile.micro_batches))]
    sample_s, utilisation, occupancy, below = zip(*points, strict=True)
    return Curve(part.name, sample_s, utilisation, occupancy, below)


def _point(profile: Profile, study: Study, layers: Sequence[int], j: int) -> tuple[float | None, ...]:
    entries = [(profile.layers[i].forward_s[0], profile.layers[i].backward_s[0]) for i in layers]
    if any(len(row) <= j for pair in entries for row in pair):
        return None, None, None, None
    times = [forward[j] + backward[j] for forward, backward in entries]
    shares = [study.layers[i].utilisation[j] for i in layers]
    spent = [_spent(study, seconds, share) for seconds, share in zip(times, shares, strict=True)]
    worked = [None if share is None else share * s for share, s in zip(shares, spent, strict=True)]
    return (
        sum(times) / profile.micro_batches[j],
        _mean(shares, spent),
        _mean([study.layers[i].occupancy[j] for i in layers], worked),
        _mean([study.layers[i].below_half[j] for i in layers], worked),
    )


def _spent(study: Study, seconds: float, utilisation: float | None) -> float:
    """Return the time that a utilisation is a share of: on a CPU, layers' times are what the thread worked."""
    if study.sources.get("utilisation") != "cpu time" or not utilisation:
        return seconds
    return seconds / utilisation


def _mean(values: Sequence[float | None], weights: Sequence[float | None]) -> float | None:
    """Return the weighted mean, where nearly all of the weight has a value."""
    total = sum(w for w in weights if w is not None)
    known = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and w is not None]
    known_weight = sum(w for _, w in known)
    if not known_weight or known_weight < _KNOWN_SHARE * total:
        return None
    return sum(v * w for v, w in known) / known_weight


def show(profile: Profile, plan: Plan | None, console: Console) -> None:
    """Print the parts with all figures, the device's counters, and every layer's time per sample and occupancy."""
    assert profile.study is not None
    console.print(_parts_table(profile, [curve(profile, part) for part in parts_of(profile, plan)]))
    layers = [curve(profile, part) for part in layer_parts(profile)]
    times = {own.name: [_seconds(s) for s in own.sample_s] for own in layers}
    console.print(_layers_table(profile, "layers: forward and backward per sample", times))
    if any(value is not None for own in layers for value in own.occupancy):
        full = {own.name: [_share(value) for value in own.occupancy] for own in layers}
        console.print(_layers_table(profile, "layers: occupancy while busy", full))
    for source in (f"{name}: {value}" for name, value in sorted(profile.study.sources.items())):
        console.print(Text(source, style="dim"))


def _parts_table(profile: Profile, curves: Sequence[Curve]) -> Table:
    assert profile.study is not None
    table = titled("forward and backward by micro-batch; what is counted is of passes through the whole model")
    for name in ("part", "micro-batch", "per sample", "utilisation", "occupancy while busy", "below 50 %"):
        table.add_column(name, justify="left" if name == "part" else "right")
    counters = profile.study.device
    counted = any(value is not None for figures in vars(counters).values() for value in figures)
    for name in ("counted: busy", "occupancy", "tensor", "memory") if counted else ():
        table.add_column(name, justify="right")
    for own in curves:
        for j, size in enumerate(profile.micro_batches):
            cells = (own.utilisation[j], own.occupancy[j], own.below_half[j])
            more = [_share(getattr(counters, name)[j]) if own is curves[0] else "" for name in vars(counters)]
            table.add_row(
                own.name if j == 0 else "",
                str(size),
                _seconds(own.sample_s[j]),
                *map(_share, cells),
                *(more if counted else ()),
            )
    return table


def _layers_table(profile: Profile, title: str, layers: Mapping[str, Sequence[str]]) -> Table:
    table = titled(title)
    table.add_column("layer")
    for size in profile.micro_batches:
        table.add_column(f"at {size}", justify="right")
    for name, cells in layers.items():
        table.add_row(Text(name), *cells)
    return table


def _seconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else in_time(seconds)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def draw(profile: Profile, plan: Plan | None, folder: Path) -> tuple[Path, ...]:
    """Write ``FILES`` into a folder, which is made, and return their paths.

    Raises ConfigError where the folder cannot be written or matplotlib is missing.
    """
    prepare_folder(folder)
    return write_files(folder, dict.fromkeys(FILES, study_figure(profile, parts_of(profile, plan))))


def study_figure(profile: Profile, parts: Sequence[Part]) -> Figure:
    """Return the talk's figure for every part: how busy and how full the device is, and what a sample costs."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and an optional dependency

    figure = Figure(
        figsize=(max(5.0, 3.4 * len(parts) + 1.0), 5.8), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained"
    )
    grid = figure.subplots(2, len(parts), sharex=True, squeeze=False)
    for column, part in enumerate(parts):
        own = curve(profile, part)
        _draw_use(grid[0, column], profile, own)
        _draw_time(grid[1, column], profile, own)
        if column:
            grid[0, column].set_ylabel("")
            grid[1, column].set_ylabel("")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(parts) or 1, frameon=False, fontsize=8)
    return figure


def _draw_use(axes: Axes, profile: Profile, own: Curve) -> None:
    sizes = profile.micro_batches
    for name, figures, colour, marker in (
        ("utilisation", own.utilisation, _UTILISATION, "o"),
        ("occupancy while busy", own.occupancy, _OCCUPANCY, "s"),
        ("share of busy time below 50 %", own.below_half, _BELOW, "^"),
    ):
        known = [(size, 100 * value) for size, value in zip(sizes, figures, strict=True) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=4, label=name)
    if all(value is None for value in own.occupancy):
        axes.text(0.5, 0.08, "occupancy unknown", color=PALE_INK, ha="center", transform=axes.transAxes)
    axes.axhline(100 * HALF, color=LINE, linewidth=1.0, linestyle="--", zorder=1)
    axes.set_ylim(0, 105)
    axes.set_title(own.name, fontsize=10, color=INK)
    _dress(axes, "% of the time, or of warps")


def _draw_time(axes: Axes, profile: Profile, own: Curve) -> None:
    known = [(size, 1e3 * s) for size, s in zip(profile.micro_batches, own.sample_s, strict=True) if s is not None]
    axes.plot(*zip(*known, strict=True), color=INK, marker="o", markersize=4)
    axes.set_ylim(bottom=0, top=1.1 * max(ms for _, ms in known))
    axes.set_xscale("log", base=2)
    axes.set_xticks(profile.micro_batches, [str(size) for size in profile.micro_batches], minor=False)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel("micro-batch, samples", color=INK, family=[FONT, "sans-serif"])
    _dress(axes, "ms per sample")


def _dress(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK, family=[FONT, "sans-serif"])
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
