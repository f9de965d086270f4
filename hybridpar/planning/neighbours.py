"""Neighbours of a draft: those that differ in one choice, to which a search may step."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from hybridpar.planning.cuts import ascend
from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.sharding import MOST_FREE

T = TypeVar("T")


def neighbours(drafting: Drafting, draft: Draft, *, lacking: bool) -> Iterator[Draft]:
    """Yield the drafts that differ in one choice.

    Keeping less for the backward takes time and is offered only where memory is lacking; keeping more always.
    """
    yield from _other_sizes(drafting, draft)
    for i in range(len(draft.bounds)):
        yield from _moved_bounds(drafting, draft, i)
    yield from _other_rules(drafting, draft)
    for other in _other_keeping(drafting, draft):
        fewer = sum(other.recompute) < sum(draft.recompute)
        if lacking or fewer or other.in_flight.count(None) > draft.in_flight.count(None):
            yield other


def _other_rules(drafting: Drafting, draft: Draft) -> Iterator[Draft]:
    """Yield drafts with another sharding of a linear or the optimizer, or another order."""
    if drafting.request.pin("tail").sharding is None and len(draft.sharding) <= MOST_FREE:
        for i, (mode, free) in enumerate(zip(draft.sharding, drafting.modes(draft), strict=True)):
            for other in free:
                if other != mode:
                    yield replace(draft, sharding=_with(draft.sharding, i, other))
    for order in drafting.request.orders:
        if order != draft.order:
            yield replace(draft, order=order)
    for choice in drafting.shardings(draft.placement):
        if choice != draft.optimizer_sharding:
            yield replace(draft, optimizer_sharding=choice)


def _other_sizes(drafting: Drafting, draft: Draft) -> Iterator[Draft]:
    for i in range(len(draft.placement.kinds)):
        sizes = drafting.sizes(draft.placement, i)
        at = bisect_left(sizes, draft.micro_batches[i])
        for j in (at - 1, at + 1, at - 3, at + 3):
            if 0 <= j < len(sizes) and sizes[j] != draft.micro_batches[i]:
                yield replace(draft, micro_batches=_with(draft.micro_batches, i, sizes[j]))


def _other_keeping(drafting: Drafting, draft: Draft) -> Iterator[Draft]:
    """Yield drafts that keep more or less for the backward."""
    for i in range(len(draft.placement.kinds)):
        for cap in drafting.caps(draft, i):
            if cap != draft.in_flight[i]:
                yield replace(draft, in_flight=_with(draft.in_flight, i, cap))
        for choice in drafting.recomputations(draft.placement, i):
            if choice != draft.recompute[i]:
                yield replace(draft, recompute=_with(draft.recompute, i, choice))


def _moved_bounds(drafting: Drafting, draft: Draft, i: int) -> Iterator[Draft]:
    """Yield drafts with one bound moved; a bound between stages also with the middle balanced anew."""
    cuts, last = drafting.cuts, len(drafting.chain.layers)
    points = cuts.points(draft.placement, i)
    if draft.bounds[i] in cuts.pinned(draft.placement).values():
        return
    before, after = (0, *draft.bounds)[i], (*draft.bounds, last)[i + 1]
    below = bisect_left(points, draft.bounds[i])
    above = bisect_right(points, draft.bounds[i])
    for j in (below - 1, above, below - 3, above + 2):
        if 0 <= j < len(points):
            moved = _with(draft.bounds, i, points[j])
            if before < points[j] < after and ascend(moved, last):
                yield drafting.resharded(replace(draft, bounds=moved))
            between = cuts.between_stages(draft.placement, moved)
            balanced = cuts.balanced(draft.placement, between, draft.micro_batches)
            if balanced is not None and balanced != moved:
                yield drafting.resharded(replace(draft, bounds=balanced))


def _with(values: tuple[T, ...], i: int, value: T) -> tuple[T, ...]:
    return (*values[:i], value, *values[i + 1 :])
