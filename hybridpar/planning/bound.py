"""A lower bound of a plan's step time that needs no program: what its ranks and communicators must do anyway."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, blocks_of, positions
from hybridpar.planning.costs import Costs
from hybridpar.planning.parameters import reduction_of
from hybridpar.planning.plan import Plan
from hybridpar.planning.zero import is_zero, part_elements, rounds


class Share(NamedTuple):
    """What a position adds to the bound."""

    work: tuple[float, ...]
    """Seconds of its passes and updates, by its ranks."""
    path: float
    """Seconds of the quickest micro-batch on any of them."""
    reductions: float
    """Seconds of the gradient reductions of its first rank."""


class Bounds:
    """Lower bounds of plans of one chain, whose positions are priced once."""

    def __init__(self, chain: Chain, costs: Costs) -> None:
        self.chain, self.costs = chain, costs
        self._shares: dict[tuple[object, ...], Share] = {}

    def of(self, plan: Plan) -> float:
        """Return seconds that no order of the plan's step can beat.

        The largest of: the passes and updates of the busiest rank; those of all ranks of a node over its cores;
        the gradient reductions of one communicator, which follow each other; and the way of one sample through all
        positions and back, since the next step's first forward waits for its gradients.
        """
        work: dict[int, float] = defaultdict(float)
        reductions = path = 0.0
        for position in positions(plan):
            share = self._share(plan, position)
            for rank, seconds in zip(position.ranks, share.work, strict=True):
                work[rank] += seconds
            path += share.path
            reductions = max(reductions, share.reductions)
        return max(*work.values(), path, reductions, self._shared_cores(plan, work))

    def _share(self, plan: Plan, position: Position) -> Share:
        sharding = plan.stages[position.stage].sharding
        numbers = plan.world, plan.replica_batch, plan.bucket_bytes, plan.itemsize, position.micro_batch
        zero = is_zero(plan, position) and plan.recipe.sharding
        flags = position.recompute, zero, position.copies, plan.recipe.compression
        key = (position.kind, position.layers, position.ranks, position.weights, sharding, numbers, flags)
        if key not in self._shares:
            self._shares[key] = self._priced(plan, position)
        return self._shares[key]

    def _priced(self, plan: Plan, position: Position) -> Share:
        chain, costs, zero = self.chain, self.costs, is_zero(plan, position)
        own = list(blocks_of(position, plan, chain))
        passes = _Passes(plan, chain, position, own, costs)
        work, quickest = [], float("inf")
        for index, rank in enumerate(position.ranks):
            speed = costs.speed(plan, rank)
            total, least = passes.of(index)
            if not zero:
                total += costs.update(plan, chain, own, index)
                total += sum(sum(costs.compression(plan, chain, position, b, rank).values()) for b in own)
            work.append(total / speed)
            quickest = min(quickest, least / speed)
        reductions = 0.0
        if position.reduced:
            rank, kind = position.ranks[0], "reduce_scatter" if zero else "all_reduce"
            everyone = plan.everywhere(position.sharers(rank))
            summed = (reduction_of(plan, chain, position, b, rank).all_sums(plan.itemsize) for b in own)
            reductions = sum(costs.wire(kind, everyone, size) for sizes in summed for size in sizes)
            reductions *= rounds(plan, position, plan.replica_batch)
            if zero:
                part = part_elements(plan, chain, position) * plan.itemsize
                reductions += costs.wire("sharded_update", everyone, part)
        return Share(tuple(work), quickest, reductions)

    def _shared_cores(self, plan: Plan, work: dict[int, float]) -> float:
        """Seconds of the busiest node's cores for the ranks of all plan replicas on it."""
        nodes, node_of = self.costs.cluster.nodes, self.costs.cluster.node_of
        if all(node.cores is None for node in nodes):
            return 0.0
        busy: dict[int, float] = defaultdict(float)
        for rank, seconds in work.items():
            for place in plan.everywhere((rank,)):
                busy[node_of[place]] += seconds
        return max((t / (nodes[n].cores or float("inf")) for n, t in busy.items()), default=0.0)


class _Passes:
    """Forward and backward of a position's micro-batches; replicas with equal ones are priced once."""

    def __init__(self, plan: Plan, chain: Chain, position: Position, own: list[Block], costs: Costs) -> None:
        self.plan, self.chain, self.position, self.own, self.costs = plan, chain, position, own, costs
        self.micro_batches = position.micro_batches(plan.replica_batch)
        self.known: dict[tuple[int | None, tuple[int, ...]], tuple[float, float]] = {}

    def of(self, index: int) -> tuple[float, float]:
        """Return the seconds of all micro-batches of the position's rank number ``index``, and of the quickest."""
        sizes = tuple(sorted(m[index][1] - m[index][0] for m in self.micro_batches))
        key = (index if self.position.sharded else None, sizes)
        if key not in self.known:
            counts = Counter(size for size in sizes if size)
            each = {size: self._seconds(index, size) for size in counts}
            fresh = 0.0
            if counts:
                backward = (b for b in self.own if b.backward)
                fresh = sum(self.costs.fresh(self.plan, self.chain, self.position, b, index) for b in backward)
            total = sum(count * each[size] for size, count in counts.items())
            self.known[key] = total - fresh, min(each.values(), default=fresh) - fresh
        return self.known[key]

    def _seconds(self, index: int, size: int) -> float:
        return sum(
            self.costs.passes(self.chain, block, index, size, kind)
            for block in self.own
            for kind in ("forward", "backward")[: 1 + block.backward]
        )
