"""An estimate of the step time and memory of very many drafts at once, to choose which ones to simulate.

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

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridpar.cluster.collectives import all_reduce
from hybridpar.cluster.topology import Cluster, Link
from hybridpar.model.chain import Chain
from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.placement import Placement
from hybridpar.profiling.record import Profile

Array = npt.NDArray[np.float64]
SLOWER_THAN_ANY = 1e12
"""Seconds; what does not fit into memory comes after everything that does."""
FORBIDDEN_BYTES = 1e18
MOST_CUTS = {2: 48, 3: 20}
"""Cuts of one boundary that are tried, by stages; of more, every n-th, and the search moves on from there."""
MOST_SIZES = {1: 16, 2: 16, 3: 6}
"""Likewise of a stage's micro-batch sizes."""


@dataclass(frozen=True)
class Estimate:
    """What the formulas say of one choice of cuts, micro-batches and recomputation on a placement."""

    placement: Placement
    cuts: tuple[int, ...]
    micro_batches: tuple[int, ...]
    recompute: tuple[bool, ...]
    step_s: float
    over_bytes: float
    """Bytes above the memory limit; 0 where it fits."""
    samples: int
    """Per step, of the largest plan replica."""

    @property
    def actions(self) -> int:
        """Roughly, how many actions the program has: six for every micro-batch of a rank."""
        calls = 0
        samples = self.samples
        for kind, groups, size in zip(
            self.placement.kinds, self.placement.groups, self.micro_batches, strict=True
        ):
            for ranks in groups:
                chunk = size if kind == "tail" else size * len(ranks)
                calls += -(-samples // chunk) * len(ranks)
        return 6 * calls

    @property
    def key(self) -> tuple[float, float]:
        """Fitting ones first, then faster ones."""
        return self.over_bytes, self.step_s


EXPOSED = 0.25
"""Share of the later chunks' exchanges that computations do not hide. A guess, which only orders drafts."""
EXPOSED_INSIDE = 0.5
"""Likewise between the segments of a pipeline."""
EVEN = 1e-9
"""Chunks of two stages meet when the ratio of their samples is an integer."""


class Estimator:
    """Estimates for one chain, profile, cluster and request."""

    def __init__(self, drafting: Drafting) -> None:
        self.drafting, self.request = drafting, drafting.request
        self.chain: Chain = drafting.chain
        self.profile: Profile = drafting.profile
        self.cluster: Cluster = drafting.cluster
        self.itemsize = {"float32": 4, "float64": 8}[self.request.precision]
        self._times: dict[tuple[int, float, bool], Array] = {}
        self._spans: dict[tuple[object, ...], Array] = {}
        self._choices: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
        self._reductions: dict[tuple[tuple[int, ...], int, int], tuple[float, float]] = {}

    @cached_property
    def limit_bytes(self) -> float:
        """Memory of the smallest device."""
        return min(self.cluster.memory_bytes(r) for r in range(self.cluster.world))

    @cached_property
    def _parameters(self) -> Array:
        """Parameter bytes of all layers before each."""
        return np.cumsum([0.0, *(layer.parameter_count * self.itemsize for layer in self.chain.layers)])

    @cached_property
    def _saved(self) -> Array:
        """Bytes per sample that all layers before each keep for their backward passes."""
        kept = [0.0]
        for i, layer in enumerate(self.chain.layers):
            own = layer.saved.elements_per_sample * self.itemsize + layer.saved.bytes_per_sample
            following = self.chain.layers[i + 1 : i + 2]
            if layer.saves_output or (following and following[0].saves_input):
                own += layer.out_elements * self.itemsize
            kept.append(float(own))
        return np.cumsum(kept)

    @cached_property
    def _crossing(self) -> Array:
        """Bytes per sample that cross before each layer."""
        sizes = [self.chain.layers[0].in_elements, *(layer.out_elements for layer in self.chain.layers)]
        return np.array(sizes, dtype=float) * self.itemsize

    def _time(self, size: int, fraction: float, *, backward: bool) -> Array:
        """Seconds of all layers before each, at a micro-batch size."""
        key = (size, fraction, backward)
        if key not in self._times:
            of = self.profile.backward_time if backward else self.profile.forward_time
            layers = range(len(self.chain.layers))
            self._times[key] = np.cumsum([0.0, *(of(i, size, fraction) for i in layers)])
        return self._times[key]

    def best(self, placement: Placement, count: int) -> list[Estimate]:
        """Return the ``count`` best choices for a placement, best first; none where no cut fits."""
        cuts = self._cuts(placement)
        if not cuts:
            return []
        stages = len(placement.kinds)
        sizes = [_thinned(self.drafting.sizes(placement, i), MOST_SIZES[stages]) for i in range(stages)]
        found: list[Estimate] = []
        choices = [self.drafting.recomputations(placement, i) for i in range(len(placement.kinds))]
        for recompute in sorted(product(*choices), key=sum):
            if found and min(e.over_bytes for e in found) == 0.0:
                break
            found += self._grid(placement, cuts, sizes, recompute, count)
        return sorted(found, key=lambda e: e.key)[:count]

    def _grid(
        self,
        placement: Placement,
        cuts: list[tuple[int, ...]],
        sizes: list[list[int]],
        recompute: tuple[bool, ...],
        count: int,
    ) -> list[Estimate]:
        grid = _Grid(self, placement, cuts, sizes, recompute)
        step, over = np.broadcast_arrays(grid.step(), grid.over())
        if self.request.distinct:
            over = over + grid.same() * FORBIDDEN_BYTES
        score = np.where(over > 0, SLOWER_THAN_ANY + over, step).ravel()
        few = min(8 * count, score.size) - 1
        best = np.argpartition(score, few)[: few + 1]
        found: list[Estimate] = []
        taken: set[tuple[int, ...]] = set()
        for flat in best[np.argsort(score[best], kind="stable")]:
            at = np.unravel_index(flat, step.shape)
            chosen = tuple(own[at[i]] for i, own in enumerate(sizes))
            if chosen not in taken:
                taken.add(chosen)
                found.append(
                    Estimate(
                        placement, cuts[at[-1]], chosen, recompute, float(step[at]), float(over[at]), grid.samples
                    )
                )
        return found[:count]

    def draft(self, estimate: Estimate) -> Draft | None:
        """Return an estimate's draft, the middle balanced; None where a segment would get no parameters."""
        placement = estimate.placement
        bounds = self.drafting.balanced_bounds(placement, estimate.cuts, estimate.micro_batches)
        if bounds is None:
            return None
        caps = tuple(self.request.pin(kind).in_flight for kind in placement.kinds)
        order, sharded = self.request.orders[0], self.drafting.shardings(placement)[0]
        return self.drafting.resharded(
            Draft(placement, bounds, estimate.micro_batches, caps, estimate.recompute, (), order, sharded)
        )

    def between(self, start: Array, stop: Array, key: object, size: int, fraction: float, backward: bool) -> Array:
        """Seconds of the layers from ``start`` to ``stop``, for many choices of both that ``key`` stands for."""
        known = (key, size, fraction, backward)
        if known not in self._spans:
            total = self._time(size, fraction, backward=backward)
            self._spans[known] = total[stop] - total[start]
        return self._spans[known]

    def _cuts(self, placement: Placement) -> list[tuple[int, ...]]:
        """Return the choices of cuts between stages."""
        if len(placement.kinds) == 1:
            return [()]
        pinned = self.drafting.pinned_bounds(placement)
        key = (placement.kinds, tuple(len(g) for g in placement.groups), tuple(sorted(pinned.items())))
        if key not in self._choices:
            options, at = [], 0
            for groups in placement.groups[:-1]:
                at += len(groups)
                points = self.drafting.points(placement, at - 1)
                here = [pinned[at - 1]] if at - 1 in pinned else None
                options.append(here or _thinned(points, MOST_CUTS[len(placement.kinds)]))
            self._choices[key] = [c for c in product(*options) if self.drafting.has_room(placement, c)]
        return self._choices[key]

    def reduction(self, ranks: tuple[int, ...], placement: Placement) -> tuple[float, float]:
        """Return latency and seconds per byte of an all-reduce over ranks of every plan replica."""
        key = (ranks, placement.world, placement.replicas)
        if key not in self._reductions:
            everyone = sorted({r + k * placement.world for k in range(placement.replicas) for r in ranks})
            if len(everyone) == 1:
                self._reductions[key] = 0.0, 0.0
            else:
                latency = all_reduce(self.cluster, everyone, 0)
                large = 1e9
                rate = (all_reduce(self.cluster, everyone, large) - latency) / large
                self._reductions[key] = latency, rate
        return self._reductions[key]

    def link(self, ranks: set[int]) -> tuple[Link, int]:
        """Return the slowest link among ranks of a replica, and how many of them share a card on it."""
        nodes = sorted({self.cluster.node_of[r] for r in ranks})
        if len(nodes) == 1:
            return self.cluster.link("node"), 1
        first = [r for r in ranks if self.cluster.node_of[r] == nodes[0]]
        last = [r for r in ranks if self.cluster.node_of[r] == nodes[-1]]
        return self.cluster.link(self.cluster.level(first[0], last[0])), max(len(first), len(last))


def _thinned(values: list[int], most: int) -> list[int]:
    """Return at most so many of the values, the last among them, evenly spread."""
    every = max(-(-len(values) // most), 1)
    return values[::-1][::every][::-1]


class _Grid:
    """The formulas for one placement."""

    def __init__(
        self,
        estimator: Estimator,
        placement: Placement,
        cuts: list[tuple[int, ...]],
        sizes: list[list[int]],
        recompute: tuple[bool, ...],
    ) -> None:
        self.own, self.placement, self.recompute = estimator, placement, recompute
        self.stages = range(len(placement.kinds))
        self.samples = estimator.drafting.samples(placement)
        last = len(estimator.chain.layers)
        self.key = id(cuts), len(cuts)
        edges = np.array([(0, *c, last) for c in cuts])
        self.start = [edges[:, i] for i in self.stages]
        self.stop = [edges[:, i + 1] for i in self.stages]
        self.degree = [len(groups) for groups in placement.groups]
        self.width = [max(len(ranks) for ranks in groups) for groups in placement.groups]
        self.tail = [kind == "tail" for kind in placement.kinds]
        self.size = [self._axis(np.array(own, dtype=float), i) for i, own in enumerate(sizes)]
        self.per_rank = [
            float(self.samples) if tail else float(-(-self.samples // width))
            for tail, width in zip(self.tail, self.width, strict=True)
        ]
        self.calls = [np.ceil(n / b) for n, b in zip(self.per_rank, self.size, strict=True)]
        self.chunk = [b * (1 if t else w) for b, t, w in zip(self.size, self.tail, self.width, strict=True)]
        self.forward = [self._pass(i, sizes[i], backward=False) for i in self.stages]
        self.backward = [self._pass(i, sizes[i], backward=True) for i in self.stages]
        for i in self.stages:
            if recompute[i]:
                self.backward[i] = self.backward[i] + self.forward[i]
        self.owners = self._owners()
        self.entering, self.inside, self.sums = self._sharded()

    def _axis(self, values: Array, stage: int) -> Array:
        """Lay values of one stage's sizes along its axis; the last axis is the cuts'."""
        shape = [1] * (len(self.placement.kinds) + 1)
        shape[stage] = len(values)
        return values.reshape(shape)

    def _pass(self, stage: int, sizes: list[int], *, backward: bool) -> Array:
        """Seconds of one chunk through a stage's slowest segment."""
        fraction = 1.0 / self.width[stage] if self.tail[stage] else 1.0
        start, stop, key = self.start[stage], self.stop[stage], (self.key, stage)
        rows = [self.own.between(start, stop, key, size, fraction, backward) for size in sizes]
        shape = [1] * (len(self.placement.kinds) + 1)
        shape[stage], shape[-1] = len(sizes), len(self.start[stage])
        return np.array(rows).reshape(shape) / self.degree[stage]

    def _sharded(self) -> tuple[Array, Array, Array]:
        """Per choice of cuts: bytes per sample that enter a tail's shard, that shards exchange, and how often."""
        if not self.tail[-1] or self.width[-1] == 1:
            return np.zeros(1), np.zeros(1), np.zeros(1)
        found = [self.own.drafting.sharded(int(start), self.width[-1]) for start in self.start[-1]]
        itemsize = self.own.itemsize
        return (
            np.array([f.entering * itemsize for f in found]),
            np.array([f.inside * itemsize for f in found]),
            np.array([float(f.sums) for f in found]),
        )

    def _owners(self) -> list[tuple[int, ...]]:
        """Return, for every kind of rank there is, how many segments of each stage it holds."""
        groups = self.placement.groups
        owners = {
            tuple(sum(rank in s for s in groups[i]) for i in self.stages) for rank in range(self.placement.world)
        }
        return sorted(o for o in owners if any(o))

    def _bytes(self, stage: int) -> Array:
        """Parameter bytes of one rank of a stage's segment."""
        held = self.own._parameters[self.stop[stage]] - self.own._parameters[self.start[stage]]  # noqa: SLF001
        return np.asarray(held / (self.width[stage] if self.tail[stage] else self.degree[stage]))

    def step(self) -> Array:
        """Seconds of a step."""
        messages = [self._message(i) for i in self.stages[:-1]]
        worst: Any = 0.0
        update = self.own.profile.update_s_per_byte
        for owner in self.owners:
            held = [i for i in self.stages if owner[i]]
            total: Any = 0.0
            for i in held:
                passes = self.calls[i] * (self.forward[i] + self.backward[i])
                total = total + owner[i] * (passes + self._bytes(i) * update)
            total = total + self._idle(held, messages) + self._wire(held, messages)
            worst = np.maximum(worst, total)
        return np.asarray(np.maximum(worst, self._path(messages)) + self._reduce())

    def _path(self, messages: list[tuple[Array, Array]]) -> Any:
        """Seconds for the largest chunk of any stage through all of them and back.

        Stages take turns over it, unless both of two neighbours have smaller chunks.
        """
        largest: Any = 0.0
        for chunk in self.chunk:
            largest = np.maximum(largest, np.minimum(chunk, self.samples))
        times = [
            (np.ceil(largest / self.chunk[i]) + self.degree[i] - 1) * (self.forward[i] + self.backward[i])
            for i in self.stages
        ]
        path: Any = sum(times)
        for i in self.stages[:-1]:
            together = (self.chunk[i] < largest) & (self.chunk[i + 1] < largest)
            path = path - together * np.minimum(times[i], times[i + 1])
            path = path + 2 * messages[i][1] * (largest / self.samples) * ~together
        return path

    def _idle(self, held: list[int], messages: list[tuple[Array, Array]]) -> Any:
        """Fill and drain before the first of a rank's stages, of its pipeline, and where chunks do not meet."""
        idle: Any = 0.0
        first = held[0]
        for i in range(first):
            repeats = np.ceil(self.chunk[first] / self.chunk[i])
            idle = idle + (repeats + self.degree[i] - 1) * (self.forward[i] + self.backward[i])
            idle = idle + 2 * messages[i][0]
        for i in held:
            if self.degree[i] > 1:
                chunk = self.forward[i] + self.backward[i]
                idle = idle + (self.degree[i] - 1) * chunk * self._spread(i)
        for i in self.stages[:-1]:
            ratio = np.maximum(self.chunk[i], self.chunk[i + 1]) / np.minimum(self.chunk[i], self.chunk[i + 1])
            uneven = np.abs(ratio - np.round(ratio)) > EVEN
            idle = idle + uneven * (
                self.forward[i] + self.backward[i] + self.forward[i + 1] + self.backward[i + 1]
            )
        return idle

    def _spread(self, stage: int) -> float:
        """0 where all segments of a stage lie on the same ranks, which then never wait for each other."""
        groups = self.placement.groups[stage]
        return 0.0 if all(set(g) == set(groups[0]) for g in groups) else 1.0

    def _message(self, stage: int) -> tuple[Array, Array]:
        """Seconds of the first chunk's exchange behind a stage, and of all of a step's, one way."""
        groups = self.placement.groups
        source, target = groups[stage][-1], groups[stage + 1][0]
        link, sharing = self.own.link(set(source) | set(target))
        crossing = self.own._crossing[self.stop[stage]]  # noqa: SLF001 - the estimator's own grid
        away = 1.0 - self._overlap(source, target)
        if self.tail[stage + 1]:
            shards = len(target)
            share = self.entering / self.own._crossing[self.stop[stage]] if shards > 1 else 1.0  # noqa: SLF001
            copies = float(shards) - (1.0 if set(target) & set(source) else 0.0)
            sent, received = self.per_rank[stage] * copies * share, self.samples * away * share
        else:
            sent, received = self.per_rank[stage] * away, self.per_rank[stage + 1] * away
        volume = np.maximum(sent, received) * crossing * sharing
        chunks = np.ceil(self.samples / np.maximum(self.chunk[stage], self.chunk[stage + 1]))
        total = volume / link.bytes_per_s + chunks * link.latency_s * (volume > 0)
        return np.asarray(total / chunks), np.asarray(total)

    @staticmethod
    def _overlap(source: tuple[int, ...], target: tuple[int, ...]) -> float:
        """Share of the samples that already lie where they go."""
        if not set(source) & set(target):
            return 0.0
        return 1.0 / max(len(source), len(target)) if source != target else 1.0 / len(source)

    def _wire(self, held: list[int], messages: list[tuple[Array, Array]]) -> Any:
        """What the exchanges of a rank's stages leave exposed: nothing else runs during the first chunk's."""
        wire: Any = 0.0
        for i, (first, total) in enumerate(messages):
            if i in held or i + 1 in held:
                wire = wire + 2 * (first + EXPOSED * (total - first))
        for i in held:
            if self.degree[i] > 1 and self._spread(i):
                first, total = self._inside(i)
                wire = wire + 2 * (first + EXPOSED_INSIDE * (total - first))
        last = self.stages[-1]
        if self.tail[last] and self.width[last] > 1 and last in held:
            link, sharing = self.own.link(set(self.placement.groups[last][0]))
            rounds = self.sums * self.calls[last] * 2 * (self.width[last] - 1)
            wire = wire + 2 * (self.samples * self.inside * sharing / link.bytes_per_s + rounds * link.latency_s)
        return wire

    def _inside(self, stage: int) -> tuple[Array, Array]:
        """Seconds of the first chunk's exchange between two segments, and of all of a step's, one way.

        Where the segments meet is open here; what crosses is taken as the mean over the stage's layers.
        """
        total = np.cumsum(self.own._crossing)  # noqa: SLF001 - the estimator's own grid
        start, stop = self.start[stage], self.stop[stage]
        crossing = (total[stop - 1] - total[start]) / np.maximum(stop - 1 - start, 1)
        groups = self.placement.groups[stage]
        links = [self.own.link(set(a) | set(b)) for a, b in pairwise(groups) if set(a) != set(b)]
        link, sharing = max(links, key=lambda found: found[1] / found[0].bytes_per_s)
        volume = self.per_rank[stage] * crossing * sharing
        seconds = volume / link.bytes_per_s + self.calls[stage] * link.latency_s
        return np.asarray(seconds / self.calls[stage]), np.asarray(seconds)

    def _reduce(self) -> Any:
        """Gradient reductions that the last backward of the first stage does not hide."""
        total: Any = 0.0
        last: Any = 0.0
        for i in self.stages:
            ranks = self.placement.groups[i][0]
            group = ranks[:1] if self.tail[i] else ranks
            latency, rate = self.own.reduction(group, self.placement)
            held = self._bytes(i)
            buckets = np.maximum(np.floor(held / self.own.request.bucket_bytes), 1.0)
            seconds = (buckets * latency + held * rate) * self._crowd(i)
            total = total + seconds
            if i == 0:
                last = seconds / buckets
        hidden = self.backward[0] * 0.8
        return np.maximum(last, total - hidden)

    def _crowd(self, stage: int) -> int:
        """Return how many reductions of a stage share a node's card: one per shard or segment on the node."""
        nodes = self.own.cluster.node_of
        if nodes[0] == nodes[self.placement.world * self.placement.replicas - 1]:
            return 1
        groups = self.placement.groups[stage]
        if self.tail[stage]:
            groups = tuple((rank,) for rank in groups[0])
        sharing = Counter(node for ranks in groups for node in {nodes[r] for r in ranks})
        crossing = self.placement.replicas > 1 or any(len({nodes[r] for r in ranks}) > 1 for ranks in groups)
        return max(sharing.values()) if crossing else 1

    def over(self) -> Array:
        """Bytes above the memory limit, of the rank that lacks most."""
        estimator = self.own
        states = 2 + estimator.request.recipe.optimizer_states
        limit = estimator.limit_bytes
        held = max(sum(owner) for owner in self.owners) * states * estimator._parameters[-1]  # noqa: SLF001
        if held + len(self.stages) * self.samples * estimator._saved[-1] < limit:  # noqa: SLF001
            return np.zeros((1,) * (len(self.stages) + 1))
        worst: Any = -np.inf
        for owner in self.owners:
            total: Any = 0.0
            for i in self.stages:
                if not owner[i]:
                    continue
                total = total + owner[i] * states * self._bytes(i) + owner[i] * self._kept_bytes(i)
            worst = np.maximum(worst, total)
        return np.asarray(np.maximum(worst - limit, 0.0))

    def _kept_bytes(self, stage: int) -> Any:
        """Activation bytes of a rank's samples in flight."""
        saved = self.own._saved[self.stop[stage]] - self.own._saved[self.start[stage]]  # noqa: SLF001
        divisor = self.width[stage] if self.tail[stage] else self.degree[stage]
        behind: Any = 0.0
        for i in self.stages[stage:]:
            behind = behind + self.chunk[i] * self.degree[i]
        flying = np.minimum(behind + self.chunk[stage], self.samples)
        flying = flying * (1.0 if self.tail[stage] else self.per_rank[stage] / self.samples)
        if self.recompute[stage]:
            entering = self.own._crossing[self.start[stage]]  # noqa: SLF001
            return flying * entering + self.size[stage] * saved / divisor
        return flying * saved / divisor

    def same(self) -> Array:
        """1 where two stages have the same micro-batch size."""
        result: Any = 0.0
        for i in self.stages:
            for j in range(i):
                result = np.maximum(result, (self.size[i] == self.size[j]).astype(float))
        return np.asarray(result)
