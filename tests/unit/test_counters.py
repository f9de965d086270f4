"""The monitor's samples as counters beside a recorded step, and traced steps in the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.monitor.record import Gap, GpuSample, HostSample, RankSample, Record, Traffic, to_line
from hybridpar.report.account import Account
from hybridpar.report.comparison import Comparison, compare
from hybridpar.report.counters import STALE_S, counters
from hybridpar.report.devices import kernel_figure
from hybridpar.report.kernels import Kernel, KernelUse, RankKernels, swept
from hybridpar.report.overlay import both_traces
from hybridpar.report.page import page
from hybridpar.report.run import Run
from hybridpar.report.trace import PROCESSES
from tests.support.reports import run_of

EPOCH_S, AHEAD_S = 1_000_000.0, 50.0
"""What gives the time of day of host a; by how much the clock of host b, and its time of day, are ahead."""


def made(folder: Path) -> tuple[Run, Comparison]:
    """Ranks 0 and 1 on host a, 2 and 3 on host b, whose clocks agree with nothing; rank 1 has a GPU."""
    run = run_of(str(folder))
    timings = []
    for record in run.timings:
        behind = 0.0 if record.rank < 2 else AHEAD_S
        steps = tuple(replace(s, start_s=s.start_s + behind) for s in record.steps)
        host, gpu = ("a", f"GPU-{record.rank}" if record.rank == 1 else None) if not behind else ("b", None)
        timings.append(
            replace(record, steps=steps, offset_s=-behind, host=host, gpu=gpu, epoch_s=EPOCH_S + 3 * behind)
        )
    run = replace(run, timings=tuple(timings))
    comparison = compare(run)
    assert comparison is not None
    return run, comparison


def write(folder: Path, *records: Record) -> None:
    (folder / "monitor.jsonl").write_text("".join(map(to_line, records)))


def test_samples_are_on_the_clock_of_the_step(tmp_path: Path) -> None:
    run, comparison = made(tmp_path)
    (course,) = comparison.measured
    begin_s, half_s = course.end_s - course.length_s, course.length_s / 2
    day_a = EPOCH_S + course.zero_s
    day_b = day_a + 3 * AHEAD_S + AHEAD_S

    def gpu(end_s: float, occupancy: float) -> GpuSample:
        return GpuSample(day_a + end_s, "a", 0, "GPU-1", occupancy=occupancy, window_s=half_s, sources={})

    write(
        tmp_path,
        gpu(begin_s - 2 * STALE_S, 0.9),
        gpu(begin_s, 0.8),
        gpu(begin_s + half_s / 2, 0.1),
        gpu(begin_s + half_s * 1.5, 0.2),
        gpu(begin_s + half_s * 9, 0.7),
        HostSample(day_b + half_s, "b", cpu_cores=1.5, ranks=(RankSample(2, 7, 0.5),)),
        HostSample(day_a + half_s, "elsewhere", cpu_cores=9.0),
        Gap(day_a, "a", "none"),
    )
    occupancy, cores, rank = counters(run, course)
    assert (occupancy.rank, occupancy.name) == (0, "rank 1 GPU occupancy (%)")
    assert [at_s for at_s, _ in occupancy.points] == pytest.approx([begin_s, begin_s + half_s / 2], abs=1e-7)
    assert [value for _, value in occupancy.points] == pytest.approx([10.0, 20.0])
    assert (cores.rank, cores.name, rank.name) == (2, "CPUs busy", "rank 2 CPUs busy")
    assert cores.points == ((pytest.approx(half_s, abs=1e-7), 1.5),)


def test_counters_are_tracks_of_the_nodes_in_the_measured_timeline(tmp_path: Path) -> None:
    run, comparison = made(tmp_path)
    moved = {"eth0": Traffic(1, 2, 3e6, 4e6)}
    day_b = EPOCH_S + comparison.measured[0].zero_s + 4 * AHEAD_S
    write(tmp_path, HostSample(day_b, "b", memory_used_bytes=2**31, network=moved))
    found = [e for e in both_traces(run, comparison)["traceEvents"] if e["ph"] == "C"]
    assert {e["pid"] for e in found} == {PROCESSES + 1}, "host b is node 1"
    assert {e["name"]: e["args"]["value"] for e in found} == pytest.approx(
        {"memory used (GiB)": 2.0, "eth0 sent (MB/s)": 3.0, "eth0 received (MB/s)": 4.0}
    )
    assert all(e["ts"] >= 0 for e in found)


def test_a_timeline_without_hosts_has_no_counters() -> None:
    run = run_of()
    comparison = compare(run)
    assert comparison is not None
    assert counters(run, comparison.measured[0]) == ()


# Traced steps


def traced() -> Iterator[RankKernels]:
    for rank, occupancy in enumerate((0.2, 0.6)):
        kernels = [Kernel(0.0, 4.0, "front", occupancy), Kernel(6.0, 8.0, "front", None, communication=True)]
        device, stages = swept(kernels, 0.0, 10.0)
        yield RankKernels(rank, "plan", "kineto", (21, 22), device, stages)


def test_traced_steps_are_told_by_stage() -> None:
    run = replace(run_of(), traces=tuple(traced()))
    (table,) = [f for f in Account.of(run).findings if f.title == "kernels of the traced steps"]
    assert table.rows == (
        ("front", "2", "40%", "40%", "16%", "50%", "20%", "20%"),
        ("all of the devices", "2", "40%", "40%", "16%", "50%", "20%", "20%"),
    )
    assert table.notes[0].startswith("steps 21-22 of 2 ranks (0-1), as shares of the window")
    assert table.notes[0].endswith("Kineto's estimates from how kernels were launched")


def test_the_page_draws_the_occupancy_of_traced_kernels_by_stage() -> None:
    run = replace(run_of(), traces=tuple(traced()))
    figure = kernel_figure(run.traces, Account.of(run).turns)
    assert figure is not None
    (legend,) = [axes.get_legend() for axes in figure.axes]
    assert [text.get_text() for text in legend.get_texts()] == ["front: 50% below 50 %"]
    heights = [patch.get_data().values for patch in figure.axes[0].patches]
    assert list(heights[0]) == pytest.approx([0, 0, 50, 0, 0, 0, 50, 0, 0, 0])
    assert "occupancy kernel by kernel" in page([Account.of(run)])
    assert kernel_figure((), {}) is None


def test_without_occupancies_the_table_says_unknown_and_without_traces_there_is_none() -> None:
    use = KernelUse(10.0, 3, 4.0)
    run = replace(run_of(), traces=(RankKernels(0, "plan", "cpu", (3,), use, {"tail": use}),))
    (table,) = [f for f in Account.of(run).findings if f.title == "kernels of the traced steps"]
    assert table.rows[0] == ("tail", "3", "40%", "unknown", "unknown", "unknown", "0%", "0%")
    assert not [f for f in Account.of(run_of()).findings if f.title == "kernels of the traced steps"]
