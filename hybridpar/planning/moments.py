"""Moments: what the synchronised batch norms of a block tell each other within a computation.

A residual block is one layer, so that most norms lie inside of layers, where no block can end. Their operations
stand in the program directly behind the forward or backward in which they happen, each start with its wait, in the
order in which the norms are called (backward: the other way round, as autograd runs last what came first). The
computation runs into them; it goes on when they are through.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from hybridpar.model.chain import Chain, Norm
from hybridpar.planning.blocks import Block, Position
from hybridpar.planning.layout import Interval


class Call(NamedTuple):
    """A call of a norm within a computation, for which the position's ranks meet."""

    number: int
    """In the block, in the order of the forward."""
    norm: Norm


def norms_of(block: Block, chain: Chain) -> tuple[Norm, ...]:
    """Return the synchronised batch norms of a block in the order of their calls."""
    return _norms(block.layers, chain)


@lru_cache(maxsize=4096)
def _norms(layers: Interval, chain: Chain) -> tuple[Norm, ...]:
    return tuple(norm for layer in chain.layers[slice(*layers)] for norm in layer.norms)


def meets(position: Position, block: Block, chain: Chain) -> bool:
    """Whether the ranks of a position compute a block's chunks together in training."""
    return position.meets and bool(norms_of(block, chain))


def calls(position: Position, block: Block, chain: Chain, *, backward: bool) -> Iterator[Call]:
    """Yield the calls of norms in a block's forward or backward for which ranks meet, in their order.

    A forward that runs again has none: it gets what the first one got. A backward has those whose input wants a
    gradient.
    """
    if not position.meets or (backward and not block.backward):
        return
    every = [Call(number, norm) for number, norm in enumerate(norms_of(block, chain))]
    yield from (call for call in every[::-1] if call.norm.answers) if backward else every
