"""Estimates: which drafts to simulate, of the very many that the formulas rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, product

import numpy as np

from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.formulas import Formulas, Machine, Together
from hybridpar.planning.part import Choices, Part
from hybridpar.planning.placement import Placement
from hybridpar.planning.plan import ITEMSIZE, SHARDINGS
from hybridpar.planning.tables import Tables
from hybridpar.planning.wiring import Wiring

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


class Estimator:
    """Estimates for one chain, profile, cluster and request."""

    def __init__(self, drafting: Drafting) -> None:
        self.drafting, self.request = drafting, drafting.request
        cluster, compression = drafting.cluster, self.request.recipe.compression
        self.tables = Tables(drafting.chain, drafting.profile, ITEMSIZE[self.request.precision], compression)
        self.machine = Machine(
            Wiring(cluster),
            min(cluster.memory_bytes(r) for r in range(cluster.world)),
            self.request.recipe.optimizer_states + self.request.recipe.average,
            max(self.request.optimizer_shardings, key=SHARDINGS.index),
            self.request.recipe.offload,
            self.request.usual_bucket,
            1 if compression is None else compression.most_sums,
            drafting.sharded,
        )
        self._choices: dict[tuple[object, ...], Choices] = {}
        self._parts: dict[tuple[object, ...], Part] = {}
        self._together: dict[tuple[Part, ...], Together] = {}

    def ranked(self, places: Iterable[Placement], each: int, wanted: int, costly: float) -> list[Estimate]:
        """Return the best choices of all placements, at most ``each`` of one; those above ``costly`` actions last.

        Placements whose least time is above that of ``wanted`` estimates which fit and are not costly are left
        out: none of theirs would be among the first so many.
        """
        order = count()  # of equal ones the earlier
        queue = [(self.least_s(p), next(order), p) for p in places if self._cuts(p).cuts]
        found: list[Estimate] = []
        fastest: list[float] = []
        for least_s, _, placement in sorted(queue, key=lambda entry: entry[:2]):
            if len(fastest) == wanted and least_s > -fastest[0]:
                break
            own = self._best(placement, each)
            found += own
            for estimate in own:
                if not estimate.over_bytes and estimate.actions <= costly:
                    (heapq.heappush if len(fastest) < wanted else heapq.heappushpop)(fastest, -estimate.step_s)
        return sorted(found, key=lambda e: (e.actions > costly, *e.key))

    def least_s(self, placement: Placement) -> float:
        """Return seconds that no estimate of a placement is below."""
        recompute = (min(self.drafting.recomputations(placement, i)) for i in range(len(placement.kinds)))
        return self._formulas(placement, tuple(recompute)).least_s()

    def _best(self, placement: Placement, most: int) -> list[Estimate]:
        """Return the best choices for a placement, best first."""
        found: list[Estimate] = []
        choices = [self.drafting.recomputations(placement, i) for i in range(len(placement.kinds))]
        for recompute in sorted(product(*choices), key=sum):
            if found and min(e.over_bytes for e in found) == 0.0:
                break
            found += self._of(self._formulas(placement, recompute), recompute, most)
        return sorted(found, key=lambda e: e.key)[:most]

    def _of(self, formulas: Formulas, recompute: tuple[bool, ...], most: int) -> list[Estimate]:
        """Return the best choices of cuts and sizes by the formulas."""
        step, over = np.broadcast_arrays(formulas.step(), formulas.over())
        if self.request.distinct:
            over = over + formulas.same() * FORBIDDEN_BYTES
        score = np.where(over > 0, SLOWER_THAN_ANY + over, step).ravel()
        few = min(8 * most, score.size) - 1
        best = np.argpartition(score, few)[: few + 1]
        found: list[Estimate] = []
        taken: set[tuple[int, ...]] = set()
        placement, cuts = formulas.placement, formulas.parts[0].choices.cuts
        for flat in best[np.argsort(score[best], kind="stable")]:
            at = np.unravel_index(flat, step.shape)
            chosen = tuple(part.sizes[at[i]] for i, part in enumerate(formulas.parts))
            if chosen not in taken:
                taken.add(chosen)
                seconds, excess = float(step[at]), float(over[at])
                found.append(
                    Estimate(placement, cuts[at[-1]], chosen, recompute, seconds, excess, formulas.samples)
                )
        return found[:most]

    def draft(self, estimate: Estimate) -> Draft | None:
        """Return an estimate's draft, the middle balanced; None where a segment would get no parameters."""
        placement = estimate.placement
        bounds = self.drafting.cuts.balanced(placement, estimate.cuts, estimate.micro_batches)
        if bounds is None:
            return None
        caps = tuple(self.request.pin(kind).in_flight for kind in placement.kinds)
        order, sharded = self.request.orders[0], self.drafting.shardings(placement)[0]
        return self.drafting.resharded(
            Draft(placement, bounds, estimate.micro_batches, caps, estimate.recompute, (), order, sharded)
        )

    def _formulas(self, placement: Placement, recompute: tuple[bool, ...]) -> Formulas:
        choices, stages = self._cuts(placement), len(placement.kinds)
        parts = []
        for i, (kind, groups) in enumerate(zip(placement.kinds, placement.groups, strict=True)):
            sizes = tuple(_thinned(self.drafting.sizes(placement, i), MOST_SIZES[stages]))
            width, samples = max(map(len, groups)), self.drafting.samples(placement)
            key = (choices, i, len(groups), width, sizes, samples, recompute[i])
            if key not in self._parts:
                self._parts[key] = Part(
                    self.tables, choices, kind, i, stages, len(groups), width, sizes, samples, recompute[i]
                )
            parts.append(self._parts[key])
        together = self._together.setdefault(tuple(parts), Together(tuple(parts)))
        return Formulas(self.machine, placement, together)

    def _cuts(self, placement: Placement) -> Choices:
        """Return the choices of cuts between stages."""
        pinned = self.drafting.cuts.pinned(placement)
        key = (placement.kinds, tuple(len(g) for g in placement.groups), tuple(sorted(pinned.items())))
        if key not in self._choices:
            options, at = [], 0
            for groups in placement.groups[:-1]:
                at += len(groups)
                points = self.drafting.cuts.points(placement, at - 1)
                here = [pinned[at - 1]] if at - 1 in pinned else None
                options.append(here or _thinned(points, MOST_CUTS[len(placement.kinds)]))
            cuts = [c for c in product(*options) if self.drafting.cuts.has_room(placement, c)]
            self._choices[key] = Choices(cuts, len(self.drafting.chain.layers))
        return self._choices[key]


def _thinned(values: list[int], most: int) -> list[int]:
    """Return at most so many of the values, the last among them, evenly spread."""
    every = max(-(-len(values) // most), 1)
    return values[::-1][::every][::-1]
