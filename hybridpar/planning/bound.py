"""A lower bound of a plan's step time that needs no program: what its ranks and communicators must do anyway."""

from __future__ import annotations

from collections import Counter, defaultdict

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, blocks, positions
from hybridpar.planning.costs import Costs
from hybridpar.planning.parameters import bucket_elements, is_zero
from hybridpar.planning.plan import Plan


def lower_bound(plan: Plan, chain: Chain, costs: Costs) -> float:
    """Return seconds that no order of the plan's step can beat.

    The largest of: the passes and updates of the busiest rank; those of all ranks of a node over its cores; the
    gradient reductions of one communicator, which follow each other; and the way of one sample through all
    positions and back, since the next step's first forward waits for its gradients.
    """
    work: dict[int, float] = defaultdict(float)
    reductions = path = 0.0
    own: dict[int, list[Block]] = defaultdict(list)
    for block in blocks(plan, chain):
        own[block.position].append(block)
    for position in positions(plan):
        passes = _Passes(chain, position, own[position.index], plan.replica_batch, costs)
        quickest = float("inf")
        for index, rank in enumerate(position.ranks):
            speed = costs.speed(plan, rank)
            total, least = passes.of(index)
            if not is_zero(plan, position):
                total += costs.update(chain, plan.itemsize, own[position.index], index)
            work[rank] += total / speed
            quickest = min(quickest, least / speed)
        path += quickest
        if position.reduced and not is_zero(plan, position):
            rank = position.ranks[0]
            everyone = plan.everywhere(position.sharers(rank))
            sizes = [bucket_elements(chain, position, b, rank) * plan.itemsize for b in own[position.index]]
            reductions = max(reductions, sum(costs.wire("all_reduce", everyone, s) for s in sizes if s))
    return max(*work.values(), path, reductions, _shared_cores(plan, work, costs))


def _shared_cores(plan: Plan, work: dict[int, float], costs: Costs) -> float:
    """Seconds of the busiest node's cores for the ranks of all plan replicas on it."""
    node: dict[int, float] = defaultdict(float)
    for rank, seconds in work.items():
        for place in plan.everywhere((rank,)):
            node[costs.cluster.node_of[place]] += seconds
    return max((t / (costs.cluster.nodes[n].cores or float("inf")) for n, t in node.items()), default=0.0)


class _Passes:
    """Forward and backward of a position's micro-batches; replicas with equal ones are priced once."""

    def __init__(self, chain: Chain, position: Position, own: list[Block], samples: int, costs: Costs) -> None:
        self.chain, self.position, self.own, self.costs = chain, position, own, costs
        self.micro_batches = position.micro_batches(samples)
        self.known: dict[tuple[int | None, tuple[int, ...]], tuple[float, float]] = {}

    def of(self, index: int) -> tuple[float, float]:
        """Return the seconds of all micro-batches of the position's rank number ``index``, and of the quickest."""
        sizes = tuple(sorted(m[index][1] - m[index][0] for m in self.micro_batches))
        key = (index if self.position.sharded else None, sizes)
        if key not in self.known:
            counts = Counter(size for size in sizes if size)
            each = {size: self._seconds(index, size) for size in counts}
            fresh = 0.0
            if not self.position.reduced:
                fresh = sum(self.costs.accumulation(self.chain, block, index) for block in self.own)
            total = sum(count * each[size] for size, count in counts.items())
            self.known[key] = total - fresh, min(each.values(), default=fresh) - fresh
        return self.known[key]

    def _seconds(self, index: int, size: int) -> float:
        return sum(
            self.costs.passes(self.chain, block, index, size, kind)
            for block in self.own
            for kind in ("forward", "backward")
        )
