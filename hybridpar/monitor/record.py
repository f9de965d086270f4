"""The monitor's record: one JSON line per GPU and tick, and what a file of them amounts to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridpar.errors import HybridparError
from hybridpar.schema import from_data, to_data

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """What one GPU did since the tick before. Every fraction lies in 0..1; None is unknown, never idle."""

    time_s: float
    """Seconds since the epoch, at the end of the window."""
    host: str
    gpu: int | None
    """NVML's index on the host, of the parent GPU for a MIG slice."""
    uuid: str | None
    utilisation: float | None = None
    """Part of the time in which any kernel ran (what nvidia-smi shows)."""
    graphics_activity: float | None = None
    """Part of the window in which the compute and graphics engine was active."""
    sm_activity: float | None = None
    """Busy multiprocessors, averaged over the window, idle time included."""
    occupancy: float | None = None
    """Active warps over the most that fit, averaged over the window, idle time included."""
    tensor_activity: float | None = None
    dram_activity: float | None = None
    """Memory traffic over the most that the memory can do."""
    memory_used_bytes: int | None = None
    """By all processes on the GPU, their CUDA contexts included, the driver's own reserve left out."""
    memory_total_bytes: int | None = None
    sources: dict[str, str] = field(default_factory=dict)
    """Where each known field comes from: "nvml" or "gpm" (NVML's performance monitoring, Hopper and later)."""
    occupancy_while_busy: float | None = None
    """``occupancy / graphics_activity``; None where either is unknown and on an idle GPU."""
    window_s: float | None = None
    """What activities and occupancy are averaged over, up to ``time_s``; None where all of them are unknown."""


@dataclass(frozen=True)
class Gap:
    """Why data is missing, from this time on."""

    time_s: float
    """Seconds since the epoch."""
    host: str
    reason: str
    """One sentence."""


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


@dataclass(frozen=True)
class GpuSummary:
    """What one GPU did over a recording."""

    host: str
    gpu: int | None
    uuid: str | None
    memory_total_bytes: int | None
    sources: dict[str, str]
    """As in Sample; several sources of one field are joined as "gpm+nvml"."""
    total: Aggregate


@dataclass(frozen=True)
class Summary:
    """What all GPUs of a recording did."""

    start_s: float
    """Time of the first sample, seconds since the epoch."""
    end_s: float
    total: Aggregate
    """Over all samples of all GPUs; its peak is that of the fullest GPU."""
    gpus: tuple[GpuSummary, ...]
    """Ordered by host and index."""
    gaps: tuple[str, ...]
    """Reasons for missing data, each once, in order of appearance."""


def to_line(record: Sample | Gap) -> str:
    """Return the record as one line of JSON, newline included."""
    kind = "sample" if isinstance(record, Sample) else "gap"
    return json.dumps({"kind": kind, "schema": SCHEMA_VERSION, **to_data(record)}, allow_nan=False) + "\n"


def read(path: Path) -> Iterator[Sample | Gap]:
    """Yield the records of a file in order; a last line that a killed writer left unfinished is passed over.

    Raises HybridparError on a file that cannot be read and on any other malformed line, with its number.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _from_line(line, f"{path}:{number}")
    except OSError as e:
        raise HybridparError(f"cannot read {path}: {e.strerror}; give the path of a monitor.jsonl") from e


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
    everything, gpus, gaps = _Tally(), dict[tuple[str, int | None, str | None], _Tally](), dict[str, None]()
    for path in paths:
        for record in read(path) if path.exists() else ():
            if isinstance(record, Gap):
                gaps[record.reason] = None
            elif since_s <= record.time_s <= until_s:
                everything.add(record)
                gpus.setdefault((record.host, record.gpu, record.uuid), _Tally()).add(record)
    if not everything.samples:
        return None
    ordered = sorted(gpus, key=lambda k: (k[0], math.inf if k[1] is None else k[1], k[2] or ""))
    return Summary(
        start_s=everything.start_s,
        end_s=everything.end_s,
        total=everything.aggregate(),
        gpus=tuple(
            GpuSummary(*key, gpus[key].memory_total_bytes, gpus[key].joined_sources(), gpus[key].aggregate())
            for key in ordered
        ),
        gaps=tuple(gaps),
    )


def _from_line(line: bytes, where: str) -> Sample | Gap:
    try:
        data: Any = json.loads(line)
    except ValueError as e:
        raise HybridparError(f"{where} is not JSON: {e}") from e
    if not isinstance(data, dict) or data.get("kind") not in {"sample", "gap"}:
        raise HybridparError(f"{where}: kind: neither 'sample' nor 'gap'; is this a monitor.jsonl?")
    kind, schema = data.pop("kind"), data.pop("schema", None)
    if schema != SCHEMA_VERSION:
        raise HybridparError(f"{where}: schema {schema} is not {SCHEMA_VERSION}; record again with this version")
    if kind == "gap":
        return from_data(Gap, data, where, HybridparError)
    return from_data(Sample, data, where, HybridparError)


class _Tally:
    """Running sums over samples."""

    def __init__(self) -> None:
        self.samples = 0
        self.start_s = math.inf
        self.end_s = -math.inf
        self.memory_total_bytes: int | None = None
        self._peak_memory_bytes: int | None = None
        self._sources: dict[str, set[str]] = {}
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.start_s = min(self.start_s, sample.time_s)
        self.end_s = max(self.end_s, sample.time_s)
        if sample.memory_total_bytes is not None:
            self.memory_total_bytes = sample.memory_total_bytes
        if sample.memory_used_bytes is not None:
            self._peak_memory_bytes = max(self._peak_memory_bytes or 0, sample.memory_used_bytes)
        for name, source in sample.sources.items():
            self._sources.setdefault(name, set()).add(source)
        for name in ("utilisation", "occupancy", "sm_activity", "tensor_activity", "dram_activity"):
            self._add_value(name, getattr(sample, name), 1.0)
        self._add_value("occupancy_while_busy", sample.occupancy_while_busy, sample.graphics_activity)

    def aggregate(self) -> Aggregate:
        return Aggregate(
            samples=self.samples,
            mean_utilisation=self._mean("utilisation"),
            mean_occupancy=self._mean("occupancy"),
            mean_occupancy_while_busy=self._mean("occupancy_while_busy"),
            mean_sm_activity=self._mean("sm_activity"),
            mean_tensor_activity=self._mean("tensor_activity"),
            mean_dram_activity=self._mean("dram_activity"),
            peak_memory_bytes=self._peak_memory_bytes,
        )

    def joined_sources(self) -> dict[str, str]:
        return {name: "+".join(sorted(found)) for name, found in sorted(self._sources.items())}

    def _add_value(self, name: str, value: float | None, weight: float | None) -> None:
        if value is not None and weight is not None:
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, weights + weight)

    def _mean(self, name: str) -> float | None:
        total, weights = self._sums.get(name, (0.0, 0.0))
        return total / weights if weights else None
