"""Training under a plan against a single process: cases, plans of all shapes, and the comparison."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest

from hybridpar.planning.plan import Segment, Stage
from tests.support.plans import make_plan
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import assemble, make_case, make_executor, train_rank, train_single

STEPS, BATCH, RELATIVE = 10, 13, 1e-10


MAX_NORM = 0.3
"""Clips some of the steps and not others."""


RULES = ("fill_drain", "one_forward_one_backward")


LAYERS, BEFORE_POOL, AFTER_FLATTEN = 16, 7, 9


UNEVEN = {1: (1.0,), 2: (2.0, 1.0), 3: (1.0, 1.5, 1.0)}


@cache
def case_of(dropout=0.0, samples=BATCH, max_norm=None):
    return make_case(dropout=dropout, steps=STEPS, samples=samples, max_norm=max_norm)


@cache
def reference(case_key):
    return train_single(case_of(*case_key))


def plan_of(*stages, batch=BATCH, **fields):
    world = (1 + max(r for s in stages for r in s.ranks)) * fields.get("replicas", 1)
    return make_plan(case_of().traced.chain, *stages, world=world, global_batch=batch, **fields)


def train(case, plan, *, gloo):
    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators)
        metrics = train_rank(case, plan, rank, executor)
        return metrics, [o for modules in executor.blocks.values() for o in modules.owned]

    if gloo:
        return run_ranks(plan, body)
    results = run_strictly(plan.world, body, plan.replica_world)
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def near(actual, expected):
    return (actual - expected).abs().max() <= RELATIVE * expected.abs().max()


def assert_parity(plan, *, dropout=0.0, samples=BATCH, gloo=False):
    key = dropout, samples, MAX_NORM if plan.recipe.clipping else None
    assert_same(plan, case_of(*key), reference(key), gloo=gloo)


def assert_same(plan, case, single, *, gloo=False):
    results = train(case, plan, gloo=gloo)
    for metrics, _ in results:
        assert [m.loss for m in metrics] == pytest.approx(single.losses, rel=RELATIVE)
    for first in range(0, plan.world, plan.replica_world):
        owned = [o for _, o in results[first : first + plan.replica_world]]
        parameters, gradients = assemble(owned), assemble(owned, "gradient")
        assert parameters.keys() == single.parameters.keys()
        for name, expected in single.parameters.items():
            assert near(gradients[name], single.gradients[name]), f"gradient of {name}"
            assert near(parameters[name], expected), f"parameter {name}"


def own_ranks(taken, degree):
    start = 1 + max(taken, default=-1)
    return tuple(range(start, start + degree))


def shared_ranks(taken, degree):
    return tuple(range(degree)) if not taken else tuple(reversed(range(degree)))


def overlapping_ranks(taken, degree):
    start = max(taken, default=0)
    return (*range(start + 1, start + degree), start)


PLACEMENTS = {"own": own_ranks, "shared": shared_ranks, "overlapping": overlapping_ranks}


def shape(front, middle, tail, place, *, tail_start=AFTER_FLATTEN, uneven=False, replicas=1, ways=None):
    """The stages of a plan: three different micro-batch sizes, ragged last ones."""
    taken, at, stages = [], 0, []
    cuts = [4, 6] if front else [3, 5]
    middle_stop = tail_start if tail else LAYERS
    if front:
        stop = cuts[0] if middle else middle_stop
        ranks = place(taken, front)
        taken += ranks
        stages.append(Stage("front", 2, (Segment((at, stop), ranks, UNEVEN[front] if uneven else None),)))
        at = stop
    if middle:
        segments = []
        for stop in [cuts[1], middle_stop][2 - middle :]:
            ranks = place(taken, replicas)
            taken += ranks
            segments.append(Segment((at, stop), ranks))
            at = stop
        stages.append(Stage("middle", 3, tuple(segments)))
    if tail:
        ranks = place(taken, tail)
        ways = (ways or ("column", "row", "column")) if tail > 1 else ()
        stages.append(Stage("tail", 5, (Segment((at, LAYERS), ranks, UNEVEN[tail] if uneven else None),), ways))
    used = sorted({r for s in stages for r in s.ranks})
    return [_renamed(s, {r: i for i, r in enumerate(used)}) for s in stages]


def _renamed(stage, names):
    segments = tuple(replace(s, ranks=tuple(names[r] for r in s.ranks)) for s in stage.segments)
    return replace(stage, segments=segments)


DEGREES = [
    (front, middle, tail)
    for front, middle, tail in itertools.product(range(4), range(3), range(4))
    if (front or middle or tail) and (front or middle or tail == 1)
]


COMBINED = list(itertools.product(DEGREES, PLACEMENTS))
