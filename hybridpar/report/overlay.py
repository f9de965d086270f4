"""The simulated and the measured timeline of a run in one picture, and in one trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridpar.planning.timeline import Span, Timeline
from hybridpar.report.chart import timelines_figure
from hybridpar.report.comparison import Comparison
from hybridpar.report.counters import counters
from hybridpar.report.course import Course
from hybridpar.report.figure import prepare_folder, write_files
from hybridpar.report.map import placement_figure
from hybridpar.report.placement import placement_board
from hybridpar.report.run import Run
from hybridpar.report.timeline import timeline_scene, title
from hybridpar.report.trace import as_json, traces
from hybridpar.report.wording import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("timelines.svg", "timelines.png", "placement.svg", "placement.png", "timelines.trace.json")


def timelines(comparison: Comparison) -> Figure:
    """Draw both timelines of the first plan replica, one above the other on one scale."""
    cluster, scenes = comparison.basis.cluster, []
    pairs = (("predicted", comparison.predicted[0]), ("measured", comparison.measured[0]))
    for name, course in pairs:
        scenes.append(
            (
                f"{name}: step of {duration(course.length_s)}",
                timeline_scene(course.program, course.timeline, cluster),
            )
        )
    return timelines_figure(title(comparison.predicted[0].program, cluster), scenes)


def placement(comparison: Comparison) -> Figure:
    """Draw which rank of which node holds what."""
    return placement_figure(placement_board(comparison.predicted[0].program, comparison.basis.cluster))


def both_traces(run: Run, comparison: Comparison) -> dict[str, Any]:
    """Return both timelines as a trace, waits included, with what the monitor sampled meanwhile."""
    courses = {"predicted": comparison.predicted[0], "measured": comparison.measured[0]}
    whole = {name: _with_waits(course) for name, course in courses.items()}
    counted = {"measured": counters(run, comparison.measured[0])}
    return traces(comparison.predicted[0].program, whole, comparison.basis.cluster, counted)


def _with_waits(course: Course) -> Timeline:
    waits = [Span(rank, t.start_s, t.end_s, t.action) for rank, t in course.of("wait") if t.seconds > 0]
    own = course.timeline
    return Timeline(own.ends_s, sorted([*own.spans, *waits], key=lambda s: (s.rank, s.start_s)), own.flights)


def draw(run: Run, comparison: Comparison, folder: Path) -> tuple[Path, ...]:
    """Write ``FILES`` into a folder, which is made, and return their paths.

    Raises ConfigError where the folder cannot be written or matplotlib is missing.
    """
    prepare_folder(folder)
    chart, board = timelines(comparison), placement(comparison)
    trace = as_json(both_traces(run, comparison))
    return write_files(folder, dict(zip(FILES, (chart, chart, board, board, trace), strict=True)))
