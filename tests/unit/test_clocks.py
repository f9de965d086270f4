"""Clocks of hosts: the estimate of their offset, on clocks whose offset is known, and how ranks ask each other."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hybridpar.runtime import clocks
from hybridpar.runtime.clocks import Offset, RoundTrip, answer, ask, compare, estimate
from hybridpar.runtime.process import Process
from tests.support.threads import in_threads

AHEAD_S = 1234.5


def trip(
    at_s: float, there_s: float, back_s: float, ahead_s: float = AHEAD_S, thinks_s: float = 1e-5
) -> RoundTrip:
    """A question at an own time, to a clock that is ahead of the own one."""
    received_s = at_s + there_s
    answered_s = received_s + thinks_s
    return RoundTrip(at_s, received_s + ahead_s, answered_s + ahead_s, answered_s + back_s)


def test_equally_long_ways_give_the_very_offset() -> None:
    found = estimate([trip(5.0, 0.002, 0.002)])
    assert found.offset_s == pytest.approx(AHEAD_S, abs=1e-9)
    assert found.uncertainty_s == pytest.approx(0.002)


def test_the_quickest_trip_counts() -> None:
    """A question that waited in a queue on one way would put half of its wait into the offset."""
    slow = trip(5.0, 0.5, 0.002)
    assert abs(estimate([slow]).offset_s - AHEAD_S) > 0.2
    assert estimate([slow, trip(6.0, 0.003, 0.003), trip(7.0, 0.002, 0.4)]).offset_s == pytest.approx(
        AHEAD_S, abs=1e-9
    )


def test_the_offset_is_never_wrong_by_more_than_its_uncertainty() -> None:
    dice = random.Random(5)  # noqa: S311
    for _ in range(200):
        ahead_s = dice.uniform(-1e4, 1e4)
        trips = [trip(k, dice.expovariate(1e3), dice.expovariate(1e3), ahead_s, dice.random()) for k in range(8)]
        found = estimate(trips)
        assert abs(found.offset_s - ahead_s) <= found.uncertainty_s + 1e-9


class Group:
    """The line over a process group of threads."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def send(self, values: torch.Tensor, rank: int) -> None:
        self.group.send([values], rank, 0).wait()

    def receive(self, values: torch.Tensor, rank: int) -> None:
        self.group.recv([values], rank, 0).wait()


def test_a_rank_with_another_clock_finds_that_of_rank_0() -> None:
    store, found = dist.HashStore(), {}

    def main(rank: int) -> None:
        line = Group(dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20)))
        if rank == 0:
            answer(line, 1, time.perf_counter)
        else:
            found[rank] = ask(line, 0, lambda: time.perf_counter() - AHEAD_S)

    in_threads(main, 2, 40)
    assert abs(found[1].offset_s - AHEAD_S) <= found[1].uncertainty_s
    assert found[1].uncertainty_s > 0


def test_ranks_of_one_host_share_a_clock() -> None:
    """Whose names agree need no round trip: asked, a rank that is alone would wait for ever."""

    class Alone(Process):
        rank = 1

        def __init__(self) -> None:
            pass

        def gather(self, value: object) -> list[object]:
            return [value] * 3

    assert compare(Alone()) == Offset(0.0, 0.0)


def test_all_ranks_of_a_host_take_what_its_first_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 on one host, 1 and 3 on another, 4 on a third; each host's clock is off by its own."""
    names, late_s = "ababc", {"a": 0.0, "b": 500.0, "c": -70.0}
    store, meeting = dist.HashStore(), threading.Barrier(5)
    shared: list[list[object]] = [[None] * 5, [None] * 5]
    found: dict[int, Offset] = {}
    own = threading.local()
    monkeypatch.setattr(clocks, "host", lambda: names[own.rank])

    class Rank(Process):
        def __init__(self, rank: int) -> None:
            self.rank, self.rounds = rank, 0

        def gather(self, value: object) -> list[object]:
            values = shared[self.rounds]
            self.rounds += 1
            values[self.rank] = value
            meeting.wait(20)
            return values

    def main(rank: int) -> None:
        own.rank = rank
        line = Group(dist.ProcessGroupGloo(store, rank, 5, timedelta(seconds=20)))
        found[rank] = compare(Rank(rank), line, lambda: time.perf_counter() - late_s[names[rank]])

    in_threads(main, 5, 40)
    assert found[0] == found[2] == Offset()
    assert found[1] == found[3]
    for rank, offset in found.items():
        assert abs(offset.offset_s - late_s[names[rank]]) <= offset.uncertainty_s
