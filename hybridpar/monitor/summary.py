"""What the files of a recording amount to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hybridpar.monitor.record import Event, Gap, GpuSample, HostSample, Record, read


@dataclass(frozen=True)
class Aggregate:
    """Means and peaks over samples, each over those in which the value is known; None where it never is."""

    samples: int
    mean_utilisation: float | None
    mean_occupancy: float | None
    mean_occupancy_while_busy: float | None
    """Weighted by graphics activity: the occupancy averaged over busy time only."""
    mean_sm_activity: float | None
    mean_tensor_activity: float | None
    mean_dram_activity: float | None
    peak_memory_bytes: int | None
    """Greatest at any tick; a peak between two ticks goes unseen."""
    mean_sm_clock_hz: float | None
    mean_power_w: float | None
    throttled: dict[str, float]
    """Share of the samples in which the reasons are known that name each reason."""


@dataclass(frozen=True)
class GpuSummary:
    """What one GPU did over a recording."""

    host: str
    gpu: int | None
    uuid: str | None
    memory_total_bytes: int | None
    sources: dict[str, str]
    """As in GpuSample; several sources of one field are joined as "gpm+nvml"."""
    total: Aggregate


@dataclass(frozen=True)
class HostSummary:
    """What one node did over a recording."""

    host: str
    cpus: int | None
    mean_cpu_cores: float | None
    peak_memory_bytes: int | None
    memory_total_bytes: int | None
    sent_bytes: dict[str, int]
    """By network interface, since the sampler started, by the last sample."""
    received_bytes: dict[str, int]
    rank_cpu_cores: dict[int, float]
    """Mean by rank, of its own process."""
    workers_cpu_cores: dict[int, float]
    """Mean by rank, of the processes that it started."""
    sampler_cpu_s: float | None
    """CPU seconds of the sampler by the last sample."""


@dataclass(frozen=True)
class Summary:
    """What all GPUs and nodes of a recording did."""

    start_s: float
    """Time of the first sample, seconds since the epoch."""
    end_s: float
    total: Aggregate | None
    """Over all samples of all GPUs; its peak is that of the fullest GPU. None: there are no samples of a GPU."""
    gpus: tuple[GpuSummary, ...]
    """Ordered by host and index."""
    hosts: tuple[HostSummary, ...]
    """Ordered by name."""
    events: tuple[Event, ...]
    gaps: tuple[str, ...]
    """Reasons for missing data, each once, in order of appearance."""


def summarise(*paths: Path, since_s: float = -math.inf, until_s: float = math.inf) -> Summary | None:
    """Aggregate the samples of one recording, of which each node may have written its own file.

    Args:
        paths: files; one that does not exist counts as empty.
        since_s: samples before this time (seconds since the epoch) are left out, such as those of the warm-up.
        until_s: samples after this time are left out.

    Returns:
        None where no sample is left.

    Raises:
        HybridparError: as ``read`` does.

    """
    tally = Tally(since_s, until_s)
    for path in paths:
        for record in read(path) if path.exists() else ():
            tally.add(record)
    return tally.summary()


class Tally:
    """Takes the records of a recording one by one; what it amounts to is known at any time."""

    def __init__(self, since_s: float = -math.inf, until_s: float = math.inf) -> None:
        self._since_s, self._until_s = since_s, until_s
        self._everything = _GpuTally()
        self._gpus: dict[tuple[str, int | None, str | None], _GpuTally] = {}
        self._hosts: dict[str, _HostTally] = {}
        self._events: list[Event] = []
        self._gaps: dict[str, None] = {}
        self._start_s, self._end_s = math.inf, -math.inf

    def add(self, record: Record) -> None:
        """Take a record; samples and events outside of the time are left out."""
        if isinstance(record, Gap):
            self._gaps[record.reason] = None
        elif not self._since_s <= record.time_s <= self._until_s:
            return
        elif isinstance(record, Event):
            self._events.append(record)
        else:
            self._start_s, self._end_s = min(self._start_s, record.time_s), max(self._end_s, record.time_s)
            if isinstance(record, HostSample):
                self._hosts.setdefault(record.host, _HostTally()).add(record)
            else:
                self._everything.add(record)
                self._gpus.setdefault((record.host, record.gpu, record.uuid), _GpuTally()).add(record)

    def summary(self) -> Summary | None:
        """Return what the samples amount to; None where there is none."""
        if not self._gpus and not self._hosts:
            return None
        ordered = sorted(self._gpus, key=lambda k: (k[0], math.inf if k[1] is None else k[1], k[2] or ""))
        return Summary(
            start_s=self._start_s,
            end_s=self._end_s,
            total=self._everything.aggregate() if self._gpus else None,
            gpus=tuple(_gpu(key, self._gpus[key]) for key in ordered),
            hosts=tuple(self._hosts[name].aggregate(name) for name in sorted(self._hosts)),
            events=tuple(self._events),
            gaps=tuple(self._gaps),
        )


def _gpu(key: tuple[str, int | None, str | None], tally: _GpuTally) -> GpuSummary:
    return GpuSummary(*key, tally.memory_total_bytes, tally.joined_sources(), tally.aggregate())


class _Means:
    """Weighted means of values that may be unknown."""

    def __init__(self) -> None:
        self._sums: dict[str | int, tuple[float, float]] = {}

    def add(self, name: str | int, value: float | None, weight: float | None = 1.0) -> None:
        if value is not None and weight is not None:
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, weights + weight)

    def mean(self, name: str | int) -> float | None:
        total, weights = self._sums.get(name, (0.0, 0.0))
        return total / weights if weights else None

    def all(self) -> dict[str | int, float]:
        return {name: total / weights for name, (total, weights) in sorted(self._sums.items()) if weights}


class _GpuTally:
    """Running sums over samples of GPUs."""

    def __init__(self) -> None:
        self.samples = 0
        self.memory_total_bytes: int | None = None
        self._peak_memory_bytes: int | None = None
        self._sources: dict[str, set[str]] = {}
        self._means = _Means()
        self._reasons: dict[str, int] = {}
        self._with_reasons = 0

    def add(self, sample: GpuSample) -> None:
        self.samples += 1
        if sample.memory_total_bytes is not None:
            self.memory_total_bytes = sample.memory_total_bytes
        if sample.memory_used_bytes is not None:
            self._peak_memory_bytes = max(self._peak_memory_bytes or 0, sample.memory_used_bytes)
        for name, source in sample.sources.items():
            self._sources.setdefault(name, set()).add(source)
        for name in ("utilisation", "occupancy", "sm_activity", "tensor_activity", "dram_activity"):
            self._means.add(name, getattr(sample, name))
        self._means.add("sm_clock_hz", sample.sm_clock_hz)
        self._means.add("power_w", sample.power_w)
        self._means.add("occupancy_while_busy", sample.occupancy_while_busy, sample.graphics_activity)
        if sample.throttle is not None:
            self._with_reasons += 1
            for reason in sample.throttle:
                self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def aggregate(self) -> Aggregate:
        mean = self._means.mean
        return Aggregate(
            samples=self.samples,
            mean_utilisation=mean("utilisation"),
            mean_occupancy=mean("occupancy"),
            mean_occupancy_while_busy=mean("occupancy_while_busy"),
            mean_sm_activity=mean("sm_activity"),
            mean_tensor_activity=mean("tensor_activity"),
            mean_dram_activity=mean("dram_activity"),
            peak_memory_bytes=self._peak_memory_bytes,
            mean_sm_clock_hz=mean("sm_clock_hz"),
            mean_power_w=mean("power_w"),
            throttled={name: count / self._with_reasons for name, count in sorted(self._reasons.items())},
        )

    def joined_sources(self) -> dict[str, str]:
        return {name: "+".join(sorted(found)) for name, found in sorted(self._sources.items())}


class _HostTally:
    """Running sums over samples of a node."""

    def __init__(self) -> None:
        self._peak_memory_bytes: int | None = None
        self._cores, self._own, self._workers = _Means(), _Means(), _Means()
        self._last: HostSample | None = None

    def add(self, sample: HostSample) -> None:
        self._last = sample
        self._cores.add("all", sample.cpu_cores, sample.window_s)
        if sample.memory_used_bytes is not None:
            self._peak_memory_bytes = max(self._peak_memory_bytes or 0, sample.memory_used_bytes)
        for rank in sample.ranks:
            self._own.add(rank.rank, rank.cpu_cores, sample.window_s)
            self._workers.add(rank.rank, rank.workers_cpu_cores, sample.window_s)

    def aggregate(self, host: str) -> HostSummary:
        last = self._last
        assert last is not None
        return HostSummary(
            host=host,
            cpus=last.cpus,
            mean_cpu_cores=self._cores.mean("all"),
            peak_memory_bytes=self._peak_memory_bytes,
            memory_total_bytes=last.memory_total_bytes,
            sent_bytes={name: traffic.sent_bytes for name, traffic in last.network.items()},
            received_bytes={name: traffic.received_bytes for name, traffic in last.network.items()},
            rank_cpu_cores={int(rank): cores for rank, cores in self._own.all().items()},
            workers_cpu_cores={int(rank): cores for rank, cores in self._workers.all().items()},
            sampler_cpu_s=last.sampler_cpu_s,
        )
