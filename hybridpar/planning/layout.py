"""Layouts: which rank holds which samples and features of a value, and the exchange between two layouts.

A value crosses a point of the chain as a tensor with samples in dim 0 and features in another one, which the
chain names (``Chain.axes``): (samples, features, height, width) or (samples, tokens, features). A layout cuts the
plane of samples x features into pieces. One function, :func:`exchange`, turns any layout into any other by
intersecting intervals; equal and unequal shares, ragged micro-batches, different rank counts and sharded features
are all the same case.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

Interval = tuple[int, int]
"""Half-open: (start, stop)."""


def length(interval: Interval) -> int:
    """Return the number of points in an interval."""
    return interval[1] - interval[0]


def intersect(a: Interval, b: Interval) -> Interval:
    """Return the common part of two intervals; it has length 0 or less where there is none."""
    return max(a[0], b[0]), min(a[1], b[1])


@lru_cache(maxsize=65536)
def split(total: int, shares: tuple[float, ...]) -> tuple[Interval, ...]:
    """Cut ``range(total)`` into consecutive intervals in proportion to ``shares`` (largest remainder).

    Equal shares differ by at most one, the first ones being larger.
    """
    weights = [Fraction(s) for s in shares]
    whole = sum(weights)
    exact = [total * w / whole for w in weights]
    sizes = [int(e) for e in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple((stop - size, stop) for stop, size in zip(stops, sizes, strict=True))


@lru_cache(maxsize=8192)
def chunks(samples: int, micro_batch: int, shares: tuple[float, ...]) -> tuple[tuple[Interval, ...], ...]:
    """Cut ``range(samples)`` into chunks, and each chunk into one interval per replica.

    The interval of a replica in a chunk is its micro-batch; the largest one has ``micro_batch`` samples. Chunks
    follow each other in the order in which the replicas finish them. A ragged last chunk is shared out like the
    others, so intervals may be empty there.
    """
    chunk = max(int(micro_batch * sum(map(Fraction, shares)) / max(map(Fraction, shares))), 1)
    result = []
    for start in range(0, samples, chunk):
        pieces = split(min(chunk, samples - start), shares)
        result.append(tuple((start + a, start + b) for a, b in pieces))
    return tuple(result)


class Piece(NamedTuple):
    """What one rank holds of a value in one of its micro-batches."""

    rank: int
    micro_batch: int
    samples: Interval
    features: Interval


@dataclass(frozen=True)
class Layout:
    """All non-empty pieces of a value over a step. In a partial layout overlapping pieces are summands."""

    pieces: tuple[Piece, ...]
    partial: bool = False


class Transfer(NamedTuple):
    """The common part of a source piece and a target piece.

    ``whole``: both pieces are exactly this part and nothing is summed, so one tensor can serve as both.
    ``add``: the part is added to what an earlier transfer brought to the same place.
    """

    source: int
    source_micro_batch: int
    target: int
    target_micro_batch: int
    samples: Interval
    features: Interval
    whole: bool
    add: bool


def exchange(source: Layout, target: Layout) -> tuple[Transfer, ...]:
    """Return the transfers that build every piece of ``target`` from ``source``.

    A target piece takes each part from one holder (itself if it is one, else the holders take turns). Of a partial
    source it takes the summand of every holder, its own first and then in the order of the pieces, so that the
    order of summation is fixed.
    """
    holders: dict[tuple[int, Interval, Interval], list[int]] = defaultdict(list)
    for piece in source.pieces:
        holders[piece.micro_batch, piece.samples, piece.features].append(piece.rank)
    regions = sorted(holders, key=lambda key: (key[1], key[2]))
    stops = [samples[1] for _, samples, _ in regions]
    transfers = []
    for turn, piece in enumerate(target.pieces):
        own = piece.rank
        for micro_batch, samples, features in regions[bisect_right(stops, piece.samples[0]) :]:
            if samples[0] >= piece.samples[1]:
                break
            common = intersect(samples, piece.samples), intersect(features, piece.features)
            if length(common[0]) <= 0 or length(common[1]) <= 0:
                continue
            ranks = holders[micro_batch, samples, features]
            if source.partial:
                ranks = sorted(ranks, key=lambda r: r != own)
            else:
                ranks = [own] if own in ranks else [ranks[turn % len(ranks)]]
            whole = len(ranks) == 1 and common == (samples, features) == (piece.samples, piece.features)
            transfers += [
                Transfer(rank, micro_batch, own, piece.micro_batch, *common, whole, i > 0)
                for i, rank in enumerate(ranks)
            ]
    return tuple(transfers)
