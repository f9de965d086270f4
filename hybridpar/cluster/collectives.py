"""Time of communication over a cluster's links: point to point and collectives.

Notation: n ranks, S payload bytes, and a link of latency alpha (s) and bandwidth beta (bytes/s).

Sources:

- R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH",
  Int. J. High Performance Computing Applications 19(1), 2005: ring, binomial tree, scatter + all-gather broadcast.
- P. Patarasu, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
  J. Parallel and Distributed Computing 69(2), 2009: the ring's 2 (n-1)/n S bytes per rank are the least possible,
  and on a tree of switches the ring that visits the ranks node by node reaches them.

**Constants.** alpha and beta are the link's, or those that were fitted to the library's own operation on a level,
where the cluster's ``collectives`` has them: theory stays here, measurements stay in the description. An
all-reduce takes fitted ones only for the algorithm that the library uses (``cluster.all_reduce``). Where a link's
directions differ, rings, meshes and servers use both at once and go at the pace of the slower one; a tree goes
towards its root in one direction and back in the other.

**Who shares what.** Links within a node belong to a pair of ranks; above the node level all ranks of a node share
one card per direction. A ring that visits the ranks node by node crosses each card once per direction, so sharing
costs it nothing, and its slowest hop sets the pace of every round. A mesh and the shards of a hierarchical
all-reduce cross a card many times at once, and their formulas say so. Each function gives the time on an otherwise
idle network; transfers that overlap are the simulator's matter. The arithmetic of a reduction is left out: it
overlaps the wire.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hybridpar.cluster.topology import Algorithm, Cluster, Collective, Level, Link
from hybridpar.errors import ClusterError

__all__ = [
    "Algorithm",
    "all_gather",
    "all_reduce",
    "broadcast",
    "point_to_point",
    "reduce_scatter",
    "wire_bytes_all_reduce",
]


@dataclass(frozen=True)
class _Crossing:
    """A level that a set of ranks crosses."""

    level: Level
    link: Link
    most: int
    """Members of the parent that has most of them: ranks of a node, nodes of a rack, racks of a site, sites."""
    least: int
    """Members of the parent that has fewest."""


@dataclass(frozen=True)
class _Span:
    """How a set of ranks spreads over the cluster."""

    ranks: tuple[int, ...]
    links: tuple[_Crossing, ...]
    """Narrowest first."""

    @property
    def count(self) -> int:
        return len(self.ranks)

    def slowest(self, payload_bytes: float) -> float:
        """Seconds of one message of ``payload_bytes`` over the slowest link crossed, in its slower direction."""
        return max((crossing.link.slower(payload_bytes) for crossing in self.links), default=0.0)


def _span(cluster: Cluster, ranks: Sequence[int], operation: Collective | None) -> _Span:
    """Find the levels that ``ranks`` cross, with the constants of ``operation``, or the link's own."""
    if not ranks:
        raise ClusterError("a collective needs at least one rank, got none")
    bad = [r for r in ranks if not 0 <= r < cluster.world]
    if bad or len(set(ranks)) != len(ranks):
        raise ClusterError(
            f"ranks {list(ranks)} do not fit cluster {cluster.name} of {cluster.world}: "
            "each must be given once and lie in the cluster"
        )
    per_node = Counter(cluster.node_of[r] for r in ranks)
    racks = Counter((cluster.nodes[i].site, cluster.nodes[i].rack) for i in per_node)
    sites = Counter(site for site, _ in racks)
    fans: tuple[tuple[Level, Collection[int]], ...] = (
        ("node", per_node.values()),
        ("rack", racks.values()),
        ("site", sites.values()),
        ("wan", (len(sites),)),
    )
    links = [_Crossing(level, cluster.link(level, operation), max(f), min(f)) for level, f in fans if max(f) > 1]
    return _Span(tuple(ranks), tuple(links))


def _outside(cluster: Cluster, ranks: Sequence[int]) -> dict[int, tuple[int, dict[Level, int]]]:
    """By node: how many of ``ranks`` it holds, and to how many it reaches only over a level, or one above it."""
    places = {i: (node.site, node.rack, i) for i, node in enumerate(cluster.nodes)}
    members: Counter[tuple[object, ...]] = Counter()
    for rank in ranks:
        place = places[cluster.node_of[rank]]
        members.update((place[:1], place[:2], place))
    n = len(ranks)
    return {
        i: (members[p], {"rack": n - members[p], "site": n - members[p[:2]], "wan": n - members[p[:1]]})
        for i, p in places.items()
        if members[p]
    }


def point_to_point(cluster: Cluster, source: int, destination: int, payload_bytes: float) -> float:
    """Seconds for one message: ``alpha + S / beta`` of the link between the two ranks, in its direction.

    A rank's message to itself takes no time: nothing is copied. Raises ClusterError for a rank that is not there.
    """
    for rank in (source, destination):
        if not 0 <= rank < cluster.world:
            raise ClusterError(f"rank {rank} is not in cluster {cluster.name}, which has {cluster.world}")
    if source == destination:
        return 0.0
    return cluster.link(cluster.level(source, destination)).time(payload_bytes, source > destination)


def wire_bytes_all_reduce(n: int, payload_bytes: float) -> float:
    """Bytes each rank sends in a ring all-reduce: ``2 (n-1)/n S``, the least possible (Patarasu & Yuan 2009)."""
    return 2 * (n - 1) / n * payload_bytes


def all_gather(cluster: Cluster, ranks: Sequence[int], payload_bytes_per_rank: float) -> float:
    """Seconds until each rank holds what every rank gave: ring, ``(n-1) (alpha + s / beta)``.

    ``payload_bytes_per_rank`` is s, what one rank gives (the largest, where they differ). Thakur et al. 2005.
    """
    span = _span(cluster, ranks, "all_gather")
    return (span.count - 1) * span.slowest(payload_bytes_per_rank)


def reduce_scatter(cluster: Cluster, ranks: Sequence[int], payload_bytes: float) -> float:
    """Seconds until each rank holds its share of the sum: ring, ``(n-1) (alpha + S / (n beta))``.

    ``payload_bytes`` is S, the whole vector that each rank gives. Thakur et al. 2005.
    """
    span = _span(cluster, ranks, "reduce_scatter")
    return (span.count - 1) * span.slowest(payload_bytes / span.count)


def broadcast(cluster: Cluster, ranks: Sequence[int], payload_bytes: float) -> float:
    """Seconds until all ranks hold what the first gave; the faster of the two ways of Thakur et al. 2005.

    Short messages go down a binomial tree, level by level: ``sum over levels of ceil(log2 f) (alpha + S / beta)``
    with the level's fan-out f. Long ones are scattered down a tree and gathered in a ring:
    ``ceil(log2 n) alpha + (n-1)/n S / beta + (n-1) (alpha + S / (n beta))``.
    With fitted constants on a level it is always the tree: they are fitted to it, whatever the library does.
    """
    span = _span(cluster, ranks, "broadcast")
    n = span.count
    if n == 1:
        return 0.0
    tree = _tree(span, payload_bytes)
    if any(crossing.link is not cluster.link(crossing.level) for crossing in span.links):
        return tree
    scatter = max(
        (math.ceil(math.log2(n)) - 1) * crossing.link.time(0) + crossing.link.time((n - 1) / n * payload_bytes)
        for crossing in span.links
    )
    return min(tree, scatter + (n - 1) * span.slowest(payload_bytes / n))


def all_reduce(
    cluster: Cluster, ranks: Sequence[int], payload_bytes: float, algorithm: Algorithm | None = None
) -> float:
    """Seconds until each of ``ranks`` holds the sum of the vectors of ``payload_bytes`` that each gave.

    ===============  =================================================================================
    ``ring``         ``2 (n-1) (alpha + S / (n beta))`` over the slowest link of the ring that visits the
                     ranks node by node; what gloo and NCCL use for large vectors
    ``tree``         binomial reduce and broadcast: ``2 sum over levels of ceil(log2 f) (alpha + S / beta)``
    ``hierarchical`` reduce-scatter on each level from the narrowest outward, and back with all-gathers
    ``mesh``         every rank sends each other rank its share at once, twice
    ``server``       every rank sends the whole vector to one, which sends the sum back (parameter server)
    ``best``         the fastest of ring, tree and hierarchical, which are those that libraries offer
    ===============  =================================================================================

    ``algorithm`` None is the cluster's. Raises ClusterError for an unknown algorithm and for ranks that are not in
    the cluster or given twice.
    """
    algorithm = cluster.all_reduce if algorithm is None else algorithm
    if algorithm == "best":
        return min(all_reduce(cluster, ranks, payload_bytes, a) for a in ("ring", "tree", "hierarchical"))
    span = _span(cluster, ranks, "all_reduce" if algorithm == cluster.all_reduce else None)
    if algorithm == "ring":
        return _ring(span, payload_bytes)
    if algorithm == "tree":
        return _tree(span, payload_bytes, reverse=True) + _tree(span, payload_bytes)
    if algorithm == "hierarchical":
        return _hierarchical(span, payload_bytes)
    if algorithm == "mesh":
        return 2 * _mesh_phase(cluster, span, payload_bytes)
    if algorithm == "server":
        return 2 * _server_phase(cluster, span, payload_bytes)
    raise ClusterError(
        f"all-reduce algorithm {algorithm!r} is unknown; use ring, tree, hierarchical, mesh, server or best"
    )


def _ring(span: _Span, payload_bytes: float) -> float:
    """``2 (n-1) (alpha + S / (n beta))``: a reduce-scatter and an all-gather in rounds of S/n bytes.

    Patarasu & Yuan 2009; Thakur et al. 2005 as "ring" with a reduce-scatter by pairwise exchange.
    """
    return 2 * (span.count - 1) * span.slowest(payload_bytes / span.count)


def _tree(span: _Span, payload_bytes: float, reverse: bool = False) -> float:
    """One way through a binomial tree that crosses each level once: ``sum of ceil(log2 f) (alpha + S / beta)``.

    The root is the lowest rank, so a reduction goes in reverse. Thakur et al. 2005, level by level as in
    N. Karonis et al., "Exploiting hierarchy in parallel computer networks to optimize collective operation
    performance", IPDPS 2000.
    """
    return sum(math.ceil(math.log2(c.most)) * c.link.time(payload_bytes, reverse) for c in span.links)


def _hierarchical(span: _Span, payload_bytes: float) -> float:
    """``2 sum over levels of (f-1) (alpha + s / (f beta))``, s being what still crosses the level.

    The g ranks of a node reduce-scatter to S/g bytes each. Their g rings between nodes share the card, which
    therefore carries S, not S/g. Each further level leaves 1/f of its bytes for the next, where the parent with
    the fewest members has most left per card. The two-level form stands in M. Cho, U. Finkler, D. Kung, H. Hunter,
    "BlueConnect: Decomposing all-reduce for deep learning on heterogeneous network hierarchy", MLSys 2019.
    """
    total, held = 0.0, payload_bytes
    for crossing in span.links:
        total += 2 * (crossing.most - 1) * crossing.link.slower(held / crossing.most)
        if crossing.level != "node":
            held /= crossing.least
    return total


def _mesh_phase(cluster: Cluster, span: _Span, payload_bytes: float) -> float:
    """One half of a mesh all-reduce: each rank sends S/n to each other rank at the same time.

    Within a node of g of the n ranks ``alpha + (g-1) S / (n beta)`` per rank. Above, its card carries
    ``g m S / n`` bytes to the m ranks that lie beyond the level: ``alpha + g m S / (n beta)``. The slowest level
    counts.
    """
    share = payload_bytes / span.count
    nodes = _outside(cluster, span.ranks).values()
    times = [0.0]
    for c in span.links:
        shares = c.most - 1 if c.level == "node" else max(held * beyond[c.level] for held, beyond in nodes)
        times.append(c.link.slower(shares * share))
    return max(times)


def _server_phase(cluster: Cluster, span: _Span, payload_bytes: float) -> float:
    """One half of a parameter-server step with the server on the first rank: its links carry S per worker.

    ``alpha + (g-1) S / beta`` from its own node's g ranks, ``alpha + m S / beta`` through its node's card from the
    m workers beyond a level. M. Li et al., "Scaling distributed machine learning with the parameter server",
    OSDI 2014, with one server and synchronous workers.
    """
    own, beyond = _outside(cluster, span.ranks)[cluster.node_of[span.ranks[0]]]
    times = [0.0]
    for c in span.links:
        workers = own - 1 if c.level == "node" else beyond[c.level]
        times.append(c.link.slower(workers * payload_bytes) if workers else 0.0)
    return max(times)
