"""The monitor's samples on the clock of a recorded step: what nodes and GPUs did while its actions ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hybridpar.monitor.record import GpuSample, HostSample, read
from hybridpar.report.course import Course
from hybridpar.report.run import Run
from hybridpar.report.text import spans

STALE_S = 5.0
"""A sample that ended so long before a step tells nothing of it."""
_GPU = {
    "utilisation": ("utilisation (%)", 100.0),
    "occupancy": ("occupancy (%)", 100.0),
    "tensor_activity": ("tensor activity (%)", 100.0),
    "dram_activity": ("memory activity (%)", 100.0),
    "memory_used_bytes": ("memory used (GiB)", 2.0**-30),
    "power_w": ("power (W)", 1.0),
    "sm_clock_hz": ("clock (MHz)", 1e-6),
    "pcie_sent_bytes_per_s": ("PCIe sent (MB/s)", 1e-6),
    "pcie_received_bytes_per_s": ("PCIe received (MB/s)", 1e-6),
    "nvlink_sent_bytes_per_s": ("NVLink sent (MB/s)", 1e-6),
    "nvlink_received_bytes_per_s": ("NVLink received (MB/s)", 1e-6),
}
"""By field: how a track calls it, and how many of its units one of the field's is."""


class Counter(NamedTuple):
    """A figure over a step."""

    rank: int
    """One on the node that it is of, numbered in the plan replica."""
    name: str
    """With the unit."""
    points: tuple[tuple[float, float], ...]
    """Seconds of the course, and the value from then on."""


class _Place(NamedTuple):
    """How a host's time of day becomes the course's, and where its figures are shown."""

    rank: int
    zero_s: float
    """The course's 0 by the host's time of day."""


def counters(run: Run, course: Course) -> tuple[Counter, ...]:
    """Return what was sampled on the nodes of a measured course's ranks, in order of appearance.

    A sample's figures hold from the begin of its window on. Raises HybridparError for a malformed file.
    """
    places = _places(run, course)
    begin_s, end_s = course.end_s - course.length_s, course.end_s
    found: dict[tuple[int, str], dict[float, float]] = {}
    for host, start_s, until_s, figures in _samples(run, places):
        place = places[host]
        at_s = start_s - place.zero_s
        if at_s > end_s or until_s - place.zero_s < begin_s - STALE_S:
            continue
        for name, value in figures:
            points = found.setdefault((place.rank, name), {})
            if at_s <= begin_s:
                points.clear()
            points[max(at_s, begin_s)] = value
    return tuple(Counter(rank, name, tuple(sorted(p.items()))) for (rank, name), p in found.items())


def _places(run: Run, course: Course) -> dict[str, _Place]:
    first = course.program.replica * len(course.ranks)
    places: dict[str, _Place] = {}
    for record in run.timings[first : first + len(course.ranks)]:
        if record.host is not None and record.epoch_s is not None:
            zero_s = course.zero_s - record.offset_s + record.epoch_s
            places.setdefault(record.host, _Place(record.rank - first, zero_s))
    return places


def _samples(
    run: Run, places: Mapping[str, _Place]
) -> Iterator[tuple[str, float, float, Iterable[tuple[str, float]]]]:
    """Yield host, begin and end of the window, and the known figures of every sample of some hosts."""
    names = _gpu_names(run)
    for path in sorted(run.folder.glob("monitor*.jsonl")) if places else ():
        for record in read(path):
            if isinstance(record, GpuSample | HostSample) and record.host in places:
                figures = _of_gpu(record, names) if isinstance(record, GpuSample) else _of_host(record)
                yield record.host, record.time_s - (record.window_s or 0.0), record.time_s, figures


def _gpu_names(run: Run) -> dict[tuple[str, str], str]:
    """Return what the GPUs of ranks are called: after these."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for record in run.timings:
        if record.host is not None and record.gpu is not None:
            ranks.setdefault((record.host, record.gpu), []).append(record.rank)
    return {gpu: f"rank {spans(tuple(own))} GPU" for gpu, own in ranks.items()}


def _of_gpu(sample: GpuSample, names: Mapping[tuple[str, str], str]) -> Iterator[tuple[str, float]]:
    who = names.get((sample.host, sample.uuid or ""), f"GPU {sample.gpu}")
    for name, (said, units) in _GPU.items():
        value = getattr(sample, name)
        if value is not None:
            yield f"{who} {said}", value * units


def _of_host(sample: HostSample) -> Iterator[tuple[str, float]]:
    if sample.cpu_cores is not None:
        yield "CPUs busy", sample.cpu_cores
    if sample.memory_used_bytes is not None:
        yield "memory used (GiB)", sample.memory_used_bytes * 2.0**-30
    for rank in sample.ranks:
        if rank.cpu_cores is not None:
            yield f"rank {rank.rank} CPUs busy", rank.cpu_cores
    for interface, traffic in sample.network.items():
        for way in ("sent", "received"):
            value = getattr(traffic, f"{way}_bytes_per_s")
            if value is not None:
                yield f"{interface} {way} (MB/s)", value * 1e-6
