"""The monitor's record: JSON lines of what a node's GPUs and the node itself did, and of what is not known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridpar.errors import HybridparError
from hybridpar.schema import from_data

SCHEMA_VERSION = 2
"""2: samples of hosts, events, and of GPUs also clocks, power and traffic; in 1 a GPU's line was a "sample"."""


@dataclass(frozen=True)
class GpuSample:
    """What one GPU did since the tick before. Every fraction lies in 0..1; None is unknown, never idle."""

    time_s: float
    """Seconds since the epoch, at the end of the window."""
    host: str
    gpu: int | None
    """NVML's index on the host, of the parent GPU for a MIG slice."""
    uuid: str | None
    window_s: float | None = None
    """What GPM's activities and occupancy are averaged over, up to ``time_s``; None where there are none."""
    utilisation: float | None = None
    """Part of the time in which any kernel ran (what nvidia-smi shows)."""
    memory_utilisation: float | None = None
    """Part of the time in which memory was read or written, however little."""
    graphics_activity: float | None = None
    """Part of the window in which the compute and graphics engine was active."""
    sm_activity: float | None = None
    """Busy multiprocessors, averaged over the window, idle time included."""
    occupancy: float | None = None
    """Active warps over the most that fit, averaged over the window, idle time included."""
    occupancy_while_busy: float | None = None
    """``occupancy / graphics_activity``; None where either is unknown and on an idle GPU."""
    tensor_activity: float | None = None
    dram_activity: float | None = None
    """Memory traffic over the most that the memory can do."""
    memory_used_bytes: int | None = None
    """By all processes on the GPU, their CUDA contexts included, the driver's own reserve left out."""
    memory_total_bytes: int | None = None
    sm_clock_hz: float | None = None
    sm_clock_max_hz: float | None = None
    """The highest that the GPU has, whatever is set."""
    memory_clock_hz: float | None = None
    throttle: tuple[str, ...] | None = None
    """What keeps the clocks down at the moment, by the names in ``hybridpar.monitor.throttle``; empty: nothing.

    That a GPU is idle is no reason among them.
    """
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    """Since the driver was loaded: the difference of two samples is what was used between them."""
    pcie_sent_bytes_per_s: float | None = None
    """By the GPU, as all directions here."""
    pcie_received_bytes_per_s: float | None = None
    nvlink_sent_bytes_per_s: float | None = None
    """Over all links."""
    nvlink_received_bytes_per_s: float | None = None
    sources: dict[str, str] = field(default_factory=dict)
    """Where each known field comes from: "nvml", "gpm" (NVML's performance monitoring, Hopper and later) or "dcgm"
    (a dcgm-exporter); after "replay:" where it was played from a recording."""


@dataclass(frozen=True)
class RankSample:
    """What the process of one rank did since the tick before; unknown once it is gone."""

    rank: int
    pid: int
    cpu_cores: float | None = None
    """CPU seconds of all its threads over seconds."""
    workers_cpu_cores: float | None = None
    """Likewise, of the processes that it started, such as those that load data; without the sampler."""
    memory_bytes: int | None = None
    """Resident, of the rank's own process."""


@dataclass(frozen=True)
class Traffic:
    """What went through one network interface."""

    sent_bytes: int
    """Since the sampler started."""
    received_bytes: int
    sent_bytes_per_s: float | None = None
    """Since the tick before."""
    received_bytes_per_s: float | None = None


@dataclass(frozen=True)
class HostSample:
    """What a node did since the tick before. None is unknown."""

    time_s: float
    """Seconds since the epoch, at the end of the window."""
    host: str
    window_s: float | None = None
    """Over which rates are taken; None at the first tick, which has none."""
    cpus: int | None = None
    """Logical ones, of the machine, whatever a container may use of them."""
    cpu_cores: float | None = None
    """CPUs busy, on average over the window: 1.5 of 2."""
    memory_used_bytes: int | None = None
    """What new processes could not have, of the machine."""
    memory_total_bytes: int | None = None
    network: dict[str, Traffic] = field(default_factory=dict)
    """By interface; those through which nothing went since the sampler started are left out."""
    ranks: tuple[RankSample, ...] = ()
    """The job's ranks on this node."""
    sampler_cpu_s: float | None = None
    """CPU seconds that the sampler has taken so far, its start included."""
    sources: dict[str, str] = field(default_factory=dict)
    """As in GpuSample: "psutil" for what it told, "sampler" for the sampler's own time."""


@dataclass(frozen=True)
class Event:
    """An error that a GPU's driver reported."""

    time_s: float
    """Seconds since the epoch, of the tick at which it was read."""
    host: str
    gpu: int | None
    uuid: str | None
    xid: int
    """Number in NVIDIA's list of Xid errors."""
    source: str = "nvml"


@dataclass(frozen=True)
class Gap:
    """Why data is missing, from this time on."""

    time_s: float
    """Seconds since the epoch."""
    host: str
    reason: str
    """One sentence."""
    lost: bool = False
    """Whether data of a GPU had been there before."""


Record = GpuSample | HostSample | Event | Gap
_KINDS: dict[str, type[Record]] = {"gpu": GpuSample, "host": HostSample, "event": Event, "gap": Gap}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_line(record: Record) -> str:
    """Return the record as one line of JSON, newline included."""
    data = {"kind": _NAMES[type(record)], "schema": SCHEMA_VERSION, **vars(record)}
    return json.dumps(data, allow_nan=False, default=vars) + "\n"


def read(path: Path) -> Iterator[Record]:
    """Yield the records of a file in order; a last line that a killed writer left unfinished is passed over.

    Raises HybridparError on a file that cannot be read and on any other malformed line, with its number.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield from_line(line, f"{path}:{number}")
    except OSError as e:
        raise HybridparError(f"cannot read {path}: {e.strerror}; give the path of a monitor.jsonl") from e


def from_line(line: bytes, where: str) -> Record:
    """Return the record of a line; raises HybridparError, which begins with ``where``, on a malformed one."""
    try:
        data: Any = json.loads(line)
    except ValueError as e:
        raise HybridparError(f"{where} is not JSON: {e}") from e
    if not isinstance(data, dict) or "kind" not in data:
        raise HybridparError(f"{where}: kind: missing; is this a monitor.jsonl?")
    kind, schema = data.pop("kind"), data.pop("schema", None)
    if schema != SCHEMA_VERSION:
        raise HybridparError(
            f"{where}: schema {schema} is not {SCHEMA_VERSION}; read it with the version of hybridpar that wrote "
            "it, or move it away and train again with this one"
        )
    if kind not in _KINDS:
        raise HybridparError(f"{where}: kind: {kind!r} is not one of {', '.join(_KINDS)}")
    return from_data(_KINDS[kind], data, where, HybridparError)
