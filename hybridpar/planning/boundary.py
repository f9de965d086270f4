"""What crosses between two neighbouring blocks, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, Side, block_side
from hybridpar.planning.layout import Layout, Transfer, exchange


@dataclass(frozen=True)
class Boundary:
    """The exchanges between a block and the next one; no gradient where nothing before it is trained.

    A pass that is ``summed`` is one all-reduce per micro-batch instead: every rank holds a summand of exactly what
    every rank wants.
    """

    activation: tuple[Transfer, ...]
    gradient: tuple[Transfer, ...]
    activation_summed: bool
    gradient_summed: bool

    def summed(self, content: str) -> bool:
        """Whether the pass that carries ``content`` (activation or gradient) is a sum."""
        return self.activation_summed if content == "activation" else self.gradient_summed


def boundaries(
    positions: tuple[Position, ...], blocks: tuple[Block, ...], chain: Chain, samples: int
) -> tuple[Boundary, ...]:
    """Return the boundary behind every block but the last, for a step of ``samples``."""
    return tuple(
        _between(
            block_side(before, positions[before.position], chain, "out"),
            block_side(after, positions[after.position], chain, "in"),
            samples,
            after.answers,
        )
        for before, after in pairwise(blocks)
    )


@lru_cache(maxsize=1024)
def _between(before: Side, after: Side, samples: int, both_ways: bool) -> Boundary:
    """Return a boundary. Plans that differ elsewhere share it, and so do blocks of one position."""
    (out, out_gradient), (enter, enter_gradient) = before.layouts(samples), after.layouts(samples)
    if not both_ways:
        return Boundary(exchange(out, enter), (), _is_sum(out, enter), gradient_summed=False)
    return Boundary(
        exchange(out, enter),
        exchange(enter_gradient, out_gradient),
        _is_sum(out, enter),
        _is_sum(enter_gradient, out_gradient),
    )


def _is_sum(source: Layout, target: Layout) -> bool:
    return source.partial and not target.partial and set(source.pieces) == set(target.pieces)
