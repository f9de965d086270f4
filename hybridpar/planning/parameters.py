"""Parameters: how many elements of them, and of their gradients, lie where."""

from __future__ import annotations

from functools import lru_cache

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position
from hybridpar.planning.layout import Interval, length
from hybridpar.planning.plan import Plan


def is_zero(plan: Plan, position: Position) -> bool:
    """Whether DeepSpeed shards the optimizer state of this position."""
    return plan.recipe.sharding == "zero1" and position.kind == "front" and position.replicated


@lru_cache(maxsize=4096)
def parameter_count(chain: Chain, layers: Interval) -> int:
    """Return the number of distinct parameter elements in a run of layers."""
    own = {p.name: p.count for layer in chain.layers[layers[0] : layers[1]] for p in layer.parameters}
    return sum(own.values())


def bucket_count(chain: Chain, position: Position, block: Block) -> int:
    """Return the number of gradient elements that a block's bucket holds.

    A parameter that several layers share belongs to the first of them, whose backward completes its gradient.
    """
    first = position.layers[0]
    before, after = (first, block.layers[0]), (first, block.layers[1])
    return parameter_count(chain, after) - parameter_count(chain, before)


def bucket_elements(chain: Chain, position: Position, block: Block, rank: int) -> int:
    """Return the number of parameter elements that a block has on one of its ranks."""
    if not block.spans:
        return bucket_count(chain, position, block)
    shard, total = position.ranks.index(rank), 0
    for span, layer in zip(block.spans[shard], chain.layers[slice(*block.layers)], strict=False):
        if layer.linear is None:
            continue
        rows, columns, bias = layer.linear.out_features, layer.linear.in_features, layer.linear.bias
        if span.mode == "column":
            total += length(span.outputs) * (columns + bias)
        else:
            total += length(span.inputs) * rows + rows * bias * (shard == 0)
    return total
