"""Where the answer flips: the bandwidth, batch size or device speed at which another shape overtakes.

The plans stay as they are; only their circumstances change. Planned anew at another point, either side might do
better than the plan that was the best of its shape here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hybridpar.errors import PlanError
from hybridpar.planning.explain import rivals
from hybridpar.planning.layout import chunks, length
from hybridpar.planning.plan import Plan, Stage
from hybridpar.planning.search import TIE, Candidate, Planned
from hybridpar.planning.trial import Trials, scaled_levels

DOUBLINGS = 6
"""How far to look each way: 64 times as much, a 64th."""
PRECISION = 1.005
"""Ratio of the ends of the interval in which a flip is left undetermined."""
BATCH_PRECISION = 0.02
"""Likewise of a global batch, as a share of it."""
MOST_CALLS = 64
"""Micro-batches of a stage on one rank above which a larger batch is not simulated with them kept."""

Quantity = Literal["bandwidth", "global_batch", "device_speed"]
Direction = Literal["above", "below"]
DIRECTIONS: tuple[Direction, ...] = ("above", "below")


@dataclass(frozen=True)
class Flip:
    """Where another shape overtakes the fastest plan, in one direction of one quantity."""

    quantity: Quantity
    direction: Direction
    now: float
    """Gbit/s per direction of the narrowest scaled link level, samples, or 1 (times the device's speed)."""
    at: float | None
    """The value from which on the challenger is faster, in the unit of ``now``; None: nowhere within 64 times."""
    challenger: str | None = None
    """The shape that overtakes first."""
    reason: str | None = None
    """Why it overtakes, where that is not a matter of speed: the leader is impossible there."""


@dataclass(frozen=True)
class Flips:
    """The fastest plan, the shapes it was held against, and where one of them overtakes it."""

    leader: str
    challengers: tuple[str, ...]
    """Other shapes, the runner-up first."""
    link_level: str
    """Level whose bandwidth is given; all link levels between nodes scale with it."""
    found: tuple[Flip, ...]


def flips(trials: Trials, planned: Planned, *, full: bool) -> Flips | None:
    """Find where another shape overtakes the fastest one; None where there is one shape only.

    Looks outward in factors of two, up to 64 times as much and down to a 64th, and bisects the first interval in
    which the order changes. What lies beyond a first flip is not looked at. ``full`` holds all shapes against the
    fastest, over bandwidth, batch and device speed; otherwise it is the runner-up, over bandwidth.
    """
    ordered = sorted([planned.chosen, *rivals(planned)], key=lambda c: c.prediction.step_s)
    ordered = ordered if full else ordered[:2]
    if len(ordered) < 2:
        return None
    leader, challengers = ordered[0], ordered[1:]
    if leader.prediction.step_s * (1 + TIE) >= planned.chosen.prediction.step_s:
        leader, challengers = planned.chosen, [c for c in ordered if c is not planned.chosen]
    duel = _Duel(trials, leader, tuple(challengers))
    level = scaled_levels(trials.cluster)[0]
    gbit_s = trials.cluster.links[level].bytes_per_s * 8e-9
    found = [duel.scaled("bandwidth", direction, gbit_s) for direction in DIRECTIONS]
    if full:
        found += [duel.batch(direction) for direction in DIRECTIONS]
        found += [duel.scaled("device_speed", direction, 1.0) for direction in DIRECTIONS]
    return Flips(leader.shape, tuple(c.shape for c in challengers), level, tuple(found))


class _Duel:
    """The fastest plan against the others."""

    def __init__(self, trials: Trials, leader: Candidate, challengers: tuple[Candidate, ...]) -> None:
        self.trials = trials
        self.names = [c.shape for c in challengers]
        self.plans = [c.plan for c in (leader, *challengers) if c.plan is not None]
        self.programs = [trials.program(plan) for plan in self.plans]

    def scaled(self, quantity: Literal["bandwidth", "device_speed"], direction: Direction, now: float) -> Flip:
        """Find the flip where the bandwidth or the devices' speed is scaled."""

        def winner(factor: float) -> int | None:
            if quantity == "bandwidth":
                return _overtaking([self.trials.step_s(p, bandwidth=factor) for p in self.programs])
            return _overtaking([self.trials.step_s(p, speed=factor) for p in self.programs])

        factor = crossing(lambda f: winner(f) is not None, direction)
        if factor is None:
            return Flip(quantity, direction, now, None)
        return Flip(quantity, direction, now, now * factor, self.names[winner(factor) or 0])

    def batch(self, direction: Direction) -> Flip:
        """Find the flip over global batches, to a whole sample or two percent."""
        now = inside = outside = self.plans[0].global_batch
        for _ in range(DOUBLINGS):
            inside, outside = outside, outside * 2 if direction == "above" else outside // 2
            if outside < 1:
                return Flip("global_batch", direction, now, None)
            if self._batch_winner(outside) is not None:
                break
        else:
            return Flip("global_batch", direction, now, None)
        while abs(outside - inside) > max(1, BATCH_PRECISION * inside):
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if self._batch_winner(middle) is None else (inside, middle)
        name = self.names[self._batch_winner(outside) or 0]
        reason = resized(self.trials, self.plans[0], outside).reason
        return Flip("global_batch", direction, now, outside, name, reason)

    def _batch_winner(self, global_batch: int) -> int | None:
        leader_s = resized(self.trials, self.plans[0], global_batch).step_s
        limit_s = math.inf if leader_s is None else leader_s
        others = [resized(self.trials, p, global_batch, limit_s).step_s for p in self.plans[1:]]
        return _overtaking([leader_s, *others])


def _overtaking(seconds: Sequence[float | None]) -> int | None:
    """Return the fastest challenger's number if it beats the first entry; None is what is impossible."""
    leader_s, *others = [math.inf if s is None else s for s in seconds]
    best = min(range(len(others)), key=lambda i: others[i])
    return best if others[best] < leader_s * (1 - TIE) else None


def crossing(test: Callable[[float], bool], direction: Direction) -> float | None:
    """Return the factor nearest to 1 in a direction from which on ``test`` holds; None within 64 times.

    Found to half a percent: the test holds at the factor returned, and not half a percent nearer to 1.
    """
    step = 2.0 if direction == "above" else 0.5
    inside = outside = 1.0
    for _ in range(DOUBLINGS):
        inside, outside = outside, outside * step
        if test(outside):
            while max(outside / inside, inside / outside) > PRECISION:
                middle = math.sqrt(inside * outside)
                inside, outside = (inside, middle) if test(middle) else (middle, outside)
            return outside
    return None


@dataclass(frozen=True)
class Resized:
    """A plan at another global batch."""

    step_s: float | None
    reason: str | None
    """Why it is impossible there."""


def resized(trials: Trials, plan: Plan, global_batch: int, limit_s: float = math.inf) -> Resized:
    """Return the step time of a plan at another batch: cuts, ranks and rules stay.

    Of two ways the faster one that fits into memory: the micro-batches stay (none above a rank's share), so that
    there are more or fewer of them; or they grow and shrink with the batch, so that their number stays. What its
    lower bound keeps from taking less than ``limit_s`` is not simulated and has no step time.
    """
    best: float | None = None
    reason = None
    for variant in _variants(plan, global_batch):
        try:
            if trials.bound_s(variant) >= min(limit_s, math.inf if best is None else best):
                continue
            program = trials.program(variant)
        except PlanError as e:
            reason = reason or str(e)
            continue
        _, _, excess = trials.excess(program)
        if excess > 0:
            reason = f"exceeds its memory by {excess / 2**20:.4g} MiB"
            continue
        seconds = trials.step_s(program)
        best = seconds if best is None else min(best, seconds)
    return Resized(best, None if best is not None else reason)


def _variants(plan: Plan, global_batch: int) -> list[Plan]:
    moved = replace(plan, global_batch=global_batch, prediction=None)
    ratio = global_batch / plan.global_batch
    scaled = tuple(_with_size(moved, s, round(s.micro_batch * ratio), ratio) for s in plan.stages)
    kept = tuple(_with_size(moved, s, s.micro_batch, 1.0) for s in plan.stages)
    result = [replace(moved, stages=scaled)]
    calls = max(largest_share(moved, s) / s.micro_batch for s in kept)
    if calls <= MOST_CALLS and kept != scaled:
        result.append(replace(moved, stages=kept))
    return result


def _with_size(plan: Plan, stage: Stage, size: int, ratio: float) -> Stage:
    cap = None if stage.in_flight is None else max(math.ceil(stage.in_flight * ratio), 1)
    return replace(stage, micro_batch=max(min(size, largest_share(plan, stage)), 1), in_flight=cap)


def largest_share(plan: Plan, stage: Stage) -> int:
    """Return the most samples of a step that one rank of every segment of a stage can have in one micro-batch."""
    if stage.kind == "tail":
        return plan.replica_batch
    shares = (chunks(plan.replica_batch, plan.replica_batch, s.weights)[0] for s in stage.segments)
    return min(max(length(interval) for interval in share) for share in shares)
