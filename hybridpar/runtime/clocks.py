"""The clocks of several hosts: by how much each differs from that of rank 0, by round trips between them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from hybridpar.runtime.process import Process

TRIPS = 16
"""Per host; the quickest one counts, and the first ones open the connection."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
Clock = Callable[[], float]


class RoundTrip(NamedTuple):
    """A question and its answer; seconds of two clocks."""

    asked_s: float
    """Of the own clock, as ``returned_s``."""
    received_s: float
    """Of the other clock, as ``answered_s``."""
    answered_s: float
    returned_s: float

    @property
    def delay_s(self) -> float:
        """Time on the way, both ways."""
        return (self.returned_s - self.asked_s) - (self.answered_s - self.received_s)


@dataclass(frozen=True)
class Offset:
    """What added to the own clock gives the other one, and how wrong it may be."""

    offset_s: float = 0.0
    uncertainty_s: float = 0.0


def estimate(trips: Sequence[RoundTrip]) -> Offset:
    """Return the offset by the quickest of some round trips.

    With equally long ways it is ``((received - asked) + (answered - returned)) / 2``, and it cannot be wrong by
    more than half of the delay (RFC 5905, section 8: theta and delta; the sample of least delay: section 10).
    """
    best = min(trips, key=lambda t: t.delay_s)
    offset_s = ((best.received_s - best.asked_s) + (best.answered_s - best.returned_s)) / 2
    return Offset(offset_s, max(best.delay_s, 0.0) / 2)


class Line(Protocol):
    """Sends two numbers to another rank and receives two."""

    def send(self, values: torch.Tensor, rank: int) -> None:
        """Send ``values`` to a rank."""
        ...

    def receive(self, values: torch.Tensor, rank: int) -> None:
        """Receive ``values`` of a rank."""
        ...


class DefaultGroup:
    """The line over the job's default process group, whose part for the CPU is gloo."""

    def send(self, values: torch.Tensor, rank: int) -> None:
        """Send ``values`` to a rank."""
        dist.send(values, rank)

    def receive(self, values: torch.Tensor, rank: int) -> None:
        """Receive ``values`` of a rank."""
        dist.recv(values, rank)


def ask(line: Line, rank: int, clock: Clock, trips: int = TRIPS) -> Offset:
    """Compare the own clock with that of ``rank``, which calls ``answer`` meanwhile."""
    made = []
    for _ in range(trips):
        values = torch.zeros(2, dtype=torch.float64)
        asked_s = clock()
        line.send(values, rank)
        line.receive(values, rank)
        returned_s = clock()
        received_s, answered_s = values.tolist()
        made.append(RoundTrip(asked_s, received_s, answered_s, returned_s))
    return estimate(made)


def answer(line: Line, rank: int, clock: Clock, trips: int = TRIPS) -> None:
    """Tell ``rank``, which calls ``ask``, the own time."""
    for _ in range(trips):
        values = torch.zeros(2, dtype=torch.float64)
        line.receive(values, rank)
        received_s = clock()
        line.send(torch.tensor([received_s, clock()], dtype=torch.float64), rank)


def host() -> str:
    """Return what tells machines apart: ranks with one answer share a monotonic clock, containers included."""
    return _BOOT.read_text().strip() if _BOOT.exists() else socket.gethostname()


def compare(process: Process, line: Line | None = None, clock: Clock = time.perf_counter) -> Offset:
    """Return what added to this rank's clock gives that of rank 0; all ranks call it.

    The first rank of every other host asks rank 0, over the default group unless there is another ``line``. Where
    there is one host only, its name is all that is shared.
    """
    hosts: list[str] = process.gather(host())
    if len(set(hosts)) == 1:
        return Offset()
    line, own = line or DefaultGroup(), Offset()
    for name in dict.fromkeys(hosts):
        first = hosts.index(name)
        if first and process.rank == 0:
            answer(line, first, clock)
        elif first and process.rank == first:
            own = ask(line, 0, clock)
    found: list[Offset] = process.gather(own)
    return found[hosts.index(hosts[process.rank])]
