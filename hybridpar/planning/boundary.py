"""What crosses between two neighbouring blocks, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, block_layouts
from hybridpar.planning.layout import Layout, Transfer, exchange


@dataclass(frozen=True)
class Boundary:
    """The exchanges between a block and the next one.

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
    result = []
    for before, after in pairwise(blocks):
        out, out_gradient = block_layouts(before, positions[before.position], chain, samples, "out")
        enter, enter_gradient = block_layouts(after, positions[after.position], chain, samples, "in")
        result.append(
            Boundary(
                exchange(out, enter),
                exchange(enter_gradient, out_gradient),
                _is_sum(out, enter),
                _is_sum(enter_gradient, out_gradient),
            )
        )
    return tuple(result)


def _is_sum(source: Layout, target: Layout) -> bool:
    return source.partial and not target.partial and set(source.pieces) == set(target.pieces)
