"""Time of communication over a cluster's links: point to point and collectives.

Notation: n ranks, S payload bytes, and a link of latency alpha (s) and bandwidth beta (bytes/s).

Sources:

- R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH",
  Int. J. High Performance Computing Applications 19(1), 2005: ring, binomial tree, scatter + all-gather broadcast.
- P. Patarasu, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
  J. Parallel and Distributed Computing 69(2), 2009: the ring's 2 (n-1)/n S bytes per rank are the least possible,
  and on a tree of switches the ring that visits the ranks node by node reaches them.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hybridpar.cluster.topology import Cluster, Level, Link
from hybridpar.errors import ClusterError

Algorithm = Literal["ring", "tree", "hierarchical", "mesh", "server", "best"]


@dataclass(frozen=True)
class _Span:
    """How a set of ranks spreads over the cluster: at every level crossed, its link and the largest fan-out."""

    count: int
    links: tuple[tuple[Level, Link, int], ...]
    """Narrowest first: (level, its link, the most members of one parent: ranks of a node, nodes of a rack...)."""
    ranks_per_node: tuple[int, ...]
    """Members on each node; the first entry is the node of the first rank."""

    def slowest(self, payload_bytes: float) -> float:
        """Seconds of one message of ``payload_bytes`` over the slowest link crossed."""
        return max((link.time(payload_bytes) for _, link, _ in self.links), default=0.0)


def _span(cluster: Cluster, ranks: Sequence[int]) -> _Span:
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
    fans: tuple[tuple[Level, int], ...] = (
        ("node", max(per_node.values())),
        ("rack", max(racks.values())),
        ("site", max(sites.values())),
        ("wan", len(sites)),
    )
    links = tuple((level, cluster.link(level), fan) for level, fan in fans if fan > 1)
    return _Span(len(ranks), links, tuple(per_node.values()))


def point_to_point(cluster: Cluster, source: int, destination: int, payload_bytes: float) -> float:
    """Seconds for one message: ``alpha + S / beta`` of the link between the two ranks.

    A rank's message to itself takes no time: nothing is copied. Raises ClusterError for a rank that is not there.
    """
    for rank in (source, destination):
        if not 0 <= rank < cluster.world:
            raise ClusterError(f"rank {rank} is not in cluster {cluster.name}, which has {cluster.world}")
    if source == destination:
        return 0.0
    return cluster.link(cluster.level(source, destination)).time(payload_bytes)


def wire_bytes_all_reduce(n: int, payload_bytes: float) -> float:
    """Bytes each rank sends in a ring all-reduce: ``2 (n-1)/n S``, the least possible (Patarasu & Yuan 2009)."""
    return 2 * (n - 1) / n * payload_bytes


def all_gather(cluster: Cluster, ranks: Sequence[int], payload_bytes_per_rank: float) -> float:
    """Seconds until each rank holds what every rank gave: ring, ``(n-1) (alpha + s / beta)``.

    ``payload_bytes_per_rank`` is s, what one rank gives (the largest, where they differ). Thakur et al. 2005.
    """
    span = _span(cluster, ranks)
    return (span.count - 1) * span.slowest(payload_bytes_per_rank)


def reduce_scatter(cluster: Cluster, ranks: Sequence[int], payload_bytes: float) -> float:
    """Seconds until each rank holds its share of the sum: ring, ``(n-1) (alpha + S / (n beta))``.

    ``payload_bytes`` is S, the whole vector that each rank gives. Thakur et al. 2005.
    """
    span = _span(cluster, ranks)
    return (span.count - 1) * span.slowest(payload_bytes / span.count)


def broadcast(cluster: Cluster, ranks: Sequence[int], payload_bytes: float) -> float:
    """Seconds until all ranks hold what one gave; the faster of the two ways of Thakur et al. 2005.

    Short messages go down a binomial tree, level by level: ``sum over levels of ceil(log2 f) (alpha + S / beta)``
    with the level's fan-out f. Long ones are scattered down a tree and gathered in a ring:
    ``ceil(log2 n) alpha + (n-1)/n S / beta + (n-1) (alpha + S / (n beta))``.
    """
    span = _span(cluster, ranks)
    n = span.count
    if n == 1:
        return 0.0
    rounds = math.ceil(math.log2(n))
    scatter = max(
        rounds * link.latency_s + (n - 1) / n * payload_bytes / link.bytes_per_s for _, link, _ in span.links
    )
    return min(_tree(span, payload_bytes), scatter + (n - 1) * span.slowest(payload_bytes / n))


def all_reduce(
    cluster: Cluster, ranks: Sequence[int], payload_bytes: float, algorithm: Algorithm = "ring"
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

    Raises ClusterError for an unknown algorithm and for ranks that are not in the cluster or given twice.
    """
    span = _span(cluster, ranks)
    if algorithm == "ring":
        return _ring(span, payload_bytes)
    if algorithm == "tree":
        return 2 * _tree(span, payload_bytes)
    if algorithm == "hierarchical":
        return _hierarchical(span, payload_bytes)
    if algorithm == "mesh":
        return 2 * _mesh_phase(span, payload_bytes)
    if algorithm == "server":
        return 2 * _server_phase(span, payload_bytes)
    if algorithm == "best":
        return min(f(span, payload_bytes) for f in (_ring, _hierarchical, lambda s, p: 2 * _tree(s, p)))
    raise ClusterError(
        f"all-reduce algorithm {algorithm!r} is unknown; use ring, tree, hierarchical, mesh, server or best"
    )


def _ring(span: _Span, payload_bytes: float) -> float:
    """``2 (n-1) (alpha + S / (n beta))``: a reduce-scatter and an all-gather in rounds of S/n bytes."""
    return 2 * (span.count - 1) * span.slowest(payload_bytes / span.count)


def _tree(span: _Span, payload_bytes: float) -> float:
    """One way through a binomial tree that crosses each level once: ``sum of ceil(log2 f) (alpha + S / beta)``."""
    return sum(math.ceil(math.log2(fan)) * link.time(payload_bytes) for _, link, fan in span.links)


def _hierarchical(span: _Span, payload_bytes: float) -> float:
    """``2 sum over levels of (f-1) (alpha + s / (f beta))``, s being what still crosses the level.

    The g ranks of a node reduce-scatter to S/g bytes each. Their g rings between nodes share the card, which
    therefore carries S, not S/g; each further level leaves 1/f of its bytes for the next.
    """
    total, held = 0.0, payload_bytes
    for level, link, fan in span.links:
        total += 2 * (fan - 1) * link.time(held / fan)
        if level != "node":
            held /= fan
    return total


def _mesh_phase(span: _Span, payload_bytes: float) -> float:
    """One half of a mesh all-reduce: each rank sends S/n to each other rank at the same time.

    Within a node ``alpha + (g-1) S / (n beta)`` per rank; the card of a node with g of the n ranks carries
    ``g (n-g) S / n`` bytes: ``alpha + g (n-g) S / (n beta)`` over the widest link.
    """
    share = payload_bytes / span.count
    times = [0.0]
    for level, link, fan in span.links:
        crossing = fan - 1 if level == "node" else max(g * (span.count - g) for g in span.ranks_per_node)
        times.append(link.time(crossing * share))
    return max(times)


def _server_phase(span: _Span, payload_bytes: float) -> float:
    """One half of a parameter-server step with the server on the first rank: its links carry S per worker.

    ``alpha + (g-1) S / beta`` from its own node's g ranks, ``alpha + (n-g) S / beta`` through its node's card.
    """
    own = span.ranks_per_node[0]
    times = [0.0]
    for level, link, _ in span.links:
        workers = own - 1 if level == "node" else span.count - own
        times.append(link.time(workers * payload_bytes) if workers else 0.0)
    return max(times)
