"""Training under a plan equals single-process training: losses, last gradients and parameters, in float64.

Most of the matrix runs on the in-memory machine of tests/support, which hands tensors over as a network would but
starts faster; a part of it runs on gloo.
"""

import itertools
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from hybridpar.errors import PlanError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Recipe, Segment, Stage
from tests.support.parity import (
    AFTER_FLATTEN,
    BATCH,
    BEFORE_POOL,
    COMBINED,
    LAYERS,
    PLACEMENTS,
    RULES,
    STEPS,
    UNEVEN,
    assert_parity,
    assert_same,
    case_of,
    overlapping_ranks,
    own_ranks,
    plan_of,
    shape,
)
from tests.support.plans import make_plan
from tests.support.rendezvous import run_strictly
from tests.support.training import Case, make_executor, train_rank, train_single

# Which ranks a stage takes, given the ranks that the stages before it took.


@pytest.mark.parametrize(
    ("number", "degrees", "placement"),
    [(i, d, p) for i, (d, p) in enumerate(COMBINED)],
    ids=["-".join(map(str, d)) + f"-{p}" for d, p in COMBINED],
)
def test_degrees_and_placements(number, degrees, placement):
    # The other choices go round, with periods that have no common factor with the placements' 3.
    clipping, dropout = number % 4 >= 2, 0.4 * (number % 2)
    rule, uneven = RULES[number // 2 % 2], number % 5 < 2
    starts = (AFTER_FLATTEN, BEFORE_POOL)
    stages = shape(*degrees, PLACEMENTS[placement], uneven=uneven, tail_start=starts[number // 4 % 2])
    recipe = Recipe(clipping=clipping)
    plan = plan_of(*stages, order=rule, bucket_bytes=(1, 2000)[number % 2], recipe=recipe)
    assert_parity(plan, dropout=dropout, gloo=number % 7 == 0)


@pytest.mark.parametrize("ways", list(itertools.product(("column", "row"), repeat=3)), ids="-".join)
@pytest.mark.parametrize("tail", [2, 3])
@pytest.mark.parametrize("start", [BEFORE_POOL, AFTER_FLATTEN])
def test_every_column_and_row_sharding(ways, tail, start):
    stages = shape(2, 0, tail, overlapping_ranks, tail_start=start, uneven=tail == 3, ways=ways)
    plan = plan_of(*stages, recipe=Recipe(clipping=tail == 2))
    assert_parity(plan, dropout=0.4, gloo=tail == 2 and start == BEFORE_POOL and ways[0] == "row")


@pytest.mark.parametrize("start", [6, 7, 8, 9, 10, 12, 15])
def test_tail_starts(start):
    """Before and after pool and flatten, inside the classifier, and at its last linear."""
    linears = sum(i >= start for i in (9, 12, 15))
    stages = shape(2, 1, 3, own_ranks, tail_start=start, ways=("row", "column", "row")[:linears])
    assert_parity(plan_of(*stages), dropout=0.4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("uneven", [False, True])
def test_rules_clipping_dropout_and_shares(rule, clipping, dropout, uneven):
    stages = shape(3, 2, 2, overlapping_ranks, uneven=uneven)
    assert_parity(plan_of(*stages, order=rule, recipe=Recipe(clipping=clipping)), dropout=dropout)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize("rule", RULES)
def test_replicated_middle_segments(placement, front, rule):
    stages = shape(front, 2, 2, PLACEMENTS[placement], replicas=2)
    assert_parity(plan_of(*stages, order=rule, bucket_bytes=1), dropout=0.4)


@pytest.mark.parametrize("sizes", list(itertools.permutations((1, 3, 7))), ids=str)
def test_micro_batches_of_every_ratio(sizes):
    front, middle, tail = shape(2, 2, 2, own_ranks)
    stages = [replace(s, micro_batch=m) for s, m in zip((front, middle, tail), sizes, strict=True)]
    assert_parity(plan_of(*stages), dropout=0.4)


@pytest.mark.parametrize("last", [1, 2, 5, 12])
@pytest.mark.parametrize("degrees", [(3, 0, 0), (3, 1, 2), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("clipping", [False, True])
def test_last_partial_batch(last, degrees, clipping):
    """Fewer samples than the global batch, even fewer than replicas, so that some have none."""
    stages = shape(*degrees, overlapping_ranks, replicas=2, uneven=True)
    samples = (*(BATCH,) * (STEPS // 2 - 1), last) * 2
    plan = plan_of(*stages, bucket_bytes=1, recipe=Recipe(clipping=clipping))
    assert_parity(plan, dropout=0.4, samples=samples, gloo=last == 1)


@pytest.mark.parametrize("ranks", [(2, 0, 1), (1, 2, 0), (2, 1, 0)], ids=str)
def test_ranks_in_any_order(ranks):
    front, tail = Segment((0, 7), ranks, (1.0, 2.0, 1.0)), Segment((7, LAYERS), ranks[::-1], (2.0, 1.0, 1.0))
    plan = plan_of(Stage("front", 3, (front,)), Stage("tail", 4, (tail,), ("row", "row", "column")))
    assert_parity(plan, dropout=0.4, gloo=True)


@pytest.mark.parametrize("gloo", [False, True])
def test_one_rank_with_all_three_stages(gloo):
    assert_parity(plan_of(*shape(1, 2, 1, lambda *_: (0,))), dropout=0.4, gloo=gloo)


def linears():
    return nn.Sequential(
        nn.Linear(6, 11), nn.ReLU(), nn.Dropout(0.4), nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 7)
    )


class Tied(nn.Module):
    """One weight in three layers; the last of them has no parameter of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6, bias=False),
            nn.Linear(6, 4),
        )
        self.b.weight = self.c.weight = self.a.weight

    def forward(self, x):
        return self.d(self.c(torch.relu(self.b(torch.relu(self.a(x))))))


@cache
def case_with(builder, samples=BATCH):
    source = defer(builder)
    return Case(source, trace(source.module, (6,), builder.__name__), STEPS, (samples,) * STEPS)


@pytest.mark.parametrize("ways", list(itertools.product(("column", "row"), repeat=3)), ids="-".join)
@pytest.mark.parametrize("tail", [2, 3])
def test_a_model_that_is_all_tail(ways, tail):
    """The tail reads the batch itself; where it begins with rows, every shard reads its features."""
    case = case_with(linears)
    segment = Segment((0, len(case.traced.chain.layers)), (1, 0, 2)[:tail], UNEVEN[tail])
    plan = make_plan(case.traced.chain, Stage("tail", 4, (segment,), ways), world=tail)
    assert_same(plan, case, train_single(case))


def test_tied_parameters_are_reduced_once():
    """A bucket for each layer: the shared weight is in the one whose backward comes last."""
    case = case_with(Tied)
    segment = Segment((0, len(case.traced.chain.layers)), (0, 1))
    plan = make_plan(case.traced.chain, Stage("front", 2, (segment,)), world=2, bucket_bytes=1)
    assert_same(plan, case, train_single(case), gloo=True)
    program = compile_program(plan, case.traced.chain, BATCH, "train")
    counts = [o.bytes // plan.itemsize for o in program.operations if o.content == "bucket"]
    assert counts == [28, 6, 42]


def capped(stages, kind, cap):
    return [replace(s, in_flight=cap) if s.kind == kind else s for s in stages]


def least_cap(stages, kind, rule):
    """Found the long way: the first cap that compiles."""
    for cap in range(1, BATCH + 1):
        try:
            plan = plan_of(*capped(stages, kind, cap), order=rule)
            compile_program(plan, case_of().traced.chain, BATCH, "train")
        except PlanError:
            continue
        return cap
    raise AssertionError("the whole batch in flight always works")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("front", "middle", "tail"), [(2, 2, 2), (3, 0, 2), (0, 2, 1), (2, 2, 0)])
def test_least_in_flight_caps(rule, front, middle, tail):
    stages = shape(front, middle, tail, own_ranks, replicas=1, uneven=True)
    for kind in [s.kind for s in stages]:
        least = least_cap(stages, kind, rule)
        assert_parity(plan_of(*capped(stages, kind, least), order=rule))
        if least > 1:
            with pytest.raises(PlanError, match=rf"plan\.{kind}\.in_flight: {least - 1} .* works is {least}$"):
                compile_program(
                    plan_of(*capped(stages, kind, least - 1), order=rule), case_of().traced.chain, BATCH, "train"
                )


def test_several_caps_that_are_too_low_are_named_with_what_each_needs():
    stages = capped(capped(shape(2, 2, 2, own_ranks), "front", 1), "middle", 1)
    with pytest.raises(PlanError, match=r"front 1 instead of (\d+), middle 1 instead of (\d+)") as refusal:
        compile_program(plan_of(*stages), case_of().traced.chain, BATCH, "train")
    front, middle = map(int, re.findall(r"instead of (\d+)", str(refusal.value)))
    assert_parity(plan_of(*capped(capped(stages, "front", front), "middle", middle)))


def test_whole_batch_in_the_tail_needs_the_whole_ragged_batch_in_the_front():
    """The least cap was once rounded up to whole chunks: 16 of 13 samples."""
    front, tail = shape(2, 0, 2, own_ranks)
    plan = plan_of(replace(front, in_flight=12), replace(tail, micro_batch=BATCH))
    with pytest.raises(PlanError, match=r"works is 13$"):
        compile_program(plan, case_of().traced.chain, BATCH, "train")


def test_a_cap_that_fits_the_whole_batch_does_not_refuse_the_last_partial_one():
    """Eight samples share out so that six in flight, enough for ten, would wait for each other."""
    stages = [
        Stage("front", 3, (Segment((0, 4), (1,)),), in_flight=6),
        Stage("middle", 6, (Segment((4, 14), (2, 0), (1.5, 1.0)),)),
        Stage("tail", 3, (Segment((14, LAYERS), (0, 2, 1)),), ("row",)),
    ]
    assert_parity(plan_of(*stages, batch=10), samples=(10, 8) * (STEPS // 2))


@pytest.mark.parametrize("chosen", [("front",), ("middle",), ("tail",), ("front", "middle", "tail")], ids="-".join)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("degrees", [(1, 0, 1), (2, 1, 2), (1, 2, 1), (3, 2, 3)], ids=str)
def test_recomputation(chosen, placement, degrees):
    """Masks are drawn again as they were, whatever is recomputed."""
    stages = [replace(s, recompute=s.kind in chosen) for s in shape(*degrees, PLACEMENTS[placement])]
    plan = plan_of(*stages, bucket_bytes=1, recipe=Recipe(clipping="tail" in chosen))
    assert_parity(plan, dropout=0.4, gloo=placement == "own" and len(chosen) > 1)


def normalised():
    return nn.Sequential(
        nn.Linear(6, 11),
        nn.BatchNorm1d(11),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(11, 9),
        nn.BatchNorm1d(9, momentum=None),
        nn.Linear(9, 7),
    )


def buffers_of(plan):
    """Train, and return every rank's buffers and parameters."""
    case = case_with(normalised, plan.global_batch)

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators)
        train_rank(case, plan, rank, executor)
        return [t for b in executor.blocks.values() for t in (*b.buffers(), *b.parameters())]

    results = run_strictly(plan.world, body)
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def test_recomputation_counts_running_statistics_once():
    """With batch norm a plan is no single process, but it is what it is without recomputation, to the bit."""
    chain = case_with(normalised).traced.chain
    segments = Segment((0, 2), (0, 1)), Segment((2, len(chain.layers)), (1, 0))
    plain, again = (
        buffers_of(
            make_plan(
                chain,
                Stage("front", 3, segments[:1], recompute=recompute),
                Stage("middle", 4, segments[1:], recompute=recompute),
                world=2,
                global_batch=12,
            )
        )
        for recompute in (False, True)
    )
    assert any(t.dtype == torch.int64 and t > STEPS for t in plain[0]), "there is a batch norm that counted"
    for mine, other in zip(plain, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_recomputation_of_a_view():
    """A segment that only flattens: what it gives is a view of its input, with no gradient function of its own."""
    segments = Segment((0, 8), (0,)), Segment((8, 9), (1,)), Segment((9, LAYERS), (0,))
    assert_parity(plan_of(Stage("middle", 3, segments, recompute=True)))
