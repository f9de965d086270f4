"""A text file of the latest samples, for the textfile collector of a node exporter.

The text is OpenMetrics of gauges alone, which older parsers of Prometheus read too. There are no time stamps, as
that collector refuses them (github.com/prometheus/node_exporter, textfile collector).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hybridpar.monitor.record import Gap, GpuSample, HostSample, Record
from hybridpar.monitor.throttle import NAMES

WRITE_AFTER_S = 5.0
"""From one file to the next; collectors look every 15 s or more seldom."""

_GPU = {
    "utilisation": ("utilisation_ratio", "Part of the time in which any kernel ran."),
    "memory_utilisation": ("memory_utilisation_ratio", "Part of the time in which memory was read or written."),
    "graphics_activity": ("graphics_activity_ratio", "Part of the time in which the engine was active."),
    "sm_activity": ("sm_activity_ratio", "Busy multiprocessors, idle time included."),
    "occupancy": ("occupancy_ratio", "Active warps over the most that fit, idle time included."),
    "occupancy_while_busy": ("occupancy_while_busy_ratio", "Occupancy over graphics activity."),
    "tensor_activity": ("tensor_activity_ratio", "Activity of the tensor cores."),
    "dram_activity": ("dram_activity_ratio", "Memory traffic over the most that the memory can do."),
    "memory_used_bytes": ("memory_used_bytes", "By all processes on the GPU."),
    "memory_total_bytes": ("memory_total_bytes", "Memory of the GPU."),
    "sm_clock_hz": ("sm_clock_hertz", "Clock of the multiprocessors."),
    "memory_clock_hz": ("memory_clock_hertz", "Clock of the memory."),
    "temperature_c": ("temperature_celsius", "Temperature of the GPU."),
    "power_w": ("power_watts", "Power that the GPU draws."),
    "power_limit_w": ("power_limit_watts", "Power that it may draw."),
    "energy_j": ("energy_joules", "Energy since the driver was loaded."),
    "pcie_sent_bytes_per_s": ("pcie_sent_bytes_per_second", "Traffic over PCIe from the GPU."),
    "pcie_received_bytes_per_s": ("pcie_received_bytes_per_second", "Traffic over PCIe to the GPU."),
    "nvlink_sent_bytes_per_s": ("nvlink_sent_bytes_per_second", "Traffic over all NVLinks from the GPU."),
    "nvlink_received_bytes_per_s": ("nvlink_received_bytes_per_second", "Traffic over all NVLinks to the GPU."),
}
_HOST = {
    "cpu_cores": ("cpu_cores", "CPUs busy, of the machine."),
    "memory_used_bytes": ("memory_used_bytes", "What new processes could not have, of the machine."),
    "memory_total_bytes": ("memory_total_bytes", "Memory of the machine."),
    "sampler_cpu_s": ("sampler_cpu_seconds", "CPU seconds of the sampler so far."),
}
_RANK = {
    "cpu_cores": ("cpu_cores", "CPU of the rank's process."),
    "workers_cpu_cores": ("workers_cpu_cores", "CPU of the processes that it started."),
    "memory_bytes": ("memory_bytes", "Resident memory of the rank's process."),
}
_TRAFFIC = {
    "sent_bytes_per_s": ("sent_bytes_per_second", "Traffic of a network interface, sent."),
    "received_bytes_per_s": ("received_bytes_per_second", "Traffic of a network interface, received."),
}


class Export:
    """A file that holds the latest sample of the node and of every GPU of it; gone once closed."""

    def __init__(self, path: Path, run: str, now_s: Callable[[], float] = time.monotonic) -> None:
        """Write nothing yet; ``run`` is the job's label."""
        self._path, self._run, self._now_s = path, run, now_s
        self._due_s: float | None = None
        self._latest: dict[tuple[str, str | int | None], GpuSample | HostSample] = {}
        self._told = False

    def step(self, records: Iterable[Record]) -> list[Gap]:
        """Take in the records of a tick, and write the file where that is due.

        Returns a gap, once, where it cannot be written.
        """
        for record in records:
            if isinstance(record, GpuSample):
                self._latest[record.host, record.uuid or record.gpu] = record
            elif isinstance(record, HostSample):
                self._latest[record.host, None] = record
        now_s = self._now_s()
        if self._due_s is not None and now_s < self._due_s:
            return []
        self._due_s = now_s + WRITE_AFTER_S
        try:
            self._write(to_text(self._latest.values(), self._run))
        except OSError as e:
            told, self._told = self._told, True
            reason = f"monitor.openmetrics: {self._path} cannot be written: {e.strerror}"
            return [] if told else [Gap(time.time(), socket.gethostname(), reason)]
        return []

    def close(self) -> None:
        """Remove the file, whose figures are over."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            return  # who may not write there was told so

    def _write(self, text: str) -> None:
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(self._path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def to_text(samples: Iterable[GpuSample | HostSample], run: str) -> str:
    """Return samples as OpenMetrics; what is unknown has no line."""
    text = _Text()
    for sample in samples:
        labels = {"run": run, "host": sample.host}
        if isinstance(sample, HostSample):
            _add_host(text, sample, labels)
            continue
        labels |= {"gpu": "" if sample.gpu is None else str(sample.gpu), "uuid": sample.uuid or ""}
        for field, (name, told) in _GPU.items():
            source = {"source": sample.sources.get(field, "")}
            text.add(f"gpu_{name}", told, labels | source, getattr(sample, field))
        for reason in NAMES.values() if sample.throttle is not None else ():
            told = "Whether this keeps the clocks down at the moment."
            text.add("gpu_throttled", told, labels | {"reason": reason}, float(reason in (sample.throttle or ())))
    return text.done()


def _add_host(text: _Text, sample: HostSample, labels: dict[str, str]) -> None:
    text.add("sampled_timestamp_seconds", "When the node was sampled last.", labels, sample.time_s)
    for field, (name, told) in _HOST.items():
        text.add(f"node_{name}", told, labels, getattr(sample, field))
    for rank in sample.ranks:
        for field, (name, told) in _RANK.items():
            text.add(f"rank_{name}", told, labels | {"rank": str(rank.rank)}, getattr(rank, field))
    for interface, traffic in sample.network.items():
        for field, (name, told) in _TRAFFIC.items():
            text.add(f"network_{name}", told, labels | {"interface": interface}, getattr(traffic, field))


class _Text:
    """Gauges by name, as the format wants them together."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(self, name: str, told: str, labels: dict[str, str], value: float | None) -> None:
        if value is None:
            return
        name = f"hybridpar_{name}"
        head = [f"# TYPE {name} gauge", f"# HELP {name} {told}"]
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        self._families.setdefault(name, head).append(f"{name}{{{inside}}} {value!r}")

    def done(self) -> str:
        return "\n".join([*(line for lines in self._families.values() for line in lines), "# EOF"]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
