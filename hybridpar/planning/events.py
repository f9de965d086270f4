"""The simulation by events, for machines where computations slow each other down, or communication does them.

Ranks on a node with fewer cores than busy ranks share the cores evenly, and an idle rank's time is lent to the
others, as an operating system does. A link's ``contention`` is the computation that a rank loses per second in
which the link carries its data: a rank that loses more than it does has that much more left to do afterwards. On
shared cores it is taken from what the node's ranks have together.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict

from hybridpar.planning.costs import Costs
from hybridpar.planning.timeline import Flight, Span, Timeline
from hybridpar.planning.walk import COMPUTE, START, WAIT, Walk, service_order

Key = tuple[int, int]
"""(step, operation)."""


class _Share:
    """Ranks that share a number of cores; with ``cores`` None, one rank that has its device to itself."""

    def __init__(self, cores: float | None) -> None:
        self.cores = cores
        self.left: dict[int, float] = {}
        self.carrying: dict[int, float] = defaultdict(float)
        """Per rank, the contention of all operations in flight."""
        self.now = 0.0
        self.version = 0

    def advance(self, now: float) -> None:
        """Work off what the computing ranks did since the last change."""
        if self.left:
            done = (now - self.now) * self.rate()
            for rank in self.left:
                self.left[rank] -= done
        self.now = now

    def rate(self) -> float:
        """Device seconds per second of each computing rank; below 0 while communication costs more than that."""
        carried = sum(self.carrying.values())
        if self.cores is None:
            return 1.0 - carried
        return min(1.0, self.cores / (len(self.left) + carried))

    def next_end(self) -> tuple[float, int]:
        """Return when the first computation ends, and its rank."""
        rank = min(self.left, key=lambda r: (self.left[r], r))
        rate = self.rate()
        left = max(self.left[rank], 0.0)
        return (self.now + left / rate if rate > 0.0 else float("inf")), rank


class EventSimulation:
    """One run over a number of steps."""

    def __init__(self, walked: Walk, costs: Costs, steps: int) -> None:
        self.walked, self.steps = walked, steps
        self.own: list[list[int]] = [[] for _ in range(walked.world)]
        for number, (rank, _, _) in enumerate(walked.steps):
            self.own[rank].append(number)
        self.shares, self.share_of = _shares(costs, walked)
        self.order = service_order(walked)
        self.served = [0] * walked.server_count
        self.at = [0] * walked.world
        self.step = [0] * walked.world
        self.began: dict[int, float] = {}
        self.started: dict[Key, int] = defaultdict(int)
        self.begun: dict[Key, float] = {}
        self.complete: set[Key] = set()
        self.waiting: dict[Key, list[int]] = defaultdict(list)
        self.events: list[tuple[float, int, int, Key | int]] = []
        self.count = 0
        self.ends = [0.0] * steps
        self.ended = 0
        self.spans: list[Span] = []
        self.flights: list[Flight] = []

    def run(self) -> Timeline:
        """Process events until all ranks are through."""
        for rank in range(self.walked.world):
            self._proceed(rank, 0.0)
        while self.events and self.ended < self.walked.world:
            now, _, version, what = heapq.heappop(self.events)
            if not isinstance(what, int):
                self._finish_operation(what, now)
            elif version == self.shares[what].version:
                self._finish_computation(what, now)
        return Timeline(self.ends, self.spans, self.flights)

    def _push(self, time: float, version: int, what: Key | int) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, version, what))

    def _proceed(self, rank: int, now: float) -> None:
        """Run a rank's actions until it computes, waits, or is through."""
        own, steps = self.own[rank], self.walked.steps
        while True:
            if self.at[rank] == len(own):
                self._end_step(rank, now)
                if self.ended == self.walked.world or not own:
                    return
                continue
            _, code, what = steps[own[self.at[rank]]]
            if code == COMPUTE:
                self._compute(rank, what, now)
                return
            key = (self.step[rank], int(what))
            if code == START:
                self.started[key] += 1
                self._try_begin(key, now)
            elif code == WAIT and key not in self.complete:
                self.waiting[key].append(rank)
                return
            self.at[rank] += 1

    def _end_step(self, rank: int, now: float) -> None:
        step = self.step[rank]
        if step < self.steps:
            self.ends[step] = max(self.ends[step], now)
            self.ended += step == self.steps - 1
        self.step[rank], self.at[rank] = step + 1, 0

    def _compute(self, rank: int, seconds: float, now: float) -> None:
        share = self.shares[self.share_of[rank]]
        share.advance(now)
        share.left[rank] = seconds
        self.began[rank] = now
        self._schedule(self.share_of[rank])

    def _schedule(self, index: int) -> None:
        share = self.shares[index]
        share.version += 1
        if share.left:
            time = share.next_end()[0]
            if time < float("inf"):
                self._push(time, share.version, index)

    def _finish_computation(self, index: int, now: float) -> None:
        share = self.shares[index]
        _, rank = share.next_end()
        share.advance(now)
        del share.left[rank]
        self._schedule(index)
        if self.step[rank] == self.steps - 1:
            action = self.walked.actions[self.own[rank][self.at[rank]]]
            self.spans.append(Span(rank, self.began[rank], now, action))
        self.at[rank] += 1
        self._proceed(rank, now)

    def _try_begin(self, key: Key, now: float) -> None:
        """Begin an operation that all participants started, once it is next at all its servers."""
        step, operation = key
        if self.started[key] < len(self.walked.members[operation]) or key in self.begun:
            return
        for server in self.walked.servers[operation]:
            turn, order = self.served[server], self.order[server]
            if order[turn % len(order)] != operation or turn // len(order) != step:
                return
        self.begun[key] = now
        self._carry(operation, self.walked.contention[operation], now)
        self._push(now + self.walked.seconds[operation], 0, key)

    def _carry(self, operation: int, contention: float, now: float) -> None:
        """Let an operation take (or, below 0, give back) its share of its participants' compute rate."""
        if contention == 0.0:
            return
        touched = set()
        for rank in self.walked.members[operation]:
            index = self.share_of[rank]
            if index not in touched:
                touched.add(index)
                self.shares[index].advance(now)
        for rank in self.walked.members[operation]:
            carried = self.shares[self.share_of[rank]].carrying
            carried[rank] = max(carried[rank] + contention, 0.0)
        for index in sorted(touched):
            self._schedule(index)

    def _finish_operation(self, key: Key, now: float) -> None:
        step, operation = key
        self.complete.add(key)
        self._carry(operation, -self.walked.contention[operation], now)
        if step == self.steps - 1:
            self.flights.append(Flight(operation, self.begun[key], now))
        for server in self.walked.servers[operation]:
            self.served[server] += 1
        for server in self.walked.servers[operation]:
            turn, order = self.served[server], self.order[server]
            self._try_begin((turn // len(order), order[turn % len(order)]), now)
        for rank in self.waiting.pop(key, ()):
            self.at[rank] += 1
            self._proceed(rank, now)


def _shares(costs: Costs, walked: Walk) -> tuple[list[_Share], list[int]]:
    """Return the groups of ranks that share cores, and the group of every rank.

    Of a node that holds ranks of several plan replicas, each has its part of the cores. The walk's one replica
    stands for the one that has least.
    """
    nodes, node_of = costs.cluster.nodes, costs.cluster.node_of
    own = Counter(node_of[: walked.world])
    everyone = Counter(node_of[: walked.world * walked.replicas])
    shares: list[_Share] = []
    share_of: list[int] = []
    by_node: dict[int, int] = {}
    for rank in range(walked.world):
        node = node_of[rank]
        places = {node_of[rank + copy * walked.world] for copy in range(walked.replicas)}
        parts = [cores * own[node] / everyone[n] for n in places if (cores := nodes[n].cores) is not None]
        if not parts or node not in by_node:
            by_node[node] = len(shares)
            shares.append(_Share(min(parts, default=None)))
        share_of.append(by_node[node])
    return shares, share_of
