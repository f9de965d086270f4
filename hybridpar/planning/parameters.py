"""Parameters: how many elements of them, and of their gradients, lie where."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, Span
from hybridpar.planning.compression import Compression, Reduction
from hybridpar.planning.layout import Interval, length
from hybridpar.planning.plan import Plan


@lru_cache(maxsize=4096)
def parameter_count(chain: Chain, layers: Interval, *, trained: bool = False) -> int:
    """Return the number of distinct parameter elements in a run of layers, or of those that are trained."""
    left_out = set(chain.frozen) if trained else ()
    own = {p.name: p.count for layer in chain.layers[layers[0] : layers[1]] for p in layer.parameters}
    return sum(count for name, count in own.items() if name not in left_out)


def held_elements(chain: Chain, position: Position, block: Block, rank: int) -> int:
    """Return the number of parameter elements that a block has on one of its ranks, frozen ones included."""
    return _elements(chain, position, block, rank, trained=False)


def bucket_elements(chain: Chain, position: Position, block: Block, rank: int) -> int:
    """Return the number of gradient elements that a block has on one of its ranks; a bucket holds them.

    A parameter that several layers share belongs to the first of them, whose backward completes its gradient.
    """
    return _elements(chain, position, block, rank, trained=True)


def reduction_of(plan: Plan, chain: Chain, position: Position, block: Block, rank: int) -> Reduction:
    """Return how the gradients that a block has on one of its ranks are summed, if they are."""
    elements = bucket_elements(chain, position, block, rank)
    compression = plan.recipe.compression
    if compression is None or not position.reduced:
        return Reduction(elements)
    first, spans = position.layers[0], tuple[Span, ...]()
    if block.spans:
        first, spans = block.layers[0], block.spans[position.ranks.index(rank)]
    return replace(
        _compressed(compression, chain, first, block.layers, spans, elements), undone=plan.recipe.scaling
    )


@lru_cache(maxsize=4096)
def _compressed(
    compression: Compression, chain: Chain, first: int, layers: Interval, spans: tuple[Span, ...], elements: int
) -> Reduction:
    """Find the matrices among the trained parameters of some layers that no layer from ``first`` on has before."""
    left_out = set(chain.frozen) | {p.name for layer in chain.layers[first : layers[0]] for p in layer.parameters}
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(*layers):
        for p in chain.layers[i].parameters:
            shapes.setdefault(p.name, _sliced(p.shape, spans[i - layers[0]]) if spans else p.shape)
    found = (compression.matrix(shape) for name, shape in shapes.items() if name not in left_out)
    return Reduction(elements, compression, tuple(m for m in found if m is not None))


def _sliced(shape: tuple[int, ...], span: Span) -> tuple[int, ...]:
    """Return the shape of a shard's slice of a linear layer's weight; a bias is no matrix, whatever its slice."""
    if len(shape) != 2:
        return shape
    return (length(span.outputs), shape[1]) if span.mode == "column" else (shape[0], length(span.inputs))


def _elements(chain: Chain, position: Position, block: Block, rank: int, *, trained: bool) -> int:
    if not block.spans:
        first = position.layers[0]
        before, after = (first, block.layers[0]), (first, block.layers[1])
        return parameter_count(chain, after, trained=trained) - parameter_count(chain, before, trained=trained)
    left_out = set(chain.frozen) if trained else set[str]()
    shard, total = position.ranks.index(rank), 0
    for span, layer in zip(block.spans[shard], chain.layers[slice(*block.layers)], strict=False):
        if layer.linear is None:
            continue
        names = [p.name for p in layer.parameters]
        columns = layer.linear.in_features * (names[0] not in left_out)
        bias = layer.linear.bias and names[-1] not in left_out
        rows = layer.linear.out_features
        if span.mode == "column":
            total += length(span.outputs) * (columns + bias)
        else:
            total += length(span.inputs) * rows * (columns > 0) + rows * bias * (shard == 0)
    return total
