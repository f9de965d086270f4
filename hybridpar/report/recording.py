"""What the monitor recorded of a run: read sample by sample into thinned curves, counts and sums."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from hybridpar.monitor.record import GpuSample, HostSample, Record, read
from hybridpar.monitor.summary import Summary, Tally
from hybridpar.report.thinning import Point, Thinned

BINS = 20
"""Of the distribution of occupancy."""
CURVE_POINTS = 800

K = TypeVar("K")
GpuKey = tuple[str, int | None, str | None]
"""Host, index and UUID."""


@dataclass(frozen=True)
class GpuRecord:
    """A GPU over the run; curves over the seconds since the recording's first sample."""

    host: str
    gpu: int | None
    uuid: str | None
    utilisation: tuple[Point, ...]
    occupancy: tuple[Point, ...]
    """Idle time included."""
    while_busy: tuple[int, ...]
    """Windows by their occupancy while busy, in ``BINS`` equal parts of 0..1; those of an idle GPU are in none."""

    @property
    def below_half(self) -> float | None:
        """Share of the windows with a known occupancy while busy in which it is below 50 %."""
        known = sum(self.while_busy)
        return sum(self.while_busy[: BINS // 2]) / known if known else None


@dataclass(frozen=True)
class Moved:
    """What an interface counted between the samples that lie in the training's steps."""

    sent_bytes: int
    received_bytes: int
    steps: float
    """That were done meanwhile; evaluations and checkpoints between them count with their bytes, not as steps."""


@dataclass(frozen=True)
class HostRecord:
    """A node over the run; curves likewise."""

    host: str
    cpus: int | None
    cores: tuple[Point, ...]
    """CPUs busy."""
    sent: Mapping[str, tuple[Point, ...]]
    """Bytes per second by interface."""
    received: Mapping[str, tuple[Point, ...]]
    ranks: Mapping[int, tuple[Point, ...]]
    """CPUs that a rank's own process kept busy, by rank."""
    moved: Mapping[str, Moved]
    """By interface."""


@dataclass(frozen=True)
class Recording:
    """All of a run's recording."""

    summary: Summary
    gpus: tuple[GpuRecord, ...]
    """By host and index."""
    hosts: tuple[HostRecord, ...]
    """By name."""

    @staticmethod
    def load(folder: Path, ends: Sequence[Point]) -> Recording | None:
        """Read the ``monitor*.jsonl`` of a run's folder; None where they hold no sample.

        ``ends`` tells how many steps were done by when (:attr:`hybridpar.report.history.Steps.ends`). Raises
        HybridparError for a malformed line.
        """
        paths = sorted(folder.glob("monitor*.jsonl"))
        return Recording.of(chain.from_iterable(map(read, paths)), ends)

    @staticmethod
    def of(records: Iterable[Record], ends: Sequence[Point]) -> Recording | None:
        """Read records one by one, those of each node in their order; as ``load``."""
        reading = _Reading(ends)
        for record in records:
            reading.add(record)
        return reading.recording()


class _Reading:
    """Takes records one by one."""

    def __init__(self, ends: Sequence[Point]) -> None:
        self._tally, self._clock = Tally(), _Clock(ends)
        self._gpus: dict[GpuKey, _Gpu] = {}
        self._hosts: dict[str, _Host] = {}

    def add(self, record: Record) -> None:
        self._tally.add(record)
        if isinstance(record, GpuSample):
            self._gpus.setdefault((record.host, record.gpu, record.uuid), _Gpu()).add(record)
        elif isinstance(record, HostSample):
            self._hosts.setdefault(record.host, _Host(self._clock)).add(record)

    def recording(self) -> Recording | None:
        summary = self._tally.summary()
        if summary is None:
            return None
        begin_s = summary.start_s
        keys = [(g.host, g.gpu, g.uuid) for g in summary.gpus]
        return Recording(
            summary,
            tuple(self._gpus[key].record(key, begin_s) for key in keys),
            tuple(self._hosts[h.host].record(h.host, begin_s) for h in summary.hosts),
        )


class _Gpu:
    """A GPU's curves in the making."""

    def __init__(self) -> None:
        self._utilisation, self._occupancy = Thinned(CURVE_POINTS), Thinned(CURVE_POINTS)
        self._while_busy = [0] * BINS

    def add(self, sample: GpuSample) -> None:
        self._utilisation.add(sample.time_s, sample.utilisation)
        self._occupancy.add(sample.time_s, sample.occupancy)
        if sample.occupancy_while_busy is not None:
            self._while_busy[min(int(sample.occupancy_while_busy * BINS), BINS - 1)] += 1

    def record(self, key: GpuKey, begin_s: float) -> GpuRecord:
        curves = _since(self._utilisation, begin_s), _since(self._occupancy, begin_s)
        return GpuRecord(*key, *curves, tuple(self._while_busy))


class _Host:
    """A node's curves and sums in the making."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._cpus: int | None = None
        self._cores = Thinned(CURVE_POINTS)
        self._sent: dict[str, Thinned] = {}
        self._received: dict[str, Thinned] = {}
        self._ranks: dict[int, Thinned] = {}
        self._moved: dict[str, Moved] = {}
        self._last: HostSample | None = None

    def add(self, sample: HostSample) -> None:
        self._cpus = sample.cpus if sample.cpus is not None else self._cpus
        self._cores.add(sample.time_s, sample.cpu_cores)
        for name, traffic in sample.network.items():
            _curve(self._sent, name).add(sample.time_s, traffic.sent_bytes_per_s)
            _curve(self._received, name).add(sample.time_s, traffic.received_bytes_per_s)
        for rank in sample.ranks:
            _curve(self._ranks, rank.rank).add(sample.time_s, rank.cpu_cores)
        if self._last is not None:
            self._count(self._last, sample)
        self._last = sample

    def _count(self, before: HostSample, after: HostSample) -> None:
        """Add what went through between two samples that lie in the steps, unless the sampler began anew."""
        steps = self._clock.steps_between(before.time_s, after.time_s)
        if steps is None or (before.sampler_cpu_s or 0.0) > (after.sampler_cpu_s or 0.0):
            return
        for name, traffic in after.network.items():
            former, known = before.network.get(name), self._moved.get(name, Moved(0, 0, 0.0))
            self._moved[name] = Moved(
                known.sent_bytes + traffic.sent_bytes - (former.sent_bytes if former else 0),
                known.received_bytes + traffic.received_bytes - (former.received_bytes if former else 0),
                known.steps + steps,
            )

    def record(self, host: str, begin_s: float) -> HostRecord:
        return HostRecord(
            host,
            self._cpus,
            _since(self._cores, begin_s),
            {name: _since(curve, begin_s) for name, curve in sorted(self._sent.items())},
            {name: _since(curve, begin_s) for name, curve in sorted(self._received.items())},
            {rank: _since(curve, begin_s) for rank, curve in sorted(self._ranks.items())},
            dict(sorted(self._moved.items())),
        )


class _Clock:
    """How many steps were done by when."""

    def __init__(self, ends: Sequence[Point]) -> None:
        self._times, self._steps = [t for t, _ in ends], [s for _, s in ends]

    def steps_between(self, start_s: float, end_s: float) -> float | None:
        """Return the steps between two times, parts of steps included; None outside of the training's."""
        if len(self._times) < 2 or start_s < self._times[0] or end_s > self._times[-1]:
            return None
        return self._steps_at(end_s) - self._steps_at(start_s)

    def _steps_at(self, time_s: float) -> float:
        after = max(bisect_left(self._times, time_s), 1)
        (t0, t1), (s0, s1) = self._times[after - 1 : after + 1], self._steps[after - 1 : after + 1]
        return s0 + (s1 - s0) * (time_s - t0) / (t1 - t0) if t1 > t0 else s1


def _curve(curves: dict[K, Thinned], key: K) -> Thinned:
    return curves.setdefault(key, Thinned(CURVE_POINTS))


def _since(curve: Thinned, begin_s: float) -> tuple[Point, ...]:
    return tuple((x - begin_s, y) for x, y in curve.points if not math.isnan(x))
