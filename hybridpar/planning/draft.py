"""Drafts: the choices behind a plan, and how they become one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, TypeVar

from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Kind, OrderRule, Plan, Segment, Stage
from hybridpar.planning.request import Request
from hybridpar.profiling.record import Profile

T = TypeVar("T")
Sharding = tuple[Literal["column", "row"], ...]


@dataclass(frozen=True)
class Draft:
    """Everything a plan leaves open once its chain and the request are given.

    ``cuts`` are the layer indices where stages meet, ascending; ``ranks`` has one tuple of ranks per segment.
    """

    kinds: tuple[Kind, ...]
    cuts: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    micro_batches: tuple[int, ...]
    sharding: Sharding
    order: OrderRule


class Drafting:
    """Turns drafts into plans for one chain, profile and request, and knows a draft's neighbours."""

    def __init__(self, chain: Chain, profile: Profile, request: Request, world: int) -> None:
        self.chain, self.profile, self.request, self.world = chain, profile, request, world
        self.cut_points = _cut_points(chain)

    def plan(self, draft: Draft) -> Plan:
        """Build the plan; middle segments are balanced by their measured time at the draft's micro-batch."""
        edges = (0, *draft.cuts, len(self.chain.layers))
        stages = []
        for i, kind in enumerate(draft.kinds):
            pin, groups = self.request.pin(kind), draft.ranks[i]
            bounds = self.balanced(edges[i], edges[i + 1], len(groups), draft.micro_batches[i])
            segments = tuple(
                Segment((a, b), ranks, pin.shares if kind != "middle" else None)
                for (a, b), ranks in zip(pairwise(bounds), groups, strict=True)
            )
            sharded = kind == "tail" and len(groups[0]) > 1
            sharding = draft.sharding if sharded else ()
            stages.append(Stage(kind, draft.micro_batches[i], segments, sharding, pin.in_flight))
        return Plan(
            model=self.chain.model,
            chain=self.chain.fingerprint,
            world=self.world,
            global_batch=self.request.global_batch,
            precision=self.request.precision,
            stages=tuple(stages),
            order=draft.order,
            bucket_bytes=self.request.bucket_bytes,
            recipe=self.request.recipe,
        )

    def share(self, draft: Draft, stage: int) -> int:
        """Return the most samples that one rank of a stage can work on in a step."""
        if draft.kinds[stage] == "tail":
            return self.request.global_batch
        return -(-self.request.global_batch // min(len(ranks) for ranks in draft.ranks[stage]))

    def sizes(self, draft: Draft, stage: int) -> list[int]:
        """Return the micro-batch sizes worth trying, ascending.

        The share in up to 16 parts (32 in the middle, where many keep a long pipeline full), and powers of two.
        """
        pinned = self.request.pin(draft.kinds[stage]).micro_batch
        if pinned is not None:
            return [pinned]
        share = self.share(draft, stage)
        parts = {-(-share // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)}
        powers = {1 << k for k in range(share.bit_length()) if 1 << k <= share <= 64 << k}
        least = min(self.request.least_micro_batch, share)
        return sorted(size for size in parts | powers if size >= least)

    def neighbours(self, draft: Draft) -> Iterator[Draft]:
        """Yield the drafts that differ in one choice: a micro-batch, a cut, one linear's sharding, the order."""
        for i in range(len(draft.kinds)):
            sizes = self.sizes(draft, i)
            at = bisect_left(sizes, draft.micro_batches[i])
            for j in (at - 1, at + 1, at - 3, at + 3):
                if 0 <= j < len(sizes) and sizes[j] != draft.micro_batches[i]:
                    yield replace(draft, micro_batches=_with(draft.micro_batches, i, sizes[j]))
        for i in range(len(draft.cuts)):
            yield from self._moved_cuts(draft, i)
        if self.request.pin("tail").sharding is None:
            for i, mode in enumerate(draft.sharding):
                other: Literal["column", "row"] = "row" if mode == "column" else "column"
                yield replace(draft, sharding=_with(draft.sharding, i, other))
        if self.request.order is None:
            yield replace(
                draft,
                order="fill_drain" if draft.order == "one_forward_one_backward" else "one_forward_one_backward",
            )

    def allowed(self, draft: Draft) -> bool:
        """Whether the stages' micro-batches differ, where the request wants that."""
        sizes = draft.micro_batches
        return not self.request.distinct or len(set(sizes)) == len(sizes)

    def _moved_cuts(self, draft: Draft, i: int) -> Iterator[Draft]:
        before, after = draft.kinds[i], draft.kinds[i + 1]
        if self.request.pin(before).layers is not None or self.request.pin(after).layers is not None:
            return
        points = self.cuts_between(draft.kinds, i)
        at = bisect_left(points, draft.cuts[i])
        for j in (at - 1, at + 1, at - 3, at + 3):
            if 0 <= j < len(points):
                moved = replace(draft, cuts=_with(draft.cuts, i, points[j]))
                if self.fits(moved):
                    yield replace(moved, sharding=self.resized_sharding(moved))

    def cuts_between(self, kinds: tuple[Kind, ...], i: int) -> list[int]:
        """Return the layer indices where stage ``i`` may end: a tail starts where tensor parallelism can."""
        if kinds[i + 1] == "tail":
            last = max((n for n, layer in enumerate(self.chain.layers) if layer.linear), default=0)
            return [c for c in self.cut_points if self.chain.tail_start <= c <= last]
        return self.cut_points

    def fits(self, draft: Draft) -> bool:
        """Whether every segment gets a layer with parameters (any layer, where the layers are pinned)."""
        edges = (0, *draft.cuts, len(self.chain.layers))
        for kind, groups, (start, stop) in zip(draft.kinds, draft.ranks, pairwise(edges), strict=True):
            pinned = self.request.pin(kind).layers is not None
            room = stop - start if pinned else len(self._points_inside(start, stop)) - 1
            if start >= stop or room < len(groups):
                return False
        return True

    def resized_sharding(self, draft: Draft) -> Sharding:
        """Return the sharding with one entry per linear of the draft's tail; new ones alternate."""
        if "tail" not in draft.kinds:
            return ()
        start = (0, *draft.cuts)[draft.kinds.index("tail")]
        count = sum(1 for layer in self.chain.layers[start:] if layer.linear)
        pinned = self.request.pin("tail").sharding
        if pinned is not None:
            return pinned
        kept = draft.sharding[max(len(draft.sharding) - count, 0) :]
        missing = count - len(kept)
        fresh: Sharding = tuple("column" if (count - i) % 2 else "row" for i in range(missing))
        return fresh + kept

    def _points_inside(self, start: int, stop: int) -> list[int]:
        """Return where a middle may be cut so that every segment has parameters."""
        weighty = [i for i in range(start, stop) if self.chain.layers[i].parameters]
        return [start, *weighty[1:], stop]

    def balanced(self, start: int, stop: int, parts: int, micro_batch: int) -> list[int]:
        """Cut layers into runs whose slowest is as fast as possible (dynamic program over cut points)."""
        if parts == 1:
            return [start, stop]
        points = self._points_inside(start, stop)
        if len(points) <= parts:
            points = list(range(start, stop + 1))
        time = [
            self.profile.forward_time(i, micro_batch) + self.profile.backward_time(i, micro_batch)
            for i in range(start, stop)
        ]
        total = [0.0, *accumulate(time)]
        at = [total[p - start] for p in points]
        never = (float("inf"), 0)
        best: list[list[tuple[float, int]]] = [[never, *((t, 0) for t in at[1:])]]
        for _ in range(parts - 1):
            last = best[-1]
            best.append(
                [
                    min(((max(last[k][0], at[j] - at[k]), k) for k in range(j)), default=never)
                    for j in range(len(points))
                ]
            )
        bounds, j = [stop], len(points) - 1
        for row in reversed(best[1:]):
            j = row[j][1]
            bounds.append(points[j])
        return [start, *reversed(bounds)]


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
