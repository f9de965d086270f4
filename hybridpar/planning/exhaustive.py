"""Every draft of a small space, and the best of them for certain."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

from hybridpar.planning.cuts import ascend
from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.placement import Placement
from hybridpar.planning.scorer import Scorer


def drafts(drafting: Drafting, placement: Placement) -> Iterator[Draft]:
    """Yield all drafts of a placement: the product of all choices of docs/planner.md."""
    request = drafting.request
    stages = range(len(placement.kinds))
    sizes = [drafting.sizes(placement, i) for i in stages]
    recompute = [drafting.recomputations(placement, i) for i in stages]
    for bounds in _bounds(drafting, placement):
        for chosen in product(*sizes):
            base = Draft(
                placement, bounds, chosen, (None,) * len(stages), (False,) * len(stages), (), request.orders[0]
            )
            caps = [drafting.caps(base, i) for i in stages]
            pinned = request.pin("tail").sharding
            modes = drafting.modes(base)
            shardings = iter((pinned,)) if pinned is not None and modes else product(*modes)
            keeping = list(product(product(*caps), product(*recompute)))
            rules = list(product(request.orders, drafting.shardings(placement), drafting.buckets(placement)))
            for sharding in shardings:  # two to the power of the linears: never a list
                for (cap, again), (order, state, bucket) in product(keeping, rules):
                    yield Draft(placement, bounds, chosen, cap, again, sharding, order, state, bucket)


def _bounds(drafting: Drafting, placement: Placement) -> Iterator[tuple[int, ...]]:
    """Yield all ascending bounds where every position may end and gets parameters."""
    count = sum(len(groups) for groups in placement.groups) - 1
    pinned = drafting.cuts.pinned(placement)
    allowed = [{pinned[i]} if i in pinned else set(drafting.cuts.points(placement, i)) for i in range(count)]
    points = sorted(set().union(*allowed)) if allowed else []
    for bounds in combinations(points, count):
        if all(b in a for a, b in zip(allowed, bounds, strict=True)) and ascend(
            bounds, len(drafting.chain.layers)
        ):
            yield bounds


def best(scorer: Scorer, every: list[Draft]) -> Draft | None:
    """Return the best of all drafts. Those whose lower bound is above the best so far cannot be better."""
    found: Draft | None = None
    for draft in sorted(every, key=scorer.bound):
        score = scorer.score(draft, None if found is None else scorer.score(found))
        if found is None or (draft in scorer.scores and score < scorer.score(found)):
            found = draft
    return found
