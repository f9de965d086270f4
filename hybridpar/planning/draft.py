"""Drafts: the choices behind a plan, and how they become one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, TypeVar

from hybridpar.cluster.topology import Cluster
from hybridpar.model.chain import Chain
from hybridpar.planning.layout import length, split
from hybridpar.planning.placement import Placement
from hybridpar.planning.plan import Kind, OrderRule, Plan, Segment, Stage
from hybridpar.planning.request import Mode, Request
from hybridpar.planning.sharding import MOST_FREE, Sharded, best_sharding
from hybridpar.profiling.record import Profile

T = TypeVar("T")
Sharding = tuple[Mode, ...]


@dataclass(frozen=True)
class Draft:
    """Everything a plan leaves open once its chain and the request are given."""

    placement: Placement
    bounds: tuple[int, ...]
    """Layer indices where positions (segments, counted over all stages) meet, ascending."""
    micro_batches: tuple[int, ...]
    """One per stage, as all fields below but the last three."""
    in_flight: tuple[int | None, ...]
    recompute: tuple[bool, ...]
    sharding: Sharding
    order: OrderRule
    optimizer_sharding: Literal["none", "zero1"] = "none"

    def stage_bounds(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """Return the bounds of every stage's segments, its first and last layer included."""
        edges, result, at = (0, *self.bounds, layers), [], 0
        for groups in self.placement.groups:
            result.append(edges[at : at + len(groups) + 1])
            at += len(groups)
        return tuple(result)


class Drafting:
    """Turns drafts into plans for one chain, profile, cluster and request, and knows a draft's neighbours."""

    def __init__(self, chain: Chain, profile: Profile, cluster: Cluster, request: Request) -> None:
        self.chain, self.profile, self.cluster, self.request = chain, profile, cluster, request
        allowed = request.space.cuts
        self.cut_points = [c for c in _cut_points(chain) if allowed is None or c in allowed]
        self._totals: dict[int, list[float]] = {}
        self._shardings: dict[tuple[int, int], Sharded] = {}
        self._weighty = [0, *accumulate(bool(layer.parameters) for layer in chain.layers)]
        self._equal = len({cluster.speed(r) for r in range(cluster.world)}) == 1

    def plan(self, draft: Draft) -> Plan:
        """Build the plan."""
        stages = []
        bounds = draft.stage_bounds(len(self.chain.layers))
        for i, (kind, groups) in enumerate(zip(draft.placement.kinds, draft.placement.groups, strict=True)):
            segments = tuple(
                Segment(layers, ranks, self._shares(draft.placement, kind, ranks))
                for layers, ranks in zip(pairwise(bounds[i]), groups, strict=True)
            )
            sharded = kind == "tail" and len(groups[0]) > 1
            stages.append(
                Stage(
                    kind,
                    draft.micro_batches[i],
                    segments,
                    draft.sharding if sharded else (),
                    draft.in_flight[i],
                    draft.recompute[i],
                )
            )
        return Plan(
            model=self.chain.model,
            chain=self.chain.fingerprint,
            world=self.cluster.world,
            global_batch=self.request.global_batch,
            precision=self.request.precision,
            stages=tuple(stages),
            order=draft.order,
            bucket_bytes=self.request.bucket_bytes,
            recipe=replace(self.request.recipe, sharding=draft.optimizer_sharding),
            replicas=draft.placement.replicas,
        )

    def _shares(self, placement: Placement, kind: Kind, ranks: tuple[int, ...]) -> tuple[float, ...] | None:
        """Return the shares of samples or features: pinned, or of unequal devices in proportion to their speed."""
        pinned = self.request.pin(kind).shares
        if pinned is not None and kind != "middle":
            return pinned
        if self._equal:
            return None
        size = placement.world
        speeds = tuple(
            min(self.cluster.speed(r) for r in range(rank, size * placement.replicas, size)) for rank in ranks
        )
        return speeds if len(set(speeds)) > 1 else None

    # The choices of each dimension

    def samples(self, placement: Placement) -> int:
        """Return the samples per step of the largest plan replica."""
        return -(-self.request.global_batch // placement.replicas)

    def share(self, placement: Placement, stage: int) -> int:
        """Return the most samples that one rank of a stage can work on in a step."""
        samples, kind = self.samples(placement), placement.kinds[stage]
        if kind == "tail":
            return samples
        shares = [self._shares(placement, kind, ranks) for ranks in placement.groups[stage]]
        return max(
            -(-samples // len(ranks)) if own is None else max(length(i) for i in split(samples, own))
            for ranks, own in zip(placement.groups[stage], shares, strict=True)
        )

    def sizes(self, placement: Placement, stage: int) -> list[int]:
        """Return the micro-batch sizes worth trying, ascending.

        The share in up to 64 parts, and powers of two.
        """
        pinned = self.request.pin(placement.kinds[stage]).micro_batch
        if pinned is not None:
            return [pinned]
        share = self.share(placement, stage)
        if self.request.space.micro_batches is not None:
            return sorted({min(size, share) for size in self.request.space.micro_batches})
        parts = {-(-share // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)}
        powers = {1 << k for k in range(share.bit_length()) if 1 << k <= share <= 64 << k}
        least = min(self.request.least_micro_batch, share)
        return sorted(size for size in parts | powers if size >= least)

    def caps(self, draft: Draft, stage: int) -> tuple[int | None, ...]:
        """Return the in-flight caps to try: the rule's, and one to four of the stage's own chunks."""
        pinned = self.request.pin(draft.placement.kinds[stage]).in_flight
        if pinned is not None:
            return (pinned,)
        if self.request.space.in_flight is not None:
            return self.request.space.in_flight
        chunk = draft.micro_batches[stage]
        if draft.placement.kinds[stage] != "tail":
            chunk *= max(len(ranks) for ranks in draft.placement.groups[stage])
        samples = self.samples(draft.placement)
        return None, *(n * chunk for n in (1, 2, 4) if n * chunk < samples)

    def recomputations(self, placement: Placement, stage: int) -> tuple[bool, ...]:
        """Return whether to recompute a stage: no, or either."""
        pinned = self.request.pin(placement.kinds[stage]).recompute
        return self.request.space.recompute if pinned is None else (pinned,)

    def shardings(self, placement: Placement) -> tuple[Literal["none", "zero1"], ...]:
        """Return the optimizer shardings that a placement allows."""
        front = placement.kinds[0] == "front" and len(placement.groups[0][0]) > 1
        fits = front and placement.replicas == 1 and self.request.precision == "float32"
        fits = fits and not self.request.recipe.clipping
        choices = self.request.optimizer_shardings
        return tuple(c for c in choices if c == "none" or fits or len(choices) == 1)

    def modes(self, draft: Draft) -> int:
        """Return the number of linears of a draft's tail that are sharded."""
        if not self._sharded(draft.placement):
            return 0
        start = draft.stage_bounds(len(self.chain.layers))[-1][0]
        return sum(1 for layer in self.chain.layers[start:] if layer.linear)

    def sharded(self, start: int, shards: int) -> Sharded:
        """Return the sharding of a tail from a layer on that moves fewest bytes."""
        key = (start, shards)
        if key not in self._shardings:
            self._shardings[key] = best_sharding(self.chain, start, shards, self.request.space.sharding)
        return self._shardings[key]

    @staticmethod
    def _sharded(placement: Placement) -> bool:
        return placement.kinds[-1] == "tail" and len(placement.groups[-1][0]) > 1

    def points(self, placement: Placement, position: int) -> list[int]:
        """Return the layer indices where a position may end: a tail starts where tensor parallelism can."""
        after, at = 0, len(placement.groups[0])
        while position >= at:
            after += 1
            at += len(placement.groups[after])
        starts_tail = position == at - 1 and placement.kinds[after + 1 :] == ("tail",)
        return self.tail_points if starts_tail else self.cut_points

    @property
    def tail_points(self) -> list[int]:
        """Where a sharded tail may start."""
        last = max((n for n, layer in enumerate(self.chain.layers) if layer.linear), default=0)
        return [c for c in self.cut_points if self.chain.tail_start <= c <= last]

    # Neighbours

    def neighbours(self, draft: Draft, *, lacking: bool) -> Iterator[Draft]:
        """Yield the drafts that differ in one choice.

        Keeping less for the backward takes time and is offered only where memory is lacking; keeping more always.
        """
        yield from self._other_sizes(draft)
        for i in range(len(draft.bounds)):
            yield from self._moved_bounds(draft, i)
        yield from self._other_rules(draft)
        for other in self._other_keeping(draft):
            fewer = sum(other.recompute) < sum(draft.recompute)
            if lacking or fewer or other.in_flight.count(None) > draft.in_flight.count(None):
                yield other

    def _other_rules(self, draft: Draft) -> Iterator[Draft]:
        """Yield drafts with another sharding of a linear or the optimizer, or another order."""
        if self.request.pin("tail").sharding is None and len(draft.sharding) <= MOST_FREE:
            for i, mode in enumerate(draft.sharding):
                for other in self.request.space.sharding:
                    if other != mode:
                        yield replace(draft, sharding=_with(draft.sharding, i, other))
        for order in self.request.orders:
            if order != draft.order:
                yield replace(draft, order=order)
        for choice in self.shardings(draft.placement):
            if choice != draft.optimizer_sharding:
                yield replace(draft, optimizer_sharding=choice)

    def _other_sizes(self, draft: Draft) -> Iterator[Draft]:
        for i in range(len(draft.placement.kinds)):
            sizes = self.sizes(draft.placement, i)
            at = bisect_left(sizes, draft.micro_batches[i])
            for j in (at - 1, at + 1, at - 3, at + 3):
                if 0 <= j < len(sizes) and sizes[j] != draft.micro_batches[i]:
                    yield replace(draft, micro_batches=_with(draft.micro_batches, i, sizes[j]))

    def _other_keeping(self, draft: Draft) -> Iterator[Draft]:
        """Yield drafts that keep more or less for the backward."""
        for i in range(len(draft.placement.kinds)):
            for cap in self.caps(draft, i):
                if cap != draft.in_flight[i]:
                    yield replace(draft, in_flight=_with(draft.in_flight, i, cap))
            for choice in self.recomputations(draft.placement, i):
                if choice != draft.recompute[i]:
                    yield replace(draft, recompute=_with(draft.recompute, i, choice))

    def lean(self, draft: Draft) -> Draft:
        """Return a draft with the smallest micro-batches, recomputing where that is allowed."""
        placement, chosen = draft.placement, []
        again = []
        for i in range(len(placement.kinds)):
            sizes = self.sizes(placement, i)
            chosen.append(next((s for s in sizes if not self.request.distinct or s not in chosen), sizes[0]))
            again.append(max(self.recomputations(placement, i)))
        return replace(draft, micro_batches=tuple(chosen), recompute=tuple(again))

    def allowed(self, draft: Draft) -> bool:
        """Whether the stages' micro-batches differ, where the request wants that."""
        sizes = draft.micro_batches
        return not self.request.distinct or len(set(sizes)) == len(sizes)

    def _moved_bounds(self, draft: Draft, i: int) -> Iterator[Draft]:
        """Yield drafts with one bound moved; a bound between stages also with the middle balanced anew."""
        points = self.points(draft.placement, i)
        if draft.bounds[i] in self.pinned_bounds(draft.placement).values():
            return
        before, after = (0, *draft.bounds)[i], (*draft.bounds, len(self.chain.layers))[i + 1]
        below = bisect_left(points, draft.bounds[i])
        above = bisect_right(points, draft.bounds[i])
        for j in (below - 1, above, below - 3, above + 2):
            if 0 <= j < len(points):
                moved = _with(draft.bounds, i, points[j])
                if before < points[j] < after and self.fits(draft.placement, moved):
                    yield self.resharded(replace(draft, bounds=moved))
                balanced = self.balanced_bounds(
                    draft.placement, self._cuts(draft.placement, moved), draft.micro_batches
                )
                if balanced is not None and balanced != moved:
                    yield self.resharded(replace(draft, bounds=balanced))

    def resharded(self, draft: Draft) -> Draft:
        """Give a draft one mode per sharded linear of its tail: the best ones, or what it has and some more."""
        count = self.modes(draft)
        pinned = self.request.pin("tail").sharding
        if pinned is not None:
            return replace(draft, sharding=pinned if self._sharded(draft.placement) else ())
        if count and not draft.sharding:
            start = draft.stage_bounds(len(self.chain.layers))[-1][0]
            return replace(draft, sharding=self.sharded(start, len(draft.placement.groups[-1][0])).modes)
        kept = draft.sharding[max(len(draft.sharding) - count, 0) :]
        modes = self.request.space.sharding
        fresh: Sharding = tuple(modes[0] if (count - i) % 2 else modes[-1] for i in range(count - len(kept)))
        return replace(draft, sharding=fresh + kept)

    # Cuts between stages, and bounds inside the middle

    def pinned_bounds(self, placement: Placement) -> dict[int, int]:
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

    def _cuts(self, placement: Placement, bounds: tuple[int, ...]) -> tuple[int, ...]:
        ends = accumulate(len(groups) for groups in placement.groups[:-1])
        return tuple(bounds[end - 1] for end in ends)

    def balanced_bounds(
        self, placement: Placement, cuts: tuple[int, ...], micro_batches: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """Return the bounds for cuts between stages, the middle balanced; None where some segment gets nothing."""
        if not self.has_room(placement, cuts):
            return None
        edges = (0, *cuts, len(self.chain.layers))
        bounds: list[int] = []
        for i, groups in enumerate(placement.groups):
            bounds += self.balanced(edges[i], edges[i + 1], len(groups), micro_batches[i])[1:]
        return tuple(bounds[:-1])

    def has_room(self, placement: Placement, cuts: tuple[int, ...]) -> bool:
        """Whether cuts between stages ascend and leave every segment of each a layer."""
        edges = (0, *cuts, len(self.chain.layers))
        return all(
            edges[i] < edges[i + 1] and self._room(placement, i, edges[i], edges[i + 1]) >= len(groups)
            for i, groups in enumerate(placement.groups)
        )

    def fits(self, placement: Placement, bounds: tuple[int, ...]) -> bool:
        """Whether every segment gets a layer with parameters (any layer, where the layers are pinned)."""
        edges, at = (0, *bounds, len(self.chain.layers)), 0
        for i, groups in enumerate(placement.groups):
            for start, stop in pairwise(edges[at : at + len(groups) + 1]):
                if start >= stop or self._room(placement, i, start, stop) < 1:
                    return False
            at += len(groups)
        return True

    def _room(self, placement: Placement, stage: int, start: int, stop: int) -> int:
        if self.request.pin(placement.kinds[stage]).layers is not None:
            return stop - start
        weighty = self._weighty[stop] - self._weighty[start]
        if self.request.space.cuts is None:
            return max(weighty, 1)
        return len(self._points_inside(start, stop)) - 1

    def _points_inside(self, start: int, stop: int) -> list[int]:
        """Return where a stage's segments may begin and end so that each has parameters."""
        weighty = (i for i in range(start, stop) if self.chain.layers[i].parameters)
        next(weighty, None)
        allowed = self.request.space.cuts
        return [start, *(i for i in weighty if allowed is None or i in allowed), stop]

    def balanced(self, start: int, stop: int, parts: int, micro_batch: int) -> list[int]:
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


def _with(values: tuple[T, ...], i: int, value: T) -> tuple[T, ...]:
    return (*values[:i], value, *values[i + 1 :])
