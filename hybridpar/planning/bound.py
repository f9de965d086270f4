"""A lower bound of a plan's step time that needs no program: what its ranks and communicators must do anyway."""

from __future__ import annotations

from collections import Counter, defaultdict

from hybridpar.cluster.collectives import all_reduce
from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, blocks, positions
from hybridpar.planning.costs import Costs
from hybridpar.planning.layout import length
from hybridpar.planning.parameters import bucket_count, is_zero
from hybridpar.planning.plan import Plan


def lower_bound(plan: Plan, chain: Chain, costs: Costs) -> float:
    """Return seconds that no order of the plan's step can beat.

    The largest of: the passes and updates of the busiest rank; those of all ranks of a node over its cores; and
    the gradient reductions of one communicator, which follow each other.
    """
    work: dict[int, float] = defaultdict(float)
    reductions = 0.0
    places = positions(plan)
    own: dict[int, list[Block]] = defaultdict(list)
    for block in blocks(plan, chain):
        own[block.position].append(block)
    for position in places:
        for index, rank in enumerate(position.ranks):
            work[rank] += _rank_time(plan, chain, position, own[position.index], index, costs)
        if position.replicated and not is_zero(plan, position):
            sizes = [bucket_count(chain, position, b) * plan.itemsize for b in own[position.index]]
            times = [all_reduce(costs.cluster, position.ranks, s) for s in sizes if s]
            reductions = max(reductions, sum(times))
    node: dict[int, float] = defaultdict(float)
    for rank, seconds in work.items():
        node[costs.cluster.node_of[rank]] += seconds
    shared = (t / (costs.cluster.nodes[n].cores or float("inf")) for n, t in node.items())
    return max(*work.values(), reductions, max(shared, default=0.0))


def _rank_time(plan: Plan, chain: Chain, position: Position, own: list[Block], index: int, costs: Costs) -> float:
    """Seconds of one rank's passes and update for a position."""
    sizes = Counter(length(m[index]) for m in position.micro_batches(plan.global_batch))
    passes = sum(
        count
        * (
            costs.passes(chain, block, index, size, "forward")
            + costs.passes(chain, block, index, size, "backward")
        )
        for size, count in sizes.items()
        if size
        for block in own
    )
    if is_zero(plan, position):
        return passes
    return passes + costs.update(chain, plan.itemsize, own, index)
