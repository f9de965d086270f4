"""The front of throughput against memory: as a table, as data, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hybridpar.planning.pareto import Front, Point
from hybridpar.report.figure import DOTS_PER_INCH, FONT, prepare_folder, write_files
from hybridpar.report.palette import GRID, INK, LINE
from hybridpar.report.text import in_bytes, in_time, plural, titled
from hybridpar.schema import to_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("pareto.svg", "pareto.png")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#999933", "#882255", "#56b4e9", "#e69f00")
"""Of the batches in turn; see ``palette``."""
_MARKERS = "osD^vP*X"


def show(found: Front, console: Console) -> None:
    """Print one row per point, by descending throughput, and the batches that have no plan."""
    count = plural(len(found.points), "plan")
    table = titled(
        f"throughput against memory: {count} that no other one beats in both ({found.searches} searches)"
    )
    table.add_column("global batch", justify="right")
    table.add_column("shape")
    for name in ("samples/s", "of the fastest", "step", "memory", "micro-batches"):
        table.add_column(name, justify="right")
    table.add_column("recomputed")
    table.add_column("found with memory_bytes", justify="right")
    fastest = found.points[-1].samples_per_s
    for point in reversed(found.points):
        table.add_row(*_cells(point, fastest))
    console.print(table)
    for batch, reason in found.refused:
        console.print(f"global batch {batch}: {reason}")
    console.print(
        "memory: of the fullest rank, with workspace. A plan again, alone: train.global_batch=... "
        "cluster.device.memory_bytes=... in place of plan.global_batch_range"
    )


def _cells(point: Point, fastest: float) -> list[str]:
    plan = point.plan
    replicas = f" x{plan.replicas}" if plan.replicas > 1 else ""
    return [
        str(plan.global_batch),
        f"{point.shape}{replicas}",
        f"{point.samples_per_s:,.0f}",
        f"{point.samples_per_s / fastest:.0%}",
        in_time(point.prediction.step_s),
        in_bytes(point.memory_bytes),
        " ".join(str(stage.micro_batch) for stage in plan.stages),
        " ".join(stage.kind for stage in plan.stages if stage.recompute) or "-",
        f"{point.limit_bytes:.0f}",
    ]


def as_data(found: Front) -> dict[str, Any]:
    """Return the front as JSON data: ``points`` by ascending memory, and the batches ``without_plan``.

    A point has ``global_batch``, ``samples_per_s``, ``memory_bytes`` (of the fullest rank, with workspace),
    ``limit_bytes`` (what it was searched with), ``shape`` and ``plan``, as ``format=json`` prints it.
    """
    return {
        "points": [
            {
                "global_batch": point.plan.global_batch,
                "samples_per_s": point.samples_per_s,
                "memory_bytes": point.memory_bytes,
                "limit_bytes": point.limit_bytes,
                "shape": point.shape,
                "plan": to_data(point.plan),
            }
            for point in found.points
        ],
        "without_plan": [{"global_batch": batch, "error": reason} for batch, reason in found.refused],
    }


def draw(found: Front, folder: Path) -> tuple[Path, ...]:
    """Write ``FILES`` into a folder, which is made, and return their paths.

    Raises ConfigError where the folder cannot be written or matplotlib is missing.
    """
    prepare_folder(folder)
    return write_files(folder, dict.fromkeys(FILES, front_figure(found)))


def front_figure(found: Front) -> Figure:
    """Return the points as marks, a colour and a form per global batch, with the front as steps between them."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and an optional dependency

    figure = Figure(figsize=(7.0, 4.2), dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    memory = [point.memory_bytes / 2**20 for point in found.points]
    speed = [point.samples_per_s for point in found.points]
    axes.step(memory, speed, where="post", color=LINE, linewidth=1.0, zorder=1)
    for number, batch in enumerate(sorted({point.plan.global_batch for point in found.points})):
        own = [i for i, point in enumerate(found.points) if point.plan.global_batch == batch]
        axes.scatter(
            [memory[i] for i in own],
            [speed[i] for i in own],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            label=f"global batch {batch}",
            zorder=2,
        )
    axes.set_xlabel("MiB of the fullest rank, with workspace", color=INK, family=[FONT, "sans-serif"])
    axes.set_ylabel("samples/s", color=INK, family=[FONT, "sans-serif"])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, linewidth=0.5)
    axes.legend(loc="lower right", frameon=False)
    return figure
