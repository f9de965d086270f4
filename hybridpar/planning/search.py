"""The search: the fastest plan of every shape that fits into memory, by simulated time.

A space of few drafts is searched whole: in the order of a lower bound, until no bound is below the best. A larger
one is searched by a heuristic. The effort is counted in simulated actions, never in seconds, so that a plan does
not depend on the machine that plans.
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
from hybridpar.planning import exhaustive, heuristic
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.estimate import Estimator
from hybridpar.planning.pins import check_layers, check_pins, check_replicas, wanted
from hybridpar.planning.placement import Placement, placements
from hybridpar.planning.plan import Plan, Prediction, validate
from hybridpar.planning.request import SHAPES, STAGES_OF, Effort, Request, Shape
from hybridpar.planning.scorer import Scorer, shortage
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
    check_pins(request, chain)
    check_replicas(request, cluster)
    scorer = Scorer(chain, profile, cluster, request)
    budget = _Budget(scorer, request.effort)
    candidates = tuple(_best(shape, scorer, budget.until(shape)) for shape in SHAPES)
    able = [c for c in candidates if c.plan is not None and c.shape in wanted(request)]
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


def _best(shape: Shape, scorer: Scorer, until: int) -> Candidate:
    """Return the best plan of a shape, or why there is none."""
    drafting, request = scorer.drafting, scorer.request
    try:
        places = _placements(shape, drafting, request)
    except PlanError as e:
        return Candidate(shape, None, str(e))
    effort = request.effort
    if effort == "exact" and shape not in wanted(request):
        effort = "normal"  # it is only compared
    most = EXHAUSTIVE[effort]
    every = list(islice((d for p in places for d in exhaustive.drafts(drafting, p)), most + 1))
    whole = len(every) <= most
    if not whole and effort == "exact":
        raise PlanError(
            f"plan.effort: exact is for at most {most} drafts of a shape, and {shape} has more; "
            "pin some choices, or use plan.effort=long"
        )
    best = exhaustive.best(scorer, every) if whole else heuristic.best(places, scorer, until, effort)
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
    check_layers(request, drafting.chain, kinds)
    found = list(placements(kinds, drafting.cluster, request))
    fit = [p for p in found if not (request.sampled and p.shares_head)]
    if found and not fit:
        raise PlanError("several ranks would hold the head, whose classes are sampled (loss.sampled)")
    return fit


def _refuse(request: Request, candidates: tuple[Candidate, ...], scorer: Scorer) -> NoReturn:
    asked = [c for c in candidates if c.shape in wanted(request)]
    reasons = "; ".join(f"{c.shape}: {c.reason}" for c in asked)
    if not any(c.over_memory for c in asked):
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
    for shape in wanted(request):
        with contextlib.suppress(PlanError):
            estimator = Estimator(scorer.drafting)
            places = _placements(shape, scorer.drafting, request)
            for estimate in estimator.ranked(places, 1, LEAN, math.inf)[:LEAN]:
                draft = estimator.draft(estimate)
                if draft is not None:
                    yield draft
                    yield scorer.drafting.lean(draft)
