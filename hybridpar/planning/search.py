"""The search: the fastest plan of every shape that fits into memory, by simulated time.

A space of few drafts is searched whole: in the order of a lower bound, until no bound is below the best. Otherwise
the best few estimates of every placement are simulated, and the best of those improved by changing one choice at a
time (a micro-batch size, a cut, the sharding of a linear, the order rule; and what is kept for the backward, where
memory lacks) for as long as the step gets faster, or the effort is spent. The size of the gradient buckets comes
last. That is a heuristic: ``scripts/bench/planner`` measures how far it is from a far longer search. The effort is
counted in simulated actions, never in seconds, so that a plan does not depend on the machine that plans.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NoReturn

from hybridpar.cluster.topology import Cluster
from hybridpar.errors import MemoryLimitError, PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning import exhaustive
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.estimate import Estimator
from hybridpar.planning.neighbours import neighbours
from hybridpar.planning.placement import Placement, placements
from hybridpar.planning.plan import Kind, Plan, Prediction, validate
from hybridpar.planning.request import SHAPES, STAGES_OF, Effort, Pin, Request, Shape
from hybridpar.planning.scorer import Score, Scorer, shortage
from hybridpar.planning.simulate import predict
from hybridpar.profiling.record import Profile

EXHAUSTIVE: dict[Effort, int] = {"quick": 12, "normal": 24, "long": 2_000, "exact": 200_000}
"""Drafts of a shape up to which its space is searched whole."""
ACTIONS: dict[Effort, tuple[int, int, int]] = {
    "quick": (4_000, 1_000, 20),
    "normal": (3_000, 2_600, 25),
    "long": (2_000_000, 200_000, 10_000),
    "exact": (3_000, 2_600, 25),
}
"""Simulated actions of a search: at all, for each of the first ``FEW_RANKS`` ranks, and for each one beyond.

A space that is searched whole takes what it takes.
"""
FEW_RANKS = 16
PART: dict[Shape, float] = {"data_parallel": 0.1, "pipeline": 0.2, "front_tail": 0.3, "three_stage": 0.4}
"""Share of the actions that a shape may use; what it leaves goes to the next."""
LEAN = 12
"""Placements of a shape that are tried to say which batch would fit."""
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
TIE = 1e-9
"""Share of the step time within which shapes are equally fast; the simpler one wins."""


@dataclass(frozen=True)
class Candidate:
    """The best plan of a shape; without one, ``reason`` says why there is none."""

    shape: Shape | Literal["from_file"]
    plan: Plan | None
    reason: str | None = None
    over_memory: bool = False
    """The best that was found exceeds a device's memory."""

    @property
    def prediction(self) -> Prediction:
        """The plan's prediction; only where there is a plan."""
        assert self.plan is not None
        assert self.plan.prediction is not None
        return self.plan.prediction


@dataclass(frozen=True)
class Planned:
    """The chosen plan and what it was chosen from, in the order of :data:`SHAPES`."""

    plan: Plan
    shape: Shape | Literal["from_file"]
    candidates: tuple[Candidate, ...]
    tried: int
    """Plans that were simulated."""

    @property
    def chosen(self) -> Candidate:
        """The candidate that won."""
        return next(c for c in self.candidates if c.shape == self.shape)


def search(chain: Chain, profile: Profile, cluster: Cluster, request: Request) -> Planned:
    """Return the best plan for a request, with the best of every other shape beside it. A pure function.

    Raises:
        PlanError: no plan of the requested shape is possible; says why and what would help.
        MemoryLimitError: every plan exceeds a device's memory; says by how much, and what would fit.
        ProfileError: the profile belongs to another model.
    """
    profile.check(chain)
    _check_pins(request, chain)
    _check_replicas(request, cluster)
    scorer = Scorer(chain, profile, cluster, request)
    budget = _Budget(scorer, request.effort)
    candidates = tuple(_best(shape, scorer, budget.until(shape)) for shape in SHAPES)
    able = [c for c in candidates if c.plan is not None and c.shape in _wanted(request)]
    if not able:
        _refuse(request, candidates, scorer)
    fastest_s = min(c.prediction.step_s for c in able)
    chosen = next(c for c in able if c.prediction.step_s <= fastest_s * (1 + TIE))
    assert chosen.plan is not None
    return Planned(chosen.plan, chosen.shape, candidates, scorer.tried)


def assess(plan: Plan, chain: Chain, profile: Profile, cluster: Cluster) -> Plan:
    """Return the plan with its prediction on this cluster; used for plans from a file.

    Raises PlanError if the cluster has too few devices, MemoryLimitError if it exceeds their memory.
    """
    validate(plan, chain)
    profile.check(chain)
    if plan.world > cluster.world:
        raise PlanError(
            f"the plan needs {plan.world} ranks but cluster {cluster.name} has {cluster.world} devices; "
            "plan for this cluster, or name another one"
        )
    program = compile_program(plan, chain, plan.global_batch, "train")
    costs = Costs(profile, cluster)
    lack = shortage(program, costs)
    if lack is not None:
        raise MemoryLimitError(
            f"the plan does not fit: {lack.text}; plan again for this "
            f"cluster, or use devices of at least {lack.needed_bytes / 2**20:.0f} MiB"
        )
    return replace(plan, prediction=predict(program, costs))


class _Budget:
    """Hands out the simulated actions of an effort, shape by shape."""

    def __init__(self, scorer: Scorer, effort: Effort) -> None:
        base, each, beyond = ACTIONS[effort]
        ranks = scorer.cluster.world
        self.total = base + each * min(ranks, FEW_RANKS) + beyond * max(ranks - FEW_RANKS, 0)
        self.scorer, self.share = scorer, 0.0

    def until(self, shape: Shape) -> int:
        """Return the number of actions after which the search of a shape has to end.

        Its own part, and what those before it have left; nothing less where they took more.
        """
        self.share += PART[shape]
        return round(max(self.total * self.share, self.scorer.actions + self.total * PART[shape]))


def _wanted(request: Request) -> tuple[Shape, ...]:
    """Return the shapes to choose from: the one that was asked for, or all that have the pinned stages."""
    if request.shape != "auto":
        return (request.shape,)
    return tuple(s for s in SHAPES if _pinned(request) <= set(STAGES_OF[s]))


def _pinned(request: Request) -> set[Kind]:
    return {kind for kind, pin in request.pins.items() if pin != Pin()}


def _check_pins(request: Request, chain: Chain) -> None:
    """Raise PlanError for pins that no placement could respect."""
    for kind, pin in request.pins.items():
        if kind in _pinned(request) and request.shape != "auto" and kind not in STAGES_OF[request.shape]:
            raise PlanError(
                f"plan.{kind}: shape {request.shape} has no {kind}; drop the override or use plan=three_stage"
            )
        if pin.shares is not None and kind == "middle":
            raise PlanError(
                f"plan.middle.shares: {list(pin.shares)} cannot be pinned, since the replicas of a segment share "
                "its samples evenly; drop it, or give shares of the front or the tail"
            )
        if pin.shares is not None and not all(0 < share < math.inf for share in pin.shares):
            raise PlanError(
                f"plan.{kind}.shares: {pin.shares} must be {len(pin.shares)} positive numbers, one per rank"
            )
        if pin.sharding is not None and kind != "tail":
            raise PlanError(f"plan.{kind}.sharding: {list(pin.sharding)} belongs to the tail only; drop it")
        if pin.in_flight is not None and pin.in_flight < 1:
            raise PlanError(f"plan.{kind}.in_flight: {pin.in_flight} is below 1; give a number of samples")
        last = len(chain.layers)
        if pin.layers is not None and not 0 <= pin.layers[0] < pin.layers[1] <= last:
            raise PlanError(
                f"plan.{kind}.layers: {list(pin.layers)} is no run of layers of {chain.model}; "
                f"give [first,end] with 0 <= first < end <= {last}"
            )


def _check_replicas(request: Request, cluster: Cluster) -> None:
    """Raise PlanError for a number of plan replicas that ranks, samples, sharding or pins do not go with."""
    count, world = request.replicas or 1, cluster.world
    if count == 1:
        return
    if world % count:
        raise PlanError(
            f"plan.replicas: {count} does not divide the {world} ranks of cluster {cluster.name}; give a divisor"
        )
    if count > request.global_batch:
        raise PlanError(
            f"plan.replicas: {count} replicas cannot share out a global batch of {request.global_batch}; "
            "raise train.global_batch, or use fewer replicas"
        )
    if "none" not in request.optimizer_shardings:
        raise PlanError(
            f"plan.replicas: {count} does not work with a sharded optimizer; set optimizer.sharding=none, or "
            "plan.replicas=1"
        )
    size = world // count
    for kind, pin in request.pins.items():
        if (pin.degree or 1) > size or max(pin.ranks or (0,)) >= size:
            field, value = ("ranks", list(pin.ranks)) if pin.ranks else ("degree", pin.degree)
            raise PlanError(
                f"plan.{kind}.{field}: {value} does not fit the ranks 0..{size - 1} of one of the {count} "
                "plan replicas; lower it, or plan.replicas"
            )


def _check_layers(kinds: tuple[Kind, ...], drafting: Drafting, request: Request) -> None:
    """Raise PlanError where pinned layers leave a gap, overlap, or miss an end of the chain."""
    last = len(drafting.chain.layers)
    edges: dict[int, tuple[int, str]] = {0: (0, "the first layer"), len(kinds): (last, "the last layer")}
    tail = request.pin("tail")
    sharded = tail.degree != 1 and len(tail.ranks or (0, 1)) > 1
    if "tail" in kinds and sharded and tail.layers and tail.layers[0] < drafting.chain.tail_start:
        raise PlanError(
            f"plan.tail.layers: {list(tail.layers)} must start at layer {drafting.chain.tail_start} or later, "
            f"from where on {drafting.chain.model} can be tensor-parallel"
        )
    for i, kind in enumerate(kinds):
        pinned = request.pin(kind).layers
        for edge, at in ((i, pinned[0]), (i + 1, pinned[1])) if pinned else ():
            known, what = edges.setdefault(edge, (at, f"plan.{kind}.layers"))
            if known != at:
                side = "start" if edge == i else "end"
                raise PlanError(
                    f"plan.{kind}.layers: {list(pinned or ())} must {side} at {known}, as {what} does; change it"
                )
            if not edge <= at <= last - len(kinds) + edge:
                others = ", ".join(k for k in kinds if k != kind)
                raise PlanError(f"plan.{kind}.layers: {list(pinned or ())} leaves no layer for every {others}")


def _best(shape: Shape, scorer: Scorer, until: int) -> Candidate:
    """Return the best plan of a shape, or why there is none."""
    drafting, request = scorer.drafting, scorer.request
    try:
        places = _placements(shape, drafting, request)
    except PlanError as e:
        return Candidate(shape, None, str(e))
    effort = request.effort
    if effort == "exact" and shape not in _wanted(request):
        effort = "normal"  # it is only compared
    most = EXHAUSTIVE[effort]
    every = list(islice((d for p in places for d in exhaustive.drafts(drafting, p)), most + 1))
    whole = len(every) <= most
    if not whole and effort == "exact":
        raise PlanError(
            f"plan.effort: exact is for at most {most} drafts of a shape, and {shape} has more; "
            "pin some choices, or use plan.effort=long"
        )
    best = exhaustive.best(scorer, every) if whole else _heuristic(places, scorer, until, effort)
    if best is None:
        return Candidate(
            shape,
            None,
            f"no placement on {scorer.cluster.world} ranks gives each stage a layer and respects the pins",
        )
    plan = scorer.predicted(best)
    if plan is None:
        return Candidate(shape, None, scorer.reasons[best], over_memory=scorer.score(best)[0] == 1)
    return Candidate(shape, plan)


def _placements(shape: Shape, drafting: Drafting, request: Request) -> list[Placement]:
    """Return the placements of a shape; raises PlanError where the chain or the pins allow none."""
    kinds = STAGES_OF[shape]
    if "tail" in kinds and drafting.chain.tail_start == len(drafting.chain.layers):
        raise PlanError("the model does not end in linear layers, so no tail can be tensor-parallel")
    _check_layers(kinds, drafting, request)
    return list(placements(kinds, drafting.cluster, request))


def _heuristic(places: list[Placement], scorer: Scorer, until: int, effort: Effort) -> Draft | None:
    """Simulate the best estimates, and improve the best of those."""
    half = (scorer.actions + until) // 2
    estimator = Estimator(scorer.drafting)
    costly = (until - scorer.actions) * COSTLY
    tried: list[Draft] = []
    best: Draft | None = None
    for estimate in estimator.ranked(places, PER_PLACEMENT[effort], SIMULATED[effort], costly):
        draft = estimator.draft(estimate)
        if draft is None:
            continue
        score = scorer.score(draft, None if best is None else scorer.score(best))
        tried.append(draft)
        if best is None or (draft in scorer.scores and score < scorer.score(best)):
            best = draft
        if len(tried) >= SIMULATED[effort] or (scorer.actions > half and tried):
            break
    starts = sorted(tried, key=scorer.least)
    for start in starts[: IMPROVED[effort]]:
        improved = _improve(start, scorer, until)
        if best is None or scorer.score(improved) < scorer.score(best):
            best = improved
    if best is None:
        return None
    if scorer.score(best)[0] == 0:
        return _rebucketed(best, scorer)
    lean = (scorer.drafting.lean(start) for start in starts)
    return next((_improve(draft, scorer, until) for draft in lean if scorer.fits(draft)), best)


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


def _refuse(request: Request, candidates: tuple[Candidate, ...], scorer: Scorer) -> NoReturn:
    wanted = [c for c in candidates if c.shape in _wanted(request)]
    reasons = "; ".join(f"{c.shape}: {c.reason}" for c in wanted)
    if not any(c.over_memory for c in wanted):
        raise PlanError(f"no plan is possible: {reasons}")
    raise MemoryLimitError(
        f"no plan fits into memory: {reasons}; {_advice(request, scorer)}; or use devices with more memory"
    )


def _advice(request: Request, scorer: Scorer) -> str:
    """Say which half, quarter, ... of the global batch would fit, if need be without the pinned micro-batches."""
    freed = {kind: replace(pin, micro_batch=None, in_flight=None) for kind, pin in request.pins.items()}
    for pins, condition in ((request.pins, ""), (freed, " with no micro_batch and in_flight pinned")):
        batch = request.global_batch if pins != request.pins else request.global_batch // 2
        while batch:
            smaller = replace(request, global_batch=batch, pins=pins)
            trial = Scorer(scorer.chain, scorer.costs.profile, scorer.cluster, smaller)
            if any(trial.fits(draft) for draft in _leanest(trial, smaller)):
                return f"train.global_batch={batch}{condition} would fit"
            batch //= 2
        if freed == request.pins:
            break
    return "even a global batch of 1 does not fit"


def _leanest(scorer: Scorer, request: Request) -> Iterator[Draft]:
    """Yield drafts of the wanted shapes that seem to need least memory."""
    for shape in _wanted(request):
        with contextlib.suppress(PlanError):
            estimator = Estimator(scorer.drafting)
            places = _placements(shape, scorer.drafting, request)
            for estimate in estimator.ranked(places, 1, LEAN, math.inf)[:LEAN]:
                draft = estimator.draft(estimate)
                if draft is not None:
                    yield draft
                    yield scorer.drafting.lean(draft)
