"""Links between groups of ranks, for estimates: which is the slowest, how many share it, what reductions cost."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from hybridpar.cluster.collectives import all_reduce
from hybridpar.cluster.topology import Cluster, Link
from hybridpar.planning.placement import Groups, Placement

LARGE_BYTES = 1e9
"""At which the time per byte of a reduction is taken."""
Ranks = tuple[int, ...]


class Way(NamedTuple):
    """How bytes get from some ranks to others."""

    link: Link
    sharing: int
    """Ranks that use it at once, of those on one node."""


class Reduction(NamedTuple):
    """An all-reduce, as a line over its bytes."""

    latency_s: float
    s_per_byte: float


class Wiring:
    """A cluster's links, each looked up once."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.nodes = cluster, cluster.node_of
        self._ways: dict[tuple[Ranks, Ranks], Way] = {}
        self._reductions: dict[tuple[Ranks, int, int], Reduction] = {}
        self._crowds: dict[tuple[Groups, bool, int, int], int] = {}

    def way(self, source: Ranks, target: Ranks) -> Way:
        """Return the slowest link among ranks of a replica, and how many of them share a card on it."""
        key = (source, target)
        if key not in self._ways:
            ranks = {*source, *target}
            on = Counter(self.nodes[r] for r in ranks)
            low, high = min(on), max(on)
            if low == high:
                self._ways[key] = Way(self.cluster.link("node"), 1)
            else:
                ends = [next(r for r in ranks if self.nodes[r] == node) for node in (low, high)]
                link = self.cluster.link(self.cluster.level(*ends))
                self._ways[key] = Way(link, max(on[low], on[high]))
        return self._ways[key]

    def inside(self, groups: Groups) -> Way:
        """Return the slowest of the ways between neighbouring segments that lie on different ranks."""
        ways = [self.way(a, b) for a, b in pairwise(groups) if set(a) != set(b)]
        return max(ways, key=lambda way: way.sharing / way.link.bytes_per_s)

    def reduction(self, ranks: Ranks, placement: Placement, *, across: bool = True) -> Reduction:
        """Return the all-reduce over ranks of every plan replica, or of one."""
        replicas = placement.replicas if across else 1
        key = (ranks, placement.world, replicas)
        if key not in self._reductions:
            everyone = sorted({r + k * placement.world for k in range(replicas) for r in ranks})
            latency = rate = 0.0
            if len(everyone) > 1:
                latency = all_reduce(self.cluster, everyone, 0)
                rate = (all_reduce(self.cluster, everyone, LARGE_BYTES) - latency) / LARGE_BYTES
            self._reductions[key] = Reduction(latency, rate)
        return self._reductions[key]

    def crowd(self, groups: Groups, placement: Placement, *, tail: bool) -> int:
        """Return how many reductions of a stage share a node's card: one per shard or segment on the node."""
        key = (groups, tail, placement.world, placement.replicas)
        if key not in self._crowds:
            self._crowds[key] = self._crowd(groups, placement, tail=tail)
        return self._crowds[key]

    def _crowd(self, groups: Groups, placement: Placement, *, tail: bool) -> int:
        if self.nodes[0] == self.nodes[placement.world * placement.replicas - 1]:
            return 1
        if tail:
            groups = tuple((rank,) for rank in groups[0])
        on = [{self.nodes[r] for r in ranks} for ranks in groups]
        sharing = Counter(node for own in on for node in own)
        crossing = placement.replicas > 1 or any(len(own) > 1 for own in on)
        return max(sharing.values()) if crossing else 1
