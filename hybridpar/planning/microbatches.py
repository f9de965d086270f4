"""The effect of one stage's other micro-batches on a plan: of its neighbours, and of the best one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridpar.errors import PlanError
from hybridpar.planning.flips import largest_share
from hybridpar.planning.plan import Kind, Plan
from hybridpar.planning.sizes import usual_sizes
from hybridpar.planning.trial import Trials


@dataclass(frozen=True)
class Effect:
    """What a plan becomes when one stage takes another micro-batch size."""

    micro_batch: int
    step_s: float | None
    memory_bytes: int | None
    """Of the rank that comes closest to its limit, or exceeds it most; None where there is no such plan."""
    reason: str | None = None
    """Why it is impossible: the excess of memory, or the rule that it breaks."""


@dataclass(frozen=True)
class StageEffects:
    """The neighbours of one stage's micro-batch; None where there is none: a single sample, or the whole share."""

    kind: Kind
    micro_batch: int
    smaller: Effect | None
    larger: Effect | None


def micro_batch_effects(trials: Trials, plan: Plan) -> tuple[StageEffects, ...]:
    """Simulate the plan with each stage's micro-batch at the neighbouring sizes, one at a time."""
    result = []
    for index, stage in enumerate(plan.stages):
        sizes = usual_sizes(largest_share(plan, stage))
        smaller = max((s for s in sizes if s < stage.micro_batch), default=None)
        larger = min((s for s in sizes if s > stage.micro_batch), default=None)
        effects = (None if size is None else _effect(trials, plan, index, size) for size in (smaller, larger))
        result.append(StageEffects(stage.kind, stage.micro_batch, *effects))
    return tuple(result)


def best_micro_batch(trials: Trials, plan: Plan, index: int) -> Effect | None:
    """Simulate the plan with one stage's micro-batch at all usual sizes; return the fastest that fits.

    None where no other size is faster than the plan's own.
    """
    stage, best = plan.stages[index], None
    least_s = trials.step_s(trials.program(plan))
    for size in usual_sizes(largest_share(plan, stage)):
        if size == stage.micro_batch or _cannot_beat(trials, _with_size(plan, index, size), least_s):
            continue
        effect = _effect(trials, plan, index, size)
        if effect.step_s is not None and effect.step_s < least_s:
            best, least_s = effect, effect.step_s
    return best


def _cannot_beat(trials: Trials, plan: Plan, step_s: float) -> bool:
    """Whether a plan is impossible, or slower than ``step_s`` in any order."""
    try:
        return trials.bound_s(plan) >= step_s
    except PlanError:
        return True


def _with_size(plan: Plan, index: int, size: int) -> Plan:
    stages = [replace(s, micro_batch=size) if i == index else s for i, s in enumerate(plan.stages)]
    return replace(plan, stages=tuple(stages), prediction=None)


def _effect(trials: Trials, plan: Plan, index: int, size: int) -> Effect:
    try:
        program = trials.program(_with_size(plan, index, size))
    except PlanError as e:
        return Effect(size, None, None, str(e))
    rank, peak, excess = trials.excess(program)
    if excess > 0:
        return Effect(size, None, peak, f"out of memory by {excess / 2**20:.4g} MiB on rank {rank}")
    return Effect(size, trials.step_s(program), peak)
