"""Samples of the node: against a node of numbers, and of this one."""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from hybridpar.monitor import host
from hybridpar.monitor.host import Host
from hybridpar.monitor.record import HostSample, RankSample, Traffic

RANK, OTHER_RANK, WORKER, GRANDCHILD, STRANGER = 100, 200, 101, 102, 300


class Node:
    """A node of numbers, in the place of psutil, which counts what it is asked."""

    Error = psutil.Error

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.now_s = 50.0
        self.cpu = {"user": 10.0, "system": 5.0, "idle": 100.0, "iowait": 1.0, "guest": 3.0}
        self.memory = SimpleNamespace(total=1000, available=600)
        self.interfaces = {"lo": (7, 7), "eth0": (1000, 2000)}
        self.parents = {RANK: 1, OTHER_RANK: 1, WORKER: RANK, GRANDCHILD: WORKER, STRANGER: 1, os.getpid(): RANK}
        self.parents[os.getpid() + 1] = os.getpid()  # a process of the sampler itself
        self.used_s = dict.fromkeys(self.parents, 1.0)

    def cpu_count(self) -> int:
        return 4

    def cpu_times(self) -> Any:
        self.asked["cpu_times"] += 1
        return SimpleNamespace(_asdict=lambda: dict(self.cpu))

    def virtual_memory(self) -> Any:
        self.asked["virtual_memory"] += 1
        return self.memory

    def net_io_counters(self, *, pernic: bool, nowrap: bool) -> Any:
        assert pernic
        assert not nowrap
        self.asked["net_io_counters"] += 1
        return {n: SimpleNamespace(bytes_sent=s, bytes_recv=r) for n, (s, r) in self.interfaces.items()}

    def process_iter(self) -> Any:
        self.asked["process_iter"] += 1
        return [self.Process(pid) for pid in self.parents]

    def Process(self, pid: int) -> Any:  # noqa: N802 - psutil's name
        if pid not in self.parents:
            raise psutil.NoSuchProcess(pid)

        def tell(what: str, value: Any) -> Any:
            self.asked[what] += 1
            if pid not in self.parents:
                raise psutil.NoSuchProcess(pid)
            return value()

        return SimpleNamespace(
            pid=pid,
            ppid=lambda: tell("ppid", lambda: self.parents[pid]),
            cpu_times=lambda: tell("own", lambda: SimpleNamespace(user=self.used_s[pid], system=0.5)),
            memory_info=lambda: tell("memory", lambda: SimpleNamespace(rss=10 * pid)),
        )


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    result = Node()
    monkeypatch.setattr(host, "psutil", result)
    return result


def open_host(node: Node) -> Host:
    return Host({1: OTHER_RANK, 0: RANK}, lambda: node.now_s)


def read(source: Host) -> HostSample:
    (sample,) = source.read(1e9)
    return sample


def test_a_tick_by_hand(node: Node) -> None:
    source = open_host(node)
    first = read(source)
    assert (first.window_s, first.cpu_cores, first.cpus) == (None, None, 4)
    assert (first.memory_used_bytes, first.memory_total_bytes, first.network) == (400, 1000, {})
    assert first.ranks == (RankSample(0, RANK, memory_bytes=1000), RankSample(1, OTHER_RANK, memory_bytes=2000))
    assert "cpu_cores" not in first.sources
    node.now_s += 2.0
    node.cpu["user"] += 2.0
    node.cpu["guest"] += 2.0  # which counts as the user's already
    node.cpu["idle"] += 6.0
    node.interfaces["eth0"] = (1500, 2000)
    node.used_s |= {RANK: 2.0, WORKER: 2.5, GRANDCHILD: 1.5, STRANGER: 9.0, os.getpid(): 9.0}
    second = read(source)
    assert (second.window_s, second.cpu_cores) == (2.0, 1.0)
    assert second.network == {"eth0": Traffic(500, 0, 250.0, 0.0)}
    own, other = second.ranks
    assert own == RankSample(0, RANK, cpu_cores=0.5, workers_cpu_cores=1.0, memory_bytes=1000)
    assert other == RankSample(1, OTHER_RANK, cpu_cores=0.0, workers_cpu_cores=0.0, memory_bytes=2000)
    told = {"cpus", "cpu_cores", "memory_used_bytes", "memory_total_bytes", "network", "ranks"}
    assert second.sources == dict.fromkeys(told, "psutil") | {"sampler_cpu_s": "sampler"}


def test_what_is_gone_is_unknown(node: Node) -> None:
    source = open_host(node)
    read(source)
    del node.parents[RANK], node.parents[WORKER]
    node.interfaces = {"eth0": (900, 2500), "eth1": (5, 5)}  # the first was reset, the second is new
    node.now_s += 1.0
    second = read(source)
    assert second.ranks[0] == RankSample(0, RANK)
    assert second.ranks[1].cpu_cores == 0.0
    assert second.network == {"eth0": Traffic(900, 500, None, 500.0)}


def test_a_tick_reads_a_few_files_and_looks_for_processes_seldom(node: Node) -> None:
    source = open_host(node)
    node.asked.clear()
    for _ in range(20):
        read(source)
        node.now_s += 0.5
    ticks = 20
    assert [node.asked[name] for name in ("cpu_times", "virtual_memory", "net_io_counters")] == [ticks] * 3
    assert node.asked["process_iter"] == 2  # within 10 s
    assert node.asked["own"] == ticks * 4  # two ranks and two processes that they started
    assert node.asked["memory"] == ticks * 2


def test_looking_for_processes_takes_its_share_only(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look of 20 ms, as on a node of a thousand processes, comes every 20 s: a thousandth of a core."""
    spent_s = iter(range(1000))
    monkeypatch.setattr(host.time, "process_time", lambda: next(spent_s) * 0.02)
    source = open_host(node)
    for _ in range(100):
        read(source)
        node.now_s += 1.0
    assert node.asked["process_iter"] == 5


def test_this_node() -> None:
    source = Host({0: os.getppid()})
    read(source)
    sample = read(source)
    assert sample.cpus == os.cpu_count()
    assert sample.memory_total_bytes is not None
    assert 0 < (sample.memory_used_bytes or 0) < sample.memory_total_bytes
    assert (sample.ranks[0].memory_bytes or 0) > 0
    assert (sample.sampler_cpu_s or 0) > 0
