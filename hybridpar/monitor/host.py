"""Reads samples of the node itself, and of the job's processes on it, through psutil."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from hybridpar.monitor.rate import Rate
from hybridpar.monitor.record import HostSample, RankSample, Traffic

_LOOK_AFTER_S, _LOOK_SHARE = 5.0, 0.001
"""Between two looks for new processes of the ranks, at least; and the share of one core that looking may take."""


class Host:
    """The node and the processes of the job's ranks on it.

    A tick reads four small files of the system, and one more per rank and process that it started.
    """

    name = "host"
    gaps: Sequence[str] = ()

    def __init__(self, pids: Mapping[int, int], now_s: Callable[[], float] = time.monotonic) -> None:
        """Read what later ticks are compared with.

        Args:
            pids: process ids by rank.
            now_s: a clock that is never set.

        """
        self._host, self._now_s = socket.gethostname(), now_s
        self._cpus, self._busy = psutil.cpu_count(), Rate()
        self._ranks = [_Rank(rank, pid) for rank, pid in sorted(pids.items())]
        self._interfaces = {name: _Interface(counters) for name, counters in _counters().items()}
        self._read_s: float | None = None
        self._look_s = now_s()

    def read(self, time_s: float) -> tuple[HostSample]:
        """Return the node's sample, stamped ``time_s``."""
        now_s = self._now_s()
        if now_s >= self._look_s:
            self._look()
        window_s = None if self._read_s is None else now_s - self._read_s
        self._read_s = now_s
        memory = psutil.virtual_memory()
        sample = HostSample(
            time_s=time_s,
            host=self._host,
            window_s=window_s,
            cpus=self._cpus,
            cpu_cores=self._busy.step(_busy_s(), window_s),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            network=self._traffic(window_s),
            ranks=tuple(rank.read(window_s) for rank in self._ranks),
            sampler_cpu_s=time.process_time(),
        )
        told = ("cpus", "cpu_cores", "memory_used_bytes", "memory_total_bytes", "network", "ranks")
        sources = {name: "psutil" for name in told if getattr(sample, name) not in (None, (), {})}
        sample.sources.update(sources, sampler_cpu_s="sampler")
        return (sample,)

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""

    def _traffic(self, window_s: float | None) -> dict[str, Traffic]:
        traffic = {}
        for name, counters in _counters().items():
            moved = self._interfaces.setdefault(name, _Interface(counters)).step(counters, window_s)
            if moved.sent_bytes or moved.received_bytes:
                traffic[name] = moved
        return traffic

    def _look(self) -> None:
        """Find the processes that the ranks started; the next look comes the later, the longer this one took."""
        began_s = time.process_time()
        parents = {}
        for process in psutil.process_iter():
            try:
                parents[process.pid] = process.ppid()
            except psutil.Error:
                continue  # it ended meanwhile
        found = _descendants(parents, {rank.pid for rank in self._ranks}, os.getpid())
        for rank in self._ranks:
            rank.follow(found[rank.pid])
        cost_s = time.process_time() - began_s
        self._look_s = self._now_s() + max(_LOOK_AFTER_S, cost_s / _LOOK_SHARE)


class _Interface:
    """What went through a network interface since it was first seen."""

    def __init__(self, counters: Any) -> None:
        self._last, self._sent_bytes, self._received_bytes = counters, 0, 0

    def step(self, counters: Any, window_s: float | None) -> Traffic:
        """Add what the counters grew by since the last call; one that went back has begun again at 0."""
        sent, received = counters.bytes_sent - self._last.bytes_sent, counters.bytes_recv - self._last.bytes_recv
        self._last = counters
        self._sent_bytes += sent if sent >= 0 else counters.bytes_sent
        self._received_bytes += received if received >= 0 else counters.bytes_recv
        rates = [count / window_s if window_s and count >= 0 else None for count in (sent, received)]
        return Traffic(self._sent_bytes, self._received_bytes, *rates)


class _Rank:
    """The process of a rank and those that it started."""

    def __init__(self, rank: int, pid: int) -> None:
        self._rank, self.pid = rank, pid
        self._own, self._cpu = _process(pid), Rate()
        self._workers: dict[int, tuple[psutil.Process, Rate]] = {}

    def follow(self, pids: set[int]) -> None:
        """Have the processes that it started be those with the ids ``pids``."""
        for pid in self._workers.keys() - pids:
            del self._workers[pid]
        for pid in pids - self._workers.keys():
            process = _process(pid)
            if process is not None:
                self._workers[pid] = process, Rate()

    def read(self, window_s: float | None) -> RankSample:
        """Return what the process did in a window; what belongs to a process that is gone is None."""
        cpu_s = _ask(self._own, _cpu_s)
        workers = [rate.step(_ask(process, _cpu_s), window_s) for process, rate in self._workers.values()]
        unknown = window_s is None or cpu_s is None
        return RankSample(
            self._rank,
            self.pid,
            cpu_cores=self._cpu.step(cpu_s, window_s),
            workers_cpu_cores=None if unknown else sum((c for c in workers if c is not None), 0.0),
            memory_bytes=_ask(self._own, lambda process: int(process.memory_info().rss)),
        )


def _descendants(parents: Mapping[int, int], roots: set[int], apart: int) -> dict[int, set[int]]:
    """Return the descendants of each root by the processes' parents, but those of other roots and ``apart``."""
    found: dict[int, set[int]] = {root: set() for root in roots}
    for pid in parents:
        line, at = list[int](), pid
        while at in parents and at not in roots and at != apart and at not in line:
            line.append(at)
            at = parents[at]
        if at in roots:
            found[at].update(line)
    return found


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _ask(process: psutil.Process | None, what: Callable[[psutil.Process], Any]) -> Any:
    """Return what a process tells, None where it is gone or belongs to another user."""
    try:
        return None if process is None else what(process)
    except psutil.Error:
        return None


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _busy_s() -> float:
    """CPU seconds since the machine started in which any CPU did something; a guest's are the user's already."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")
    return float(sum(seconds for name, seconds in times.items() if name not in idle))


def _counters() -> dict[str, Any]:
    return psutil.net_io_counters(pernic=True, nowrap=False)
