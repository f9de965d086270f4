"""The pictures of a plan: its step's timeline, the placement of its stages, and a trace."""

from __future__ import annotations

from pathlib import Path

from hybridpar.cluster.topology import Cluster
from hybridpar.model.chain import Chain
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.plan import Plan
from hybridpar.planning.simulate import simulate
from hybridpar.profiling.record import Profile
from hybridpar.report.chart import timeline_figure
from hybridpar.report.figure import prepare_folder, write_files
from hybridpar.report.map import placement_figure
from hybridpar.report.placement import placement_board
from hybridpar.report.timeline import timeline_scene
from hybridpar.report.trace import trace_json

FILES = ("timeline.svg", "timeline.png", "placement.svg", "placement.png", "timeline.trace.json")


def draw(plan: Plan, chain: Chain, profile: Profile, cluster: Cluster, folder: Path) -> tuple[Path, ...]:
    """Simulate the plan's step on a cluster, write ``FILES`` into a folder, which is made, and return their paths.

    Raises ConfigError where the folder cannot be written or matplotlib is missing.
    """
    prepare_folder(folder)
    program = compile_program(plan, chain, plan.global_batch, "train")
    timeline = simulate(program, Costs(profile, cluster))
    chart = timeline_figure(timeline_scene(program, timeline, cluster))
    board = placement_figure(placement_board(program, cluster))
    trace = trace_json(program, timeline, cluster)
    return write_files(folder, dict(zip(FILES, (chart, chart, board, board, trace), strict=True)))
