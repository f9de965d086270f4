"""The search of a space that is too large to be searched whole.

The best few estimates of every placement are simulated, and the best of those improved by changing one choice at a
time (a micro-batch size, a cut, the sharding of a linear, the order rule; and what is kept for the backward, where
memory lacks) for as long as the step gets faster, or the effort is spent. The size of the gradient buckets comes
last. ``scripts/bench/planner`` measures how far that is from a far longer search.
"""

from __future__ import annotations

from dataclasses import replace

from hybridpar.planning.draft import Draft
from hybridpar.planning.estimate import Estimator
from hybridpar.planning.neighbours import neighbours
from hybridpar.planning.placement import Placement
from hybridpar.planning.request import Effort
from hybridpar.planning.scorer import Score, Scorer

PER_PLACEMENT: dict[Effort, int] = {"quick": 1, "normal": 1, "long": 12, "exact": 0}
"""Estimates of a placement that may be simulated."""
SIMULATED: dict[Effort, int] = {"quick": 3, "normal": 10, "long": 200, "exact": 0}
"""Estimates of a shape that are simulated, best first."""
IMPROVED: dict[Effort, int] = {"quick": 1, "normal": 3, "long": 24, "exact": 0}
"""Of those, the ones that are improved, best first."""
COSTLY = 1 / 6
"""Share of a shape's actions above which a draft is simulated only after the cheaper ones."""
WORTHWHILE = 0.002
"""Share of the step time by which a neighbour must be better."""
WORTHWHILE_BYTES = 0.1
"""Likewise of the bytes above the memory limit, as long as nothing fits."""
PATIENCE = 8
"""Times the actions that a shape may use as long as nothing fits."""


def best(places: list[Placement], scorer: Scorer, until: int, effort: Effort) -> Draft | None:
    """Return the best draft found; None where no placement gives each stage a layer.

    ``until`` is the count of simulated actions at which the search ends.
    """
    tried = _simulated(places, scorer, until, effort)
    if not tried:
        return None
    starts = sorted(tried, key=scorer.least)
    improved = [_improve(start, scorer, until) for start in starts[: IMPROVED[effort]]]
    known = [draft for draft in tried if draft in scorer.scores]
    found = min([*known, *improved], key=scorer.score)
    if scorer.score(found)[0] == 0:
        return _rebucketed(found, scorer)
    lean = (scorer.drafting.lean(start) for start in starts)
    return next((_improve(draft, scorer, until) for draft in lean if scorer.fits(draft)), found)


def _simulated(places: list[Placement], scorer: Scorer, until: int, effort: Effort) -> list[Draft]:
    """Simulate the best estimates; those that prove worse than the best so far are left before their end."""
    half = (scorer.actions + until) // 2
    estimator = Estimator(scorer.drafting)
    costly = (until - scorer.actions) * COSTLY
    tried: list[Draft] = []
    least: Score | None = None
    for estimate in estimator.ranked(places, PER_PLACEMENT[effort], SIMULATED[effort], costly):
        draft = estimator.draft(estimate)
        if draft is None:
            continue
        score = scorer.score(draft, least)
        tried.append(draft)
        if draft in scorer.scores:
            least = score if least is None else min(least, score)
        if len(tried) >= SIMULATED[effort] or scorer.actions > half:
            break
    return tried


def _rebucketed(draft: Draft, scorer: Scorer) -> Draft:
    """Try the next larger and smaller gradient buckets for as long as the step gets faster.

    Only of the best draft: what buckets cost hardly depends on the other choices.
    """
    buckets = scorer.drafting.buckets(draft.placement)
    if len(buckets) == 1:
        return draft
    first = buckets.index(scorer.request.usual_bucket)
    for way in (1, -1):
        at = first + way
        while 0 <= at < len(buckets):
            other = replace(draft, bucket_bytes=buckets[at])
            if scorer.score(other, scorer.score(draft)) >= scorer.score(draft):
                break
            draft, at = other, at + way
        if draft.bucket_bytes is not None:
            break
    return draft


def _improve(draft: Draft, scorer: Scorer, until: int) -> Draft:
    """Step to a better neighbour until there is none; those whose bound rules them out are not simulated."""
    while True:
        rank, value = scorer.score(draft)
        limit: Score = (rank, value * (1 - (WORTHWHILE if rank == 0 else WORTHWHILE_BYTES)))
        others = neighbours(scorer.drafting, draft, lacking=rank == 1)
        better = None
        for neighbour in sorted(others, key=scorer.bound):
            if scorer.actions > until * (1 if rank == 0 else PATIENCE):
                return draft
            if scorer.score(neighbour, limit) < limit:
                better = neighbour
                break
        if better is None:
            return draft
        draft = better
