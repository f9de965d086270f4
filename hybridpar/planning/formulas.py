"""An estimate of the step time and memory of very many drafts of a placement at once.

Closed formulas over arrays: one axis per stage's micro-batch sizes, and one for all choices of cuts. With n_i
samples per rank, b_i per micro-batch and chunks of c_i samples (b_i times the replicas), for one rank r:

    work_r   = sum over its stages of ceil(n_i / b_i) (f_i + g_i) + update_i    (f, g: passes of a chunk)
    fill_r   = sum over stages before its first of ceil(c / c_i) f_i + message_i    (c: its own first chunk)
    drain_r  = the same with g_i
    (and (d-1) (f + g) for a pipeline of d segments, and a chunk of each where chunks of neighbours do not meet)
    step     = max(max over r of work_r + fill_r + drain_r + wire_r, path) + reduce

wire_r is what the rank's exchanges expose, path the time of one chunk through all stages, reduce what the gradient
reductions leave over when the front's last backward hides the rest. This is no bound; the simulator decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hybridpar.model.chain import LOWERED_BYTES
from hybridpar.planning.part import Part
from hybridpar.planning.placement import Placement
from hybridpar.planning.plan import OptimizerSharding
from hybridpar.planning.sharding import Sharded
from hybridpar.planning.tables import Array
from hybridpar.planning.wiring import Wiring

EXPOSED = 0.25
"""Share of the later chunks' exchanges that computations do not hide. A guess, which only orders drafts."""
EXPOSED_INSIDE = 0.5
"""Likewise between the segments of a pipeline."""
HIDING = 0.8
"""Share of the front's last backward in which gradients are reduced."""
EVEN = 1e-9
"""Chunks of two stages meet when the ratio of their samples is an integer."""


class Together:
    """What parts are to each other, on whatever ranks; many placements have the same parts."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts, self.samples = parts, parts[0].samples
        self._fill: dict[tuple[int, int], Array] = {}

    def fill(self, i: int, first: int) -> Array:
        """Seconds of the chunks of stage ``i`` that the first chunk of a later stage waits for, both ways."""
        if (i, first) not in self._fill:
            own, later = self.parts[i], self.parts[first]
            self._fill[i, first] = (np.ceil(later.chunk / own.chunk) + own.degree - 1) * own.both
        return self._fill[i, first]

    @cached_property
    def uneven(self) -> Any:
        """Seconds of a chunk of two neighbours each whose chunks do not meet."""
        total: Any = 0.0
        for a, b in pairwise(self.parts):
            ratio = np.maximum(a.chunk, b.chunk) / np.minimum(a.chunk, b.chunk)
            total = total + (np.abs(ratio - np.round(ratio)) > EVEN) * (a.both + b.both)
        return total

    @cached_property
    def meetings(self) -> list[Array]:
        """Exchanges of a step behind every stage but the last."""
        return [np.ceil(self.samples / np.maximum(a.chunk, b.chunk)) for a, b in pairwise(self.parts)]

    @cached_property
    def largest(self) -> Array:
        """Samples of the largest chunk of any stage."""
        largest: Any = 0.0
        for part in self.parts:
            largest = np.maximum(largest, np.minimum(part.chunk, self.samples))
        return np.asarray(largest)

    @cached_property
    def path(self) -> tuple[Any, list[Array]]:
        """Seconds for the largest chunk through all stages and back, and which of its messages count.

        Stages take turns over it, unless both of two neighbours have smaller chunks.
        """
        largest = self.largest
        times = [(np.ceil(largest / part.chunk) + part.degree - 1) * part.both for part in self.parts]
        path: Any = sum(times)
        counted = []
        for (a, b), (first, second) in zip(pairwise(self.parts), pairwise(times), strict=True):
            overlapped = (a.chunk < largest) & (b.chunk < largest)
            path = path - overlapped * np.minimum(first, second)
            counted.append(2 * (largest / self.samples) * ~overlapped)
        return path, counted


class Exchange(NamedTuple):
    """Seconds of the exchanges of one kind, one way: of the first chunk, and of all of a step's."""

    first: Array
    total: Array

    def exposed(self, share: float) -> Array:
        """Return what shows of both ways: nothing else runs during the first chunk's."""
        return np.asarray(2 * (self.first + share * (self.total - self.first)))


@dataclass(frozen=True)
class Machine:
    """What the formulas need to know beside chain and placement."""

    wiring: Wiring
    limit_bytes: float
    optimizer_states: int
    sharding: OptimizerSharding
    """That with the least memory of those to choose from."""
    offload: bool
    bucket_bytes: int
    sums: int
    """Per gradient bucket."""
    sharded: Callable[[int, int], Sharded]
    """By first layer and number of shards."""


class Formulas:
    """The formulas for one placement."""

    def __init__(self, machine: Machine, placement: Placement, together: Together) -> None:
        self.machine, self.placement, self.together = machine, placement, together
        self.parts, self.samples = together.parts, together.samples
        self.stages = range(len(self.parts))
        self.spread = [len({frozenset(g) for g in groups}) > 1 for groups in placement.groups]
        """By stage: not all segments lie on the same ranks, so that they wait for each other."""
        self.owners = self._owners()
        self.volumes = [self._volume(i) for i in self.stages[:-1]]

    def _owners(self) -> list[tuple[int, ...]]:
        """Return, for the kinds of rank there are, how many segments of each stage it holds.

        Those that begin with the same stage as another kind and hold no more of any than it are left out.
        """
        counts: dict[int, list[int]] = {}
        for i, groups in enumerate(self.placement.groups):
            for ranks in groups:
                for rank in ranks:
                    counts.setdefault(rank, [0] * len(self.parts))[i] += 1
        owners = sorted({tuple(own) for own in counts.values()}, reverse=True)

        def less(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
            return a != b and _first(a) == _first(b) and all(x <= y for x, y in zip(a, b, strict=True))

        return [a for a in owners if not any(less(a, b) for b in owners)]

    # Time

    def step(self) -> Array:
        """Seconds of a step."""
        messages = [self._message(i) for i in self.stages[:-1]]
        worst: Any = 0.0
        for owner in self.owners:
            total: Any = 0.0
            first = _first(owner)
            for i in range(first):
                total = total + (self.together.fill(i, first) + 2 * messages[i].first)
            for i, part in enumerate(self.parts):
                if owner[i]:
                    total = total + (part.work if owner[i] == 1 else owner[i] * part.work)
                    if part.tables.norms[-1]:
                        total = total + owner[i] * self._moments(i)
                    if part.degree > 1 and self.spread[i]:
                        total = total + (part.degree - 1) * part.both
            worst = np.maximum(worst, total + self._wire(owner, messages))
        path, counted = self.together.path
        for message, share in zip(messages, counted, strict=True):
            path = path + message.total * share
        return np.asarray(np.maximum(worst + self.together.uneven, path) + self._reduce())

    def least_s(self) -> float:
        """Return seconds below which no choice of cuts and sizes has its step: the best size of every stage."""
        worst: Any = 0.0
        for owner in self.owners:
            total: Any = 0.0
            for i, part in enumerate(self.parts[_first(owner) :], _first(owner)):
                if owner[i]:
                    total = total + part.least(owner[i], spread=self.spread[i])
            for i in range(_first(owner)):
                total = total + self.parts[i].least(0, spread=False)
            for i, (volume, rate) in enumerate(self.volumes):
                if owner[i] or owner[i + 1]:
                    total = total + 2 * EXPOSED * volume / rate
            if owner[-1]:
                total = total + self._sums(self.parts[-1].calls.min())
            worst = np.maximum(worst, total)
        reductions, last = self._reductions
        return float(np.min(worst + np.maximum(last, reductions - HIDING * self.parts[0].longest_backward)))

    def _volume(self, stage: int) -> tuple[Array, float]:
        """Return the bytes of all exchanges behind a stage on the busiest card, one way, and its bytes per second.

        Of those that have to leave their rank.
        """
        source, target = self.placement.groups[stage][-1], self.placement.groups[stage + 1][0]
        own, following = self.parts[stage], self.parts[stage + 1]
        link, sharing = self.machine.wiring.way(source, target)
        away = 1.0 - _overlap(source, target)
        sent: Any = own.per_rank * away
        received: Any = following.per_rank * away
        if following.tail:
            shards = len(target)
            share = self._sharded[0] / own.leaving if shards > 1 else 1.0
            copies = float(shards) - (1.0 if set(target) & set(source) else 0.0)
            sent, received = own.per_rank * copies * share, self.samples * away * share
        return np.asarray(np.maximum(sent, received) * own.leaving * sharing), link.bytes_per_s

    def _message(self, stage: int) -> Exchange:
        """Return the exchanges behind a stage."""
        link, _ = self.machine.wiring.way(self.placement.groups[stage][-1], self.placement.groups[stage + 1][0])
        volume, rate = self.volumes[stage]
        chunks = self.together.meetings[stage]
        total = volume / rate + chunks * (link.latency_s * (volume > 0))
        return Exchange(np.asarray(total / chunks), np.asarray(total))

    def _wire(self, owner: tuple[int, ...], messages: list[Exchange]) -> Any:
        """What the exchanges of a rank's stages leave exposed."""
        wire: Any = 0.0
        for i, message in enumerate(messages):
            if owner[i] or owner[i + 1]:
                wire = wire + message.exposed(EXPOSED)
        for i, part in enumerate(self.parts):
            if owner[i] and part.degree > 1 and self.spread[i]:
                wire = wire + self._inside(i).exposed(EXPOSED_INSIDE)
        return wire + self._sums(self.parts[-1].calls) if owner[-1] else wire

    def _moments(self, stage: int) -> Any:
        """Seconds in which the synchronised batch norms of a segment tell each other their figures, both ways.

        Nothing hides them. Plan replicas take part where each has one chunk.
        """
        part, ranks = self.parts[stage], self.placement.groups[stage][0]
        if part.tail and part.width > 1:
            return 0.0
        apart = self.machine.wiring.reduction(ranks, self.placement, across=False)
        joint = self.machine.wiring.reduction(ranks, self.placement)
        latency_s = np.where(part.calls == 1, joint.latency_s, apart.latency_s)
        s_per_byte = np.where(part.calls == 1, joint.s_per_byte, apart.s_per_byte)
        return 2 * part.calls * (part.norms * latency_s + part.figures * s_per_byte)

    def _sums(self, calls: Any) -> Any:
        """Seconds that a tail's shards exchange, in so many micro-batches."""
        last = self.parts[-1]
        if not last.tail or last.width == 1:
            return 0.0
        ranks = self.placement.groups[-1][0]
        link, sharing = self.machine.wiring.way(ranks, ranks)
        _, inside, sums = self._sharded
        rounds = sums * calls * 2 * (last.width - 1)
        return 2 * (self.samples * inside * sharing / link.bytes_per_s + rounds * link.latency_s)

    @cached_property
    def _sharded(self) -> tuple[Array, Array, Array]:
        """Per choice of cuts: bytes per sample that enter a tail's shard, that shards exchange, and how often."""
        part = self.parts[-1]
        by_start = {start: self.machine.sharded(start, part.width) for start in set(part.start.tolist())}
        found = [by_start[start] for start in part.start.tolist()]
        tables = part.tables
        chain, itemsize = tables.chain, tables.itemsize
        before = [chain.out_itemsize(start - 1, itemsize) for start in part.start.tolist()]
        within = LOWERED_BYTES if chain.autocast else itemsize
        return (
            np.array([f.entering * size for f, size in zip(found, before, strict=True)]),
            np.array([f.inside * within for f in found]),
            np.array([float(f.sums) for f in found]),
        )

    def _inside(self, stage: int) -> Exchange:
        """Return the exchanges between two segments.

        Where the segments meet is open here; what crosses is taken as the mean over the stage's layers.
        """
        part = self.parts[stage]
        crossed, start, stop = part.tables.crossed, part.start, part.stop
        crossing = (crossed[stop - 1] - crossed[start]) / np.maximum(stop - 1 - start, 1)
        link, sharing = self.machine.wiring.inside(self.placement.groups[stage])
        seconds = part.per_rank * crossing * sharing / link.bytes_per_s + part.calls * link.latency_s
        return Exchange(np.asarray(seconds / part.calls), np.asarray(seconds))

    @cached_property
    def _reductions(self) -> tuple[Any, Any]:
        """Seconds of all gradient reductions, and of the first stage's last bucket, by choice of cuts."""
        total: Any = 0.0
        last: Any = 0.0
        for i, part in enumerate(self.parts):
            ranks = self.placement.groups[i][0]
            group = ranks[:1] if part.tail else ranks
            latency_s, s_per_byte = self.machine.wiring.reduction(group, self.placement)
            buckets = np.maximum(np.floor(part.bytes / self.machine.bucket_bytes), 1.0)
            crowd = self.machine.wiring.crowd(self.placement.groups[i], self.placement, tail=part.tail)
            seconds = (buckets * self.machine.sums * latency_s + part.summed * s_per_byte) * crowd
            total = total + seconds
            if i == 0:
                last = seconds / buckets
        return total, last

    def _reduce(self) -> Any:
        """Gradient reductions that the last backward of the first stage does not hide."""
        total, last = self._reductions
        return np.maximum(last, total - self.parts[0].backward * HIDING)

    # Memory

    def over(self) -> Array:
        """Bytes above the memory limit, of the rank that lacks most."""
        states, limit = 2 + self.machine.optimizer_states, self.machine.limit_bytes
        tables = self.parts[0].tables
        held = max(sum(owner) for owner in self.owners) * states * tables.parameters[-1]
        if held + len(self.parts) * self.samples * tables.saved[-1] < limit:
            return np.zeros((1,) * (len(self.parts) + 1))
        worst: Any = -np.inf
        for owner in self.owners:
            total: Any = 0.0
            for i, part in enumerate(self.parts):
                if owner[i]:
                    copies = self._copies(part, states - 1)
                    total = total + owner[i] * (part.held + copies * part.bytes + self._kept_bytes(i))
            worst = np.maximum(worst, total)
        return np.asarray(np.maximum(worst - limit, 0.0))

    def _copies(self, part: Part, whole: int) -> float:
        """Return the bytes of gradients and optimizer state per byte of gradients on a rank: unsharded ``whole``.

        Of sharded state there is a copy of the parameters, and under stage 2 no lasting bucket.
        """
        sharers = part.width * self.placement.replicas
        if self.machine.sharding == "none" or part.tail or sharers == 1:
            return float(whole)
        bucket = 1 if self.machine.sharding == "zero1" else 0
        return bucket + (1 if self.machine.offload else 1 + whole) / sharers

    def _kept_bytes(self, stage: int) -> Any:
        """Activation bytes of a rank's samples in flight."""
        part = self.parts[stage]
        behind: Any = 0.0
        for later in self.parts[stage:]:
            behind = behind + later.chunk * later.degree
        flying = np.minimum(behind + part.chunk, self.samples)
        flying = flying * (1.0 if part.tail else part.per_rank / self.samples)
        if part.recompute:
            return flying * part.tables.crossing[part.start] + part.size * part.saved
        return flying * part.saved

    def same(self) -> Array:
        """1 where two stages have the same micro-batch size."""
        result: Any = 0.0
        for i in self.stages:
            for j in range(i):
                result = np.maximum(result, (self.parts[i].size == self.parts[j].size).astype(float))
        return np.asarray(result)


def _first(owner: tuple[int, ...]) -> int:
    """Return the first stage that a rank holds a segment of."""
    return next(i for i, count in enumerate(owner) if count)


def _overlap(source: tuple[int, ...], target: tuple[int, ...]) -> float:
    """Share of the samples that already lie where they go."""
    if not set(source) & set(target):
        return 0.0
    return 1.0 / max(len(source), len(target)) if source != target else 1.0 / len(source)
