"""ZeRO: which positions shard their optimizer's state, into which parts, and how often they reduce gradients.

The trained parameters of such a position are thought flat, one after the other, padded and cut into equal parts,
one for every rank that holds them, of all plan replicas. A rank keeps the optimizer's state, and the reduced
gradients, of its own part only (Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter
models", SC 2020: stage 1 is the state, stage 2 the gradients too). Under stage 1 gradients gather in a bucket that
stays, and are reduced once. Under stage 2 a bucket lives until it is reduced, and where a rank has several
micro-batches that happens in several rounds.
"""

from __future__ import annotations

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position
from hybridpar.planning.layout import length
from hybridpar.planning.parameters import bucket_elements, parameter_count
from hybridpar.planning.plan import Plan

ALIGNMENT = 2
"""DeepSpeed makes every part a multiple of so many elements."""


def is_zero(plan: Plan, position: Position) -> bool:
    """Whether the optimizer's state of this position is sharded over those who hold its parameters.

    A tail is sharded already; its state stays whole where plan replicas repeat it.
    """
    return plan.recipe.sharding != "none" and position.kind != "tail" and position.reduced


def keeps_no_bucket(plan: Plan, position: Position) -> bool:
    """Whether whole gradients of this position go when they are reduced."""
    return plan.recipe.sharding == "zero2" and is_zero(plan, position)


def sharing(plan: Plan, position: Position) -> int:
    """Return the number of ranks, of all plan replicas, that share out a position's state."""
    return len(position.ranks) * plan.replicas


def part_elements(plan: Plan, chain: Chain, position: Position) -> int:
    """Return the elements of every rank's part, padding included."""
    unit = ALIGNMENT * sharing(plan, position)
    return -(-parameter_count(chain, position.layers, trained=True) // unit) * ALIGNMENT


def piece_elements(plan: Plan, chain: Chain, position: Position, block: Block, rank: int) -> int:
    """Return how many gradient elements of a block lie in the part of a rank of the first plan replica."""
    part, index = part_elements(plan, chain, position), position.ranks.index(rank)
    start = parameter_count(chain, (position.layers[0], block.layers[0]), trained=True)
    stop = start + bucket_elements(chain, position, block, rank)
    return max(0, min(stop, (index + 1) * part) - max(start, index * part))


def rounds(plan: Plan, position: Position, samples: int) -> int:
    """Return how often a position reduces its gradients in a step of ``samples`` on the plan replica.

    Stage 2 does so as often as the rank with the fewest micro-batches can; between plan replicas, whose numbers of
    micro-batches differ, once. A rank without samples joins in all of them.
    """
    if not keeps_no_bucket(plan, position) or plan.replicas > 1:
        return 1
    chunks = position.micro_batches(samples)
    calls = [sum(length(chunk[i]) > 0 for chunk in chunks) for i in range(len(position.ranks))]
    return min((n for n in calls if n), default=1)


def calls_until(calls: int, count: int, number: int) -> int:
    """Return after how many of a rank's ``calls`` micro-batches round ``number`` of ``count`` is complete."""
    return -(-(number + 1) * calls // count)
