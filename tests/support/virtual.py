"""A transport for probes on a cluster that exists on paper only: threads for ranks, formulas for times."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridpar.cluster import collectives
from hybridpar.cluster.topology import Cluster, Collective
from hybridpar.cluster.transport import ACK_BYTES, What
from tests.support.threads import in_threads

KERNEL_S = 1e-3


@dataclass
class _Meeting:
    """Where all ranks' threads meet and leave values."""

    world: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=60)
        self.values = [None] * self.world


class VirtualTransport:
    """One rank of ``truth``, whose clock advances by what everything would take there, but for some noise.

    A transfer in flight slows a computation down by its link's contention.
    """

    def __init__(self, truth: Cluster, rank: int, meeting: _Meeting, noise: float) -> None:
        self.truth, self.rank, self.world, self.meeting = truth, rank, truth.world, meeting
        self.clock_s = 0.0
        self.flying: tuple[float, float] = (0.0, 0.0)
        """Until when something is in flight, and its contention."""
        self.opened: list[tuple[int, ...]] = []
        self.draw = random.Random(rank)  # noqa: S311
        self.noise = noise

    def now(self) -> float:
        return self.clock_s

    def gather(self, value: Any) -> list[Any]:
        """Exchange values and go on at the time of the last."""
        self.meeting.values[self.rank] = (self.clock_s, value)
        self.meeting.barrier.wait()
        everyone = list(self.meeting.values)
        self.meeting.barrier.wait()
        self.clock_s = max(clock for clock, _ in everyone)
        return [value for _, value in everyone]

    def open(self, groups: Sequence[tuple[int, ...]]) -> None:
        self.opened = list(groups)

    def messages(self, source: int, target: int, payload_bytes: int, count: int) -> None:
        assert self.rank in {source, target}
        there = collectives.point_to_point(self.truth, source, target, payload_bytes)
        self._pass(count * (there + collectives.point_to_point(self.truth, target, source, ACK_BYTES)))

    def collective(self, operation: Collective, ranks: tuple[int, ...], payload_bytes: int, count: int) -> None:
        assert ranks in self.opened
        assert self.rank in ranks
        self._pass(count * self._seconds(operation, ranks, payload_bytes))

    def start(self, what: What, ranks: tuple[int, ...], payload_bytes: int, count: int) -> VirtualTransport:
        level = self.truth.level(ranks[0], ranks[-1])
        link = self.truth.link(level, None if what == "message" else what)
        whole_s, latency_s = (self._seconds(what, ranks, size) for size in (payload_bytes, 0))
        contention = link.lost(latency_s, whole_s - latency_s) / whole_s
        self.flying = (self.clock_s + count * whole_s, contention)
        return self

    def wait(self) -> None:
        self.clock_s = max(self.clock_s, self.flying[0])

    def compute(self, count: int) -> None:
        work = count * KERNEL_S / self.truth.speed(self.rank)
        until, contention = self.flying
        slowed = max(0.0, until - self.clock_s)
        done = min(work, slowed * (1 - contention))
        self._pass((done / (1 - contention) if contention < 1 else slowed) + work - done)

    def _seconds(self, what: What, ranks: tuple[int, ...], payload_bytes: int) -> float:
        if what == "message":
            return collectives.point_to_point(self.truth, ranks[0], ranks[1], payload_bytes)
        if what == "all_gather":
            return collectives.all_gather(self.truth, ranks, payload_bytes / len(ranks))
        return float(getattr(collectives, what)(self.truth, ranks, payload_bytes))

    def _pass(self, seconds: float) -> None:
        self.clock_s += seconds * (1 + self.noise * self.draw.random())


def on_virtual_ranks(truth: Cluster, body: Callable[[VirtualTransport], Any], noise: float = 0.0) -> list[Any]:
    """Run ``body`` on every rank of ``truth``; re-raises the first failure."""
    meeting, results, failures = _Meeting(truth.world), {}, []

    def main(rank: int) -> None:
        try:
            results[rank] = body(VirtualTransport(truth, rank, meeting, noise))
        except BaseException as e:  # noqa: BLE001 - handed to the caller
            failures.append(e)
            meeting.barrier.abort()

    in_threads(main, truth.world, 60.0)
    if failures:
        raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
    return [results[rank] for rank in range(truth.world)]
