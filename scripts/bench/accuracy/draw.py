"""Random plans: drawn by a seed from the planner's space, each with its prediction."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Kind, OrderRule, Plan, Segment, Stage, validate
from hybridpar.planning.request import BUCKET_BYTES, SHAPES, STAGES_OF, USUAL_BUCKET_BYTES, Shape

CLOSE = 0.15
"""Share above the best predicted step time within which a plan counts as close to it."""
FAR = 3.0
"""A free draw is not measured where its prediction is more than so many times the best: it would take too long.
The rule looks at predictions only."""
TRIES = 1000
"""Draws for one plan, after which the experiment gives up."""
PARTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""A micro-batch is a rank's share in so many parts."""

ORDERS: tuple[OrderRule, ...] = ("fill_drain", "one_forward_one_backward")
REPLICATED = 0.2
"""Share of the free draws with several plan replicas."""
RECOMPUTING = 0.1
"""Share of the free draws' fronts and middles that recompute."""

Kinds = Literal["choice", "close", "free"]
Assess = Callable[[Plan], Plan]
"""Validates a plan, checks its program and adds its prediction; raises PlanError."""
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Drawn:
    """A plan to measure. ``choice``: the planner's own. ``close``: within 15 % of the best predicted."""

    name: str
    shape: Shape
    kind: Kinds
    plan: Plan


@dataclass(frozen=True)
class Draw:
    """One throw of the dice and what became of it."""

    number: int
    shape: Shape
    kind: Kinds
    step_s: float | None
    """Predicted; None where the plan is impossible."""
    verdict: str
    """``taken as NAME``, or why not."""


class Drawing:
    """Draws plans for one chain and keeps the log of every draw.

    Args:
        chain: what is planned.
        chosen: the planner's choice, with its prediction; its world, batch, precision and recipe are all plans'.
        best: the best plan of every shape that the planner found, with predictions, as a start for close ones.
        assess: gives a plan its prediction.
        seed: of the dice.
    """

    def __init__(
        self, chain: Chain, chosen: tuple[Shape, Plan], best: dict[Shape, Plan], assess: Assess, seed: int
    ) -> None:
        self.chain, self.best, self.assess = chain, best, assess
        self.dice = random.Random(seed)  # noqa: S311 - has to be repeatable
        self.shape, self.chosen = chosen
        self.log: list[Draw] = []
        self.drawn: list[Drawn] = [Drawn("p01", self.shape, "choice", self.chosen)]
        self._known = {self._key(self.chosen)}

    def run(self, plans: int, close: int) -> list[Drawn]:
        """Draw until there are ``plans`` plans, ``close`` of them close ones beside the planner's choice.

        Free draws take the shapes in turn. Raises PlanError where the dice find none in :data:`TRIES` draws.
        """
        for _ in range(close):
            self._take("close", lambda: self._changed(self._start()))
        shapes = [s for s in SHAPES if s in self.best]
        for number in range(plans - 1 - close):
            self._take("free", partial(self._random, shapes[number % len(shapes)]))
        return self.drawn

    def _best_s(self) -> float:
        """Return the least step time predicted so far: a close draw may beat the planner."""
        return min(_step_s(p) for p in (*self.best.values(), *(d.plan for d in self.drawn)))

    def _start(self) -> Plan:
        """Draw what a close plan is made from: a best plan of a shape or a drawn one, if it is close itself."""
        starts: dict[Shape, list[Plan]] = defaultdict(list)
        for plan in (*self.best.values(), *(d.plan for d in self.drawn)):
            if _step_s(plan) <= self._best_s() * (1 + CLOSE):
                starts[shape_of(plan)].append(plan)
        return self.dice.choice(starts[self.dice.choice(list(starts))])

    def _take(self, kind: Kinds, throw: Callable[[], Plan]) -> None:
        for _ in range(TRIES):
            plan = throw()
            shape = shape_of(plan)
            verdict, assessed = self._judged(plan, kind)
            step_s = None if assessed is None else _step_s(assessed)
            if verdict is None and assessed is not None:
                name = f"p{len(self.drawn) + 1:02d}"
                self.drawn.append(Drawn(name, shape, kind, assessed))
                verdict = f"taken as {name}"
            self.log.append(Draw(len(self.log) + 1, shape, kind, step_s, str(verdict)))
            if verdict is not None and verdict.startswith("taken"):
                return
        raise PlanError(f"no {kind} plan in {TRIES} draws, after {len(self.drawn)} plans; ask for fewer")

    def _judged(self, plan: Plan, kind: Kinds) -> tuple[str | None, Plan | None]:
        """Return why a draw is not taken (None: it is), and its plan with the prediction where there is one."""
        try:
            validate(plan, self.chain)
            key = self._key(plan)
            if key in self._known:
                return "drawn before", None
            self._known.add(key)
            assessed = self.assess(plan)
        except PlanError as e:
            return f"impossible: {e}", None
        ratio = _step_s(assessed) / self._best_s()
        if kind == "close" and ratio > 1 + CLOSE:
            return f"{ratio:.2f}x the best predicted, not close", assessed
        if ratio > FAR:
            return f"{ratio:.2f}x the best predicted, too slow to measure", assessed
        return None, assessed

    def _key(self, plan: Plan) -> int:
        """Return what tells programs apart: two order rules may give one and the same program."""
        program = compile_program(plan, self.chain, plan.global_batch, "train")
        return hash((plan.stages, plan.replicas, program.actions))

    # Whole plans

    def _random(self, shape: Shape) -> Plan:
        """Draw everything: replicas, rank sets, cuts, micro-batches, sharding, recomputation, order."""
        kinds, known = STAGES_OF[shape], self.chosen
        several = [n for n in range(2, known.world) if known.world % n == 0]
        replicas = self.dice.choice(several) if several and self.dice.random() < REPLICATED else 1
        world, batch = known.world // replicas, known.global_batch // replicas
        while True:
            groups = [self._groups(kind, world, alone=len(kinds) == 1) for kind in kinds]
            if {r for g in groups for ranks in g for r in ranks} == set(range(world)):
                break
        cuts = self._cuts(kinds, sum(len(g) for g in groups))
        at, stages = 0, []
        for kind, ranks in zip(kinds, groups, strict=True):
            bounds = cuts[at : at + len(ranks) + 1]
            segments = tuple(Segment(layers, r) for layers, r in zip(pairwise(bounds), ranks, strict=True))
            stages.append(self._stage(kind, segments, batch))
            at += len(ranks)
        order = self.dice.choice(ORDERS)
        plan = Plan(
            known.model,
            known.chain,
            known.world,
            known.global_batch,
            known.precision,
            tuple(stages),
            order,
            USUAL_BUCKET_BYTES,
            known.recipe,
            replicas,
        )
        return replace(plan, bucket_bytes=self.dice.choice(BUCKET_BYTES)) if plan.reduces else plan

    def _stage(self, kind: Kind, segments: tuple[Segment, ...], batch: int) -> Stage:
        sharded = kind == "tail" and len(segments[0].ranks) > 1
        linears = [layer for layer in self.chain.layers[slice(*segments[0].layers)] if layer.linear]
        sharding = tuple(self.dice.choice(("column", "row")) for _ in linears) if sharded else ()
        size = self.dice.choice(sizes(kind, segments, batch))
        recompute = kind != "tail" and self.dice.random() < RECOMPUTING
        return Stage(kind, size, segments, sharding, recompute=recompute)  # type: ignore[arg-type]

    def _groups(self, kind: Kind, world: int, *, alone: bool) -> Groups:
        """Draw the ranks of a stage, one tuple per segment: neighbours, all of them where it is the only stage."""
        size = world if alone else self.dice.randint(min(2, world), world)
        first = self.dice.randint(0, world - size)
        ranks = tuple(range(first, first + size))
        if kind != "middle":
            return (ranks,)
        degree = self.dice.randint(min(2, size), size)
        bounds = [0, *sorted(self.dice.sample(range(1, size), degree - 1)), size]
        return tuple(ranks[a:b] for a, b in pairwise(bounds))

    def _cuts(self, kinds: tuple[Kind, ...], segments: int) -> list[int]:
        """Draw where the segments begin: before layers with parameters, the tail where it can be sharded."""
        last = len(self.chain.layers)
        points = self._points()
        if len(kinds) == 1 or kinds[-1] != "tail":
            return [0, *sorted(self.dice.sample(points, segments - 1)), last]
        while True:
            start = self.dice.choice(self._tail_starts())
            before = [p for p in points if p < start]
            if len(before) >= segments - 2:
                return [0, *sorted(self.dice.sample(before, segments - 2)), start, last]

    def _points(self) -> list[int]:
        return [i for i, layer in enumerate(self.chain.layers) if i > 0 and layer.parameters]

    def _tail_starts(self) -> list[int]:
        last_linear = max(i for i, layer in enumerate(self.chain.layers) if layer.linear)
        weighty = {p for p in self._points() if p >= self.chain.tail_start}
        return sorted(s for s in weighty | {self.chain.tail_start} if 0 < s <= last_linear)

    # Changes to a plan

    def _changed(self, plan: Plan) -> Plan:
        """Make one to three random changes to a plan."""
        for _ in range(self.dice.randint(1, 3)):
            changes = list(self._changes(plan))
            plan = self.dice.choice(changes)()
        return replace(plan, prediction=None)

    def _changes(self, plan: Plan) -> Iterator[Callable[[], Plan]]:
        yield lambda: self._resized(plan)
        yield lambda: replace(plan, order=ORDERS[plan.order == ORDERS[0]])
        if plan.reduces:
            yield lambda: replace(plan, bucket_bytes=self.dice.choice(BUCKET_BYTES))
        if sum(len(s.segments) for s in plan.stages) > 1:
            yield lambda: self._moved(plan)
            yield lambda: self._moved(plan)
        if any(s.sharding for s in plan.stages):
            yield lambda: self._resharded(plan)

    def _resized(self, plan: Plan) -> Plan:
        """Give one stage another micro-batch."""
        i = self.dice.randrange(len(plan.stages))
        stage = plan.stages[i]
        size = self.dice.randint(1, sizes(stage.kind, stage.segments, plan.replica_batch)[-1])
        return _with(plan, i, replace(stage, micro_batch=size, in_flight=None))

    def _resharded(self, plan: Plan) -> Plan:
        """Draw the tail's sharding again."""
        stage = plan.stages[-1]
        ways = tuple(self.dice.choice(("column", "row")) for _ in stage.sharding)
        return _with(plan, len(plan.stages) - 1, replace(stage, sharding=ways))  # type: ignore[arg-type]

    def _moved(self, plan: Plan) -> Plan:
        """Move one cut to the next or the next but one point; validation refuses what does not fit."""
        flat = [segment for stage in plan.stages for segment in stage.segments]
        bounds = [s.layers[0] for s in flat] + [flat[-1].layers[1]]
        i = self.dice.randrange(1, len(bounds) - 1)
        into_tail = plan.stages[-1].kind == "tail" and i == len(bounds) - 2
        points = self._tail_starts() if into_tail else self._points()
        after = [p for p in points if p > bounds[i]][:2]
        before = [p for p in points if p < bounds[i]][-2:]
        room = [p for p in (*before, *after) if bounds[i - 1] < p < bounds[i + 1]]
        if not room:
            return plan
        bounds[i] = self.dice.choice(room)
        moved = iter([replace(s, layers=layers) for s, layers in zip(flat, pairwise(bounds), strict=True)])
        stages = []
        for stage in plan.stages:
            segments = tuple(next(moved) for _ in stage.segments)
            first, last = segments[0].layers[0], segments[-1].layers[1]
            linears = sum(1 for layer in self.chain.layers[first:last] if layer.linear)
            ways = (("column", "row") * linears)[:linears] if stage.sharding else ()
            kept = stage.sharding if len(stage.sharding) == linears else ways
            stages.append(replace(stage, segments=segments, sharding=kept))  # type: ignore[arg-type]
        return replace(plan, stages=tuple(stages))


def sizes(kind: Kind, segments: tuple[Segment, ...], batch: int) -> list[int]:
    """Return the micro-batches to draw from, for a stage of a plan replica that has ``batch`` samples."""
    share = batch if kind == "tail" else max(batch // max(len(s.ranks) for s in segments), 1)
    return sorted({-(-share // n) for n in PARTS})


def describe(plan: Plan) -> str:
    """Return a plan in one line: kind, layers, ranks and micro-batch of every stage, and the order rule."""
    parts = []
    for stage in plan.stages:
        where = " ".join(f"{s.layers[0]}-{s.layers[1]}@{','.join(map(str, s.ranks))}" for s in stage.segments)
        ways = "".join(w[0] for w in stage.sharding)
        again = "recomputed" if stage.recompute else ""
        parts.append(" ".join(filter(None, (stage.kind, where, f"b{stage.micro_batch}", ways, again))))
    rule = "fd" if plan.order == "fill_drain" else "1f1b"
    several = f"{plan.replicas} replicas of: " if plan.replicas > 1 else ""
    return f"{several}{'; '.join(parts)}; {rule}; buckets {plan.bucket_bytes / 2**20:g} MiB"


def shape_of(plan: Plan) -> Shape:
    """Return the shape that a plan's stages make."""
    kinds = tuple(s.kind for s in plan.stages)
    return next(shape for shape in SHAPES if STAGES_OF[shape] == kinds)


def _step_s(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_s


def _with(plan: Plan, i: int, stage: Stage) -> Plan:
    return replace(plan, stages=(*plan.stages[:i], stage, *plan.stages[i + 1 :]))
