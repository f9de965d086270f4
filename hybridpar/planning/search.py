"""The search: the fastest plan of every shape that fits into memory, by simulated time.

For every shape the search starts from a few placements of the stages on ranks (all ranks shared, ranks of their
own, overlapping) and improves each by changing one choice at a time (a micro-batch size, a cut, the sharding of a
linear layer, the order rule) for as long as the simulated step gets faster. That is a local search: it is exact in
what it says of a plan, and does not prove that no better one exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from hybridpar.cluster.topology import Cluster
from hybridpar.errors import MemoryLimitError, PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.bound import lower_bound
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.memory import peak_per_rank
from hybridpar.planning.placement import Groups, placements
from hybridpar.planning.plan import Kind, Plan, Prediction, validate
from hybridpar.planning.request import SHAPES, STAGES_OF, Pin, Request, Shape
from hybridpar.planning.simulate import predict, simulate
from hybridpar.profiling.record import Profile

SCORED_STARTS = 12
"""Starting points of a shape that are simulated, least lower bound first."""
KEPT_STARTS, KEPT_STARTS_LARGE, LARGE_WORLD = 5, 2, 8
"""Starting points of a shape that are improved, best first; fewer above ``LARGE_WORLD`` ranks, where each
simulation takes a tenth of a second."""
FIRST_SIZE: dict[Kind, int] = {"front": 2, "middle": 4, "tail": 2}
"""Micro-batch to start from, counted down from the largest: a pipeline needs several to fill."""
WORTHWHILE = 0.002
"""Share of the step time by which a neighbour must be better."""
WORTHWHILE_BYTES = 0.1
"""Likewise of the bytes above the memory limit, as long as nothing fits."""
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
    scorer = _Scorer(chain, profile, cluster, request)
    candidates = tuple(_best(shape, scorer, request) for shape in SHAPES)
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
    peaks = peak_per_rank(program)
    rank = max(range(len(peaks)), key=lambda r: peaks[r])
    if peaks[rank] > cluster.device.memory_bytes:
        raise MemoryLimitError(
            f"the plan does not fit: {memory_line(plan, rank, peaks[rank], cluster)}; plan again for this "
            f"cluster, or use devices of at least {peaks[rank] / 2**20:.0f} MiB"
        )
    return replace(plan, prediction=predict(program, Costs(profile, cluster)))


class _Scorer:
    """Scores drafts by compiling and simulating their plans; remembers what it has seen."""

    def __init__(self, chain: Chain, profile: Profile, cluster: Cluster, request: Request) -> None:
        self.chain, self.cluster = chain, cluster
        self.costs = Costs(profile, cluster)
        self.drafting = Drafting(chain, profile, request, cluster.world)
        self.scores: dict[Draft, tuple[int, float]] = {}
        self.bounds: dict[Draft, float] = {}
        self.reasons: dict[Draft, str] = {}
        self.tried = 0

    def score(self, draft: Draft) -> tuple[int, float]:
        """Return (0, step seconds), or (1, bytes above the limit), or (2, 0) where the plan is impossible."""
        if draft not in self.scores:
            self.scores[draft] = self._score(draft)
        return self.scores[draft]

    def _plan(self, draft: Draft) -> Plan:
        """Return a draft's plan; raises PlanError where it is not a possible or allowed one."""
        if not self.drafting.allowed(draft):
            raise PlanError(f"the stages' micro-batches {draft.micro_batches} are not distinct")
        plan = self.drafting.plan(draft)
        validate(plan, self.chain)
        return plan

    def _score(self, draft: Draft) -> tuple[int, float]:
        try:
            plan = self._plan(draft)
            program = compile_program(plan, self.chain, plan.global_batch, "train")
        except PlanError as e:
            self.reasons[draft] = str(e)
            return 2, 0.0
        peaks = peak_per_rank(program)
        rank = max(range(len(peaks)), key=lambda r: peaks[r])
        if peaks[rank] > self.cluster.device.memory_bytes:
            self.reasons[draft] = memory_line(plan, rank, peaks[rank], self.cluster)
            return 1, peaks[rank] - self.cluster.device.memory_bytes
        self.tried += 1
        return 0, simulate(program, self.costs).period_s

    def fits(self, draft: Draft) -> bool:
        """Whether the draft's plan is possible and fits into memory."""
        return self.score(draft)[0] == 0

    def beats(self, draft: Draft, other: Draft) -> bool:
        """Whether a draft is better than another by a share that matters."""
        rank, value = self.score(other)
        limit = (rank, value * (1 - (WORTHWHILE if rank == 0 else WORTHWHILE_BYTES)))
        return (0, self.bound(draft)) < limit and self.score(draft) < limit

    def bound(self, draft: Draft) -> float:
        """Return a lower bound of the step time; infinite where the plan is impossible."""
        if draft not in self.bounds:
            try:
                plan = self._plan(draft)
            except PlanError as e:
                self.scores[draft], self.reasons[draft] = (2, 0.0), str(e)
                self.bounds[draft] = float("inf")
            else:
                self.bounds[draft] = lower_bound(plan, self.chain, self.costs)
        return self.bounds[draft]

    def predicted(self, draft: Draft) -> Plan | None:
        """Return the draft's plan with its prediction, or None where it is impossible."""
        if self.score(draft)[0]:
            return None
        plan = self.drafting.plan(draft)
        program = compile_program(plan, self.chain, plan.global_batch, "train")
        return replace(plan, prediction=predict(program, self.costs))


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


def _best(shape: Shape, scorer: _Scorer, request: Request) -> Candidate:
    """Improve the best starting points of a shape."""
    try:
        starts = list(_starts(shape, scorer.drafting, request))
    except PlanError as e:
        return Candidate(shape, None, str(e))
    promising = sorted(starts, key=scorer.bound)[:SCORED_STARTS]
    ranked = sorted(promising, key=scorer.score)
    kept = KEPT_STARTS if scorer.cluster.world <= LARGE_WORLD else KEPT_STARTS_LARGE
    best = min((_improve(d, scorer) for d in ranked[:kept]), key=scorer.score, default=None)
    if best is not None and scorer.score(best)[0] == 1:
        lean = (_sized(draft, scorer.drafting, request, lean=True) for draft in promising)
        best = next((_improve(d, scorer) for d in lean if scorer.fits(d)), best)
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


def _improve(draft: Draft, scorer: _Scorer) -> Draft:
    """Step to a better neighbour until there is none; those whose bound rules them out are not simulated."""
    while True:
        neighbours = sorted(scorer.drafting.neighbours(draft), key=scorer.bound)
        better = next((n for n in neighbours if scorer.beats(n, draft)), None)
        if better is None:
            return draft
        draft = better


def _starts(shape: Shape, drafting: Drafting, request: Request) -> Iterator[Draft]:
    """Yield a draft for every placement of a shape, with middling choices for the rest."""
    kinds = STAGES_OF[shape]
    if "tail" in kinds and drafting.chain.tail_start == len(drafting.chain.layers):
        raise PlanError("the model does not end in linear layers, so no tail can be tensor-parallel")
    _check_layers(kinds, drafting, request)
    for ranks in placements(kinds, drafting.world, request):
        cuts = _first_cuts(drafting, kinds, ranks, request)
        if cuts is None:
            continue
        order = request.order or "one_forward_one_backward"
        draft = Draft(kinds, cuts, ranks, (1,) * len(kinds), (), order)
        draft = _sized(draft, drafting, request, lean=False)
        yield replace(draft, sharding=drafting.resized_sharding(draft))


def _sized(draft: Draft, drafting: Drafting, request: Request, *, lean: bool) -> Draft:
    """Give a draft middling micro-batches, or the least; where they have to differ, the nearest that do."""
    chosen: list[int] = []
    for i, kind in enumerate(draft.kinds):
        sizes = drafting.sizes(draft, i)
        wanted = sizes[0] if lean else sizes[max(len(sizes) - FIRST_SIZE[kind], 0)]
        free = [s for s in sizes if not request.distinct or s not in chosen] or [wanted]
        chosen.append(min(free, key=lambda s: abs(s - wanted)))
    return replace(draft, micro_batches=tuple(chosen))


def _first_cuts(
    drafting: Drafting, kinds: tuple[Kind, ...], ranks: tuple[Groups, ...], request: Request
) -> tuple[int, ...] | None:
    """Start the tail as early as the stages before it allow, the middle with the last third of what remains."""
    for stop in _tail_cuts(drafting, kinds, request):
        for start in _middle_cuts(drafting, kinds, ranks, request, stop):
            cuts = tuple(c for c in (start, stop) if c is not None)
            draft = Draft(kinds, cuts, ranks, (1,) * len(kinds), (), "fill_drain")
            if drafting.fits(draft) and all(0 < c < len(drafting.chain.layers) for c in cuts):
                return cuts
    return None


def _tail_cuts(drafting: Drafting, kinds: tuple[Kind, ...], request: Request) -> list[int] | list[None]:
    """Return where the tail may start, best first; None where there is none behind another stage."""
    if len(kinds) == 1:
        return [None]
    pinned = _pinned_cut(kinds, len(kinds) - 2, request)
    return drafting.cuts_between(kinds, len(kinds) - 2) if pinned is None else [pinned]


def _middle_cuts(
    drafting: Drafting, kinds: tuple[Kind, ...], ranks: tuple[Groups, ...], request: Request, stop: int | None
) -> list[int] | list[None]:
    """Return where the middle between two stages may start, best first; None where there is none."""
    if len(kinds) < 3 or stop is None:
        return [None]
    pinned = _pinned_cut(kinds, 0, request)
    if pinned is not None:
        return [pinned]
    room = [p for p in drafting.cut_points if p <= stop - len(ranks[1])]
    return room[len(room) * 2 // 3 :: -1]


def _pinned_cut(kinds: tuple[Kind, ...], i: int, request: Request) -> int | None:
    """Return where stage ``i`` ends, if its layers or the next stage's are pinned."""
    before, after = request.pin(kinds[i]).layers, request.pin(kinds[i + 1]).layers
    return before[1] if before else after[0] if after else None


def _refuse(request: Request, candidates: tuple[Candidate, ...], scorer: _Scorer) -> NoReturn:
    wanted = [c for c in candidates if c.shape in _wanted(request)]
    reasons = "; ".join(f"{c.shape}: {c.reason}" for c in wanted)
    if not any(c.over_memory for c in wanted):
        raise PlanError(f"no plan is possible: {reasons}")
    raise MemoryLimitError(
        f"no plan fits into memory: {reasons}; {_advice(request, scorer)}; or use devices with more memory"
    )


def _advice(request: Request, scorer: _Scorer) -> str:
    """Say which half, quarter, ... of the global batch would fit, if need be without the pinned micro-batches."""
    freed = {kind: replace(pin, micro_batch=None, in_flight=None) for kind, pin in request.pins.items()}
    for pins, condition in ((request.pins, ""), (freed, " with no micro_batch and in_flight pinned")):
        batch = request.global_batch if pins != request.pins else request.global_batch // 2
        while batch:
            smaller = replace(request, global_batch=batch, pins=pins)
            trial = _Scorer(scorer.chain, scorer.costs.profile, scorer.cluster, smaller)
            if any(trial.fits(draft) for draft in _leanest(trial, smaller)):
                return f"train.global_batch={batch}{condition} would fit"
            batch //= 2
        if freed == request.pins:
            break
    return "even a global batch of 1 does not fit"


def _leanest(scorer: _Scorer, request: Request) -> Iterator[Draft]:
    """Yield the most promising placements of the wanted shapes with the smallest micro-batches."""
    for shape in _wanted(request):
        with contextlib.suppress(PlanError):
            starts = sorted(_starts(shape, scorer.drafting, request), key=scorer.bound)
            for draft in starts[:SCORED_STARTS]:
                yield _sized(draft, scorer.drafting, request, lean=True)


def memory_line(plan: Plan, rank: int, peak: int, cluster: Cluster) -> str:
    """Say which rank exceeds its device's memory, and by how much."""
    limit = cluster.device.memory_bytes
    return (
        f"rank {rank} needs {peak / 2**20:.1f} MiB, {(peak - limit) / 2**20:.1f} MiB more than the "
        f"{limit / 2**20:.1f} MiB of {cluster.device.name}, at global batch {plan.global_batch}"
    )
