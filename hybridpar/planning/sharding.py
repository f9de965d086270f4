"""Which way to shard a tail's linears: the sequence of columns and rows that moves fewest bytes.

With d shards and w features of w' bytes per sample between two linears, a rank sends per sample and direction

    column, row      nothing: the slice that one gives is the one that the other takes
    row, column      2 (d-1)/d w'   (an all-reduce of summands)
    row, row         (d-1)/d w'     (a reduce-scatter forward, an all-gather backward)
    column, column   (d-1)/d w'     (an all-gather forward, a reduce-scatter backward)
    row, loss        (d-1)/d w'     (the loss takes a slice of the classes)

and to enter the tail, all features for a column and 1/d of them for a row. (Megatron-LM, Shoeybi et al. 2019, is
the sequence column, row; the others follow from the layouts of :mod:`hybridpar.planning.blocks`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from hybridpar.model.chain import Chain
from hybridpar.planning.request import Mode

MOST_FREE = 6
"""Linears of which all sequences are compared; of more, those that alternate."""


@dataclass(frozen=True)
class Sharded:
    """A sequence with what it moves, in elements per sample, direction and shard."""

    modes: tuple[Mode, ...]
    entering: float
    """Of the value that enters the tail, counted before what already lies where it goes."""
    inside: float
    sums: int
    """Communications inside, per micro-batch and direction."""


def ways(chain: Chain, start: int, allowed: Sequence[Mode], *, sampled: bool = False) -> list[tuple[Mode, ...]]:
    """Return, for every linear of a tail that starts at a layer, the modes that it can have of those allowed.

    One that is normalised has columns, whatever is allowed: it needs all features of its input. So does a head
    whose classes are sampled.
    """
    linears = [layer.linear for layer in chain.layers[start:] if layer.linear]
    found = [("column",) if linear.normalized else tuple(allowed) for linear in linears]
    return [*found[:-1], ("column",)] if sampled else found


def best_sharding(
    chain: Chain, start: int, shards: int, allowed: Sequence[Mode], *, sampled: bool = False
) -> Sharded:
    """Return the sequence for a tail that starts at a layer, by bytes and then by the number of communications."""
    widths = [layer.out_elements for layer in chain.layers[start:] if layer.linear]
    entering = chain.layers[start].in_elements
    free = ways(chain, start, allowed, sampled=sampled)
    if len(widths) <= MOST_FREE:
        sequences = list(product(*free))
    else:
        turns = range(len(allowed))
        sequences = [tuple(own[(i + k) % len(own)] for i, own in enumerate(free)) for k in turns]
    found = [_priced(modes, entering, widths, shards) for modes in sequences]
    return min(found, key=lambda s: (s.entering + s.inside, s.sums))


def _priced(modes: tuple[Mode, ...], entering: int, widths: list[int], shards: int) -> Sharded:
    part = (shards - 1) / shards
    inside, sums = 0.0, 0
    for i, width in enumerate(widths):
        following = modes[i + 1] if i + 1 < len(modes) else "loss"
        passes = {("row", "column"): 2, ("row", "row"): 1, ("column", "column"): 1, ("row", "loss"): 1}
        times = passes.get((modes[i], following), 0)
        inside += times * part * width
        sums += times > 0
    return Sharded(modes, entering * (1.0 if modes[0] == "column" else 1.0 / shards), inside, sums)
