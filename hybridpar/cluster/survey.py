"""Which ranks a probe lets communicate, and the formula that their times are fitted to."""

from __future__ import annotations

import math
from collections import Counter

from hybridpar.cluster.fit import Sample
from hybridpar.cluster.topology import LEVELS, Cluster, Level, Node
from hybridpar.cluster.transport import What

PAIR_ROUNDS = 3


def levels_of(cluster: Cluster) -> tuple[Level, ...]:
    """Return the levels that some pair of ranks crosses, narrowest first."""
    sites = {node.site for node in cluster.nodes}
    racks = {(node.site, node.rack) for node in cluster.nodes}
    crossed: dict[Level, bool] = {
        "node": any(node.devices > 1 for node in cluster.nodes),
        "rack": len(cluster.nodes) > len(racks),
        "site": len(racks) > len(sites),
        "wan": len(sites) > 1,
    }
    return tuple(level for level in LEVELS if crossed[level])


def pair_rounds(
    cluster: Cluster, level: Level, rounds: int = PAIR_ROUNDS
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Choose pairs (lower rank, higher rank) across ``level``, in rounds of pairs that do not disturb each other.

    Pairs of a round share no rank, above the node level no node (its card is shared), and within a node with
    shared cores no core: two ranks that communicate keep two cores busy. Near pairs come first.
    """
    strides = sorted({*(2**i for i in range(cluster.world.bit_length())), cluster.world - 1})
    left = [(a, a + s) for s in strides for a in range(cluster.world - s) if cluster.level(a, a + s) == level]
    result: list[tuple[tuple[int, int], ...]] = []
    while left and len(result) < rounds:
        chosen: list[tuple[int, int]] = []
        taken: set[int] = set()
        busy: Counter[int] = Counter()
        for pair in left:
            nodes = {cluster.node_of[rank] for rank in pair}
            if taken.isdisjoint(pair) and all(
                busy[node] < _pairs_at_once(cluster.nodes[node], level) for node in nodes
            ):
                chosen.append(pair)
                taken.update(pair)
                busy.update(nodes)
        result.append(tuple(chosen))
        measured = set(chosen)
        left = [pair for pair in left if pair not in measured]
    return tuple(result)


def _pairs_at_once(node: Node, level: Level) -> int:
    if level != "node":
        return 1
    return node.devices if node.cores is None else max(1, node.cores // 2)


def groups_of(cluster: Cluster, level: Level) -> tuple[tuple[int, ...], ...]:
    """Return the largest groups of ranks, all of one size, whose collectives cross ``level`` and no other level.

    Within a node all its ranks; above, the first rank of each member: node of a rack, rack of a site, site.
    """
    parents: dict[object, dict[object, list[int]]] = {}
    for rank, index in enumerate(cluster.node_of):
        node = cluster.nodes[index]
        path = (node.site, node.rack, index, rank)
        depth = {"node": 3, "rack": 2, "site": 1, "wan": 0}[level]
        parents.setdefault(path[:depth], {}).setdefault(path[: depth + 1], []).append(rank)
    groups = [tuple(ranks[0] for ranks in members.values()) for members in parents.values()]
    most = max(map(len, groups))
    return tuple(group for group in groups if len(group) == most) if most > 1 else ()


def line(what: What, n: int, payload_bytes: float, seconds: float) -> Sample:
    """Return a time as a sample of the formula that ``collectives`` has for it.

    ``n`` ranks and a vector of S bytes: a message ``alpha + S/beta``; all_reduce ``2 (n-1) (alpha + S/(n beta))``;
    all_gather and reduce_scatter ``(n-1) (alpha + S/(n beta))``; broadcast ``ceil(log2 n) (alpha + S/beta)``.
    """
    if what == "message":
        return Sample(1, payload_bytes, seconds)
    rounds = {"all_reduce": 2 * (n - 1), "broadcast": math.ceil(math.log2(n))}.get(what, n - 1)
    return Sample(rounds, rounds * payload_bytes / (1 if what == "broadcast" else n), seconds)
