"""Cuts: where stages and segments may meet, and where the segments of a stage are balanced."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise

from hybridpar.model.chain import Chain
from hybridpar.planning.placement import Placement
from hybridpar.planning.request import Request
from hybridpar.profiling.record import Profile

Bounds = tuple[int, ...]
"""Layer indices where positions (segments, counted over all stages) meet, ascending."""


class Cuts:
    """Cuts between stages, and bounds inside the middle, for one chain, profile and request."""

    def __init__(self, chain: Chain, profile: Profile, request: Request) -> None:
        self.chain, self.profile, self.request = chain, profile, request
        allowed = request.space.cuts
        self.everywhere = [c for c in _cut_points(chain) if allowed is None or c in allowed]
        last = max((n for n, layer in enumerate(chain.layers) if layer.linear), default=0)
        self.before_tail = [c for c in self.everywhere if chain.tail_start <= c <= last]
        """Where a sharded tail may start."""
        self._totals: dict[int, list[float]] = {}
        self._weighty = [0, *accumulate(bool(layer.parameters) for layer in chain.layers)]

    def points(self, placement: Placement, position: int) -> list[int]:
        """Return the layer indices where a position may end: a tail starts where tensor parallelism can."""
        after, at = 0, len(placement.groups[0])
        while position >= at:
            after += 1
            at += len(placement.groups[after])
        starts_tail = position == at - 1 and placement.kinds[after + 1 :] == ("tail",)
        return self.before_tail if starts_tail else self.everywhere

    def pinned(self, placement: Placement) -> dict[int, int]:
        """Return the bounds that pinned layers fix, by position index."""
        pinned, at = {}, 0
        for kind, groups in zip(placement.kinds, placement.groups, strict=True):
            layers = self.request.pin(kind).layers
            if layers is not None:
                if layers[0] > 0:
                    pinned[at - 1] = layers[0]
                if layers[1] < len(self.chain.layers):
                    pinned[at + len(groups) - 1] = layers[1]
            at += len(groups)
        return pinned

    @staticmethod
    def between_stages(placement: Placement, bounds: Bounds) -> Bounds:
        """Return those of the bounds where stages meet."""
        ends = accumulate(len(groups) for groups in placement.groups[:-1])
        return tuple(bounds[end - 1] for end in ends)

    def has_room(self, placement: Placement, cuts: Bounds) -> bool:
        """Whether cuts between stages ascend and leave every stage layers enough for its segments."""
        edges = (0, *cuts, len(self.chain.layers))
        return all(
            start < stop and (len(groups) == 1 or self._room(placement, i, start, stop) >= len(groups))
            for i, (groups, (start, stop)) in enumerate(zip(placement.groups, pairwise(edges), strict=True))
        )

    def _room(self, placement: Placement, stage: int, start: int, stop: int) -> int:
        """Return the most segments that a stage's layers can be balanced over."""
        if self.request.pin(placement.kinds[stage]).layers is not None:
            return stop - start
        if self.request.space.cuts is None:
            return self._weighty[stop] - self._weighty[start]
        return len(self._points_inside(start, stop)) - 1

    def _points_inside(self, start: int, stop: int) -> list[int]:
        """Return where a stage's segments may begin and end so that each has parameters."""
        weighty = (i for i in range(start, stop) if self.chain.layers[i].parameters)
        next(weighty, None)
        allowed = self.request.space.cuts
        return [start, *(i for i in weighty if allowed is None or i in allowed), stop]

    def balanced(self, placement: Placement, cuts: Bounds, micro_batches: tuple[int, ...]) -> Bounds | None:
        """Return the bounds for cuts between stages, the middle balanced; None where there is no room for it."""
        if not self.has_room(placement, cuts):
            return None
        edges = (0, *cuts, len(self.chain.layers))
        bounds: list[int] = []
        for i, groups in enumerate(placement.groups):
            bounds += self._balanced(edges[i], edges[i + 1], len(groups), micro_batches[i])[1:]
        return tuple(bounds[:-1])

    def _balanced(self, start: int, stop: int, parts: int, micro_batch: int) -> list[int]:
        """Return bounds of ``parts`` segments whose largest measured time is least."""
        if parts == 1:
            return [start, stop]
        points = self._points_inside(start, stop)
        if len(points) <= parts:
            points = list(range(start, stop + 1))
        totals = self._total(micro_batch)
        return _least_largest(points, [totals[p] - totals[start] for p in points], parts)

    def _total(self, micro_batch: int) -> list[float]:
        """Return the time of all layers before each layer."""
        if micro_batch not in self._totals:
            times = (
                self.profile.forward_time(i, micro_batch) + self.profile.backward_time(i, micro_batch)
                for i in range(len(self.chain.layers))
            )
            self._totals[micro_batch] = [0.0, *accumulate(times)]
        return self._totals[micro_batch]


def ascend(bounds: Bounds, layers: int) -> bool:
    """Whether bounds leave every position a layer."""
    return all(a < b for a, b in pairwise((0, *bounds, layers)))


def _least_largest(points: list[int], at: list[float], parts: int) -> list[int]:
    """Cut at ``parts - 1`` of the inner points so that the largest part is smallest.

    Bisection over the largest part, filling parts greedily from the front: O(parts log n) per probe.
    """

    def cut(limit: float) -> list[int] | None:
        chosen, i = [0], 0
        for part in range(parts):
            left = parts - part - 1
            j = min(bisect_right(at, at[i] + limit) - 1, len(at) - 1 - left)
            if j <= i:
                return None
            chosen.append(j)
            i = j
        return chosen if i == len(at) - 1 else None

    low, high = at[-1] / parts, at[-1]
    best = cut(high) or [*list(range(parts)), len(at) - 1]
    for _ in range(40):
        middle = (low + high) / 2
        found = cut(middle * (1 + 1e-12))
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return [points[i] for i in best]


def _cut_points(chain: Chain) -> list[int]:
    """Return the cuts before layers with parameters, and the start of the tail.

    Between two of them the crossing tensor only shrinks (activations, pools), except before an upsampling pool,
    where the tail starts.
    """
    points = {i for i, layer in enumerate(chain.layers) if i > 0 and layer.parameters}
    if 0 < chain.tail_start < len(chain.layers):
        points.add(chain.tail_start)
    for i in range(1, len(chain.layers)):
        if chain.layers[i].out_elements > chain.layers[i].in_elements and chain.layers[i].channelwise:
            points.add(i)
    return sorted(points)
